//! Loopback with the frame size of a network.

use std::fmt;
use std::fs::File;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

use crate::report::{BenchError, note};

/// Ethernet's default MTU.
pub(crate) const ETHERNET: u32 = 1500;

/// MTU of jumbo frames, as data centers and clouds configure them.
pub(crate) const JUMBO: u32 = 9000;

/// A network namespace of this thread and its children, with only loopback at this MTU. On drop,
/// the thread returns to the earlier namespace.
pub(crate) struct LoopbackNetwork {
    bytes: u32,
    before: File,
}

impl LoopbackNetwork {
    pub(crate) fn with_mtu(bytes: u32) -> Result<Self, BenchError> {
        let before = File::open("/proc/thread-self/ns/net")?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
            format!("cannot make a network namespace with frames of {bytes} bytes: {errno} (run as root)")
        })?;
        let network = Self { bytes, before };
        let set = Command::new("ip").args(["link", "set", "lo", "up", "mtu", &bytes.to_string()]).output()?;
        match set.status.success() {
            true => Ok(network),
            false => Err(format!("ip link set lo: {}", String::from_utf8_lossy(&set.stderr)).into()),
        }
    }
}

impl fmt::Display for LoopbackNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "loopback with frames of {} bytes", self.bytes)
    }
}

impl Drop for LoopbackNetwork {
    fn drop(&mut self) {
        if let Err(errno) = setns(&self.before, CloneFlags::CLONE_NEWNET) {
            note(&format!("later benchmarks run in the wrong network namespace: {errno}"));
        }
    }
}
