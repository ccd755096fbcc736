//! Memory and processor time of a process, as the kernel counts them.

use std::fs;
use std::time::Duration;

/// Linux reports processor time to programs in units of 10 ms, whatever the kernel's own tick is.
const TICKS_PER_SECOND: f64 = 100.0;

/// Resident memory now, in MiB.
pub(super) fn resident_mib(process: u32) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    let kib: f64 = line.trim().strip_suffix(" kB").unwrap().parse().unwrap();
    kib / 1024.0
}

/// User and system time so far.
pub(super) fn processor_time(process: u32) -> Duration {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).unwrap();
    // The name in parentheses may contain any character. The 14th and 15th fields of the line are
    // `utime` and `stime`.
    let (_, fields) = stat.rsplit_once(") ").unwrap();
    let ticks: u64 = fields.split(' ').skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
    Duration::from_secs_f64(ticks as f64 / TICKS_PER_SECOND)
}
