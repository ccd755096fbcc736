//! Processor time: of this process, of threads, and of child processes.

use std::time::Duration;

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;

use crate::report::BenchError;

/// Time in user code and in the kernel.
pub(crate) fn spent(target: UsageWho) -> Result<Duration, BenchError> {
    let usage = getrusage(target)?;
    let duration = |time: TimeVal| {
        Duration::from_secs(time.tv_sec().cast_unsigned()) + Duration::from_micros(time.tv_usec().cast_unsigned())
    };
    Ok(duration(usage.user_time()) + duration(usage.system_time()))
}

/// Processor time of another running process: proc_pid_stat(5), fields 14 and 15, in hundredths of
/// a second.
pub(crate) fn spent_by(pid: u32) -> Result<Duration, BenchError> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses, which may contain any character.
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    let ticks: Result<Vec<u64>, _> = fields.split_whitespace().skip(11).take(2).map(str::parse).collect();
    Ok(Duration::from_millis(10 * ticks?.iter().sum::<u64>()))
}

/// The kernel's name of the processor, and whether the processor has SHA-256 instructions.
pub(crate) fn model() -> Result<(String, bool), BenchError> {
    let info = std::fs::read_to_string("/proc/cpuinfo")?;
    let field = |name: &str| {
        let line = info.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split_once(": ")).map_or("", |(_, value)| value)
    };
    Ok((field("model name").to_owned(), field("flags").split(' ').any(|flag| flag == "sha_ni")))
}

/// A line about the machine, and the load before the benchmark.
pub(crate) fn machine() -> Result<String, BenchError> {
    let (model, _) = model()?;
    let cores = std::thread::available_parallelism()?;
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let load = std::fs::read_to_string("/proc/loadavg")?;
    let last_minute = load.split(' ').next().unwrap_or_default();
    Ok(format!("{cores} x {model}, Linux {}, load {last_minute} before the start", kernel.trim()))
}

/// Processor time of all processors since the machine's start, in ticks.
#[derive(Clone, Copy)]
pub(crate) struct Ticks {
    idle: u64,
    all: u64,
}

impl Ticks {
    /// Reads the ticks up to now: proc_stat(5).
    pub(crate) fn now() -> Result<Self, BenchError> {
        let stat = std::fs::read_to_string("/proc/stat")?;
        let line = stat.lines().find_map(|line| line.strip_prefix("cpu ")).ok_or("no processors in /proc/stat")?;
        let ticks: Result<Vec<u64>, _> = line.split_whitespace().map(str::parse).collect();
        let ticks = ticks?;
        // user, nice, system, idle, iowait, irq, softirq, steal. Later fields are already part of
        // user.
        Ok(Self { idle: ticks.iter().skip(3).take(2).sum(), all: ticks.iter().take(8).sum() })
    }

    /// The idle share of all processors' time, from 0 to 1.
    pub(crate) fn idle_since(self, before: Self) -> f64 {
        (self.idle - before.idle) as f64 / (self.all - before.all).max(1) as f64
    }
}

/// The peak of a process's resident memory so far, in MiB.
pub(crate) fn peak_mib(pid: u32) -> Result<f64, BenchError> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")?.trim().strip_suffix(" kB"));
    Ok(peak.ok_or("no VmHWM")?.parse::<f64>()? / 1024.0)
}
