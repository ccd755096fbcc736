//! Loopback with frames as long as a network's.

use std::fmt;
use std::fs::File;
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

use crate::report::{BenchError, note};

/// What Ethernet carries unless somebody says otherwise.
pub(crate) const ETHERNET: u32 = 1500;

/// What data centres and clouds have where somebody did.
pub(crate) const JUMBO: u32 = 9000;

/// A network namespace of this thread's own and of what it starts, in which there is only loopback; its packets have so many bytes at most.
/// When dropped, the thread is where it was.
pub(crate) struct LoopbackNetwork {
    bytes: u32,
    before: File,
}

impl LoopbackNetwork {
    pub(crate) fn with_mtu(bytes: u32) -> Result<Self, BenchError> {
        let before = File::open("/proc/thread-self/ns/net")?;
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
            format!("no network of our own, so no frames of {bytes} bytes: {errno} (are you root?)")
        })?;
        let frames = Self { bytes, before };
        let set = Command::new("ip").args(["link", "set", "lo", "up", "mtu", &bytes.to_string()]).output()?;
        match set.status.success() {
            true => Ok(frames),
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
            note(&format!("what follows runs in the wrong network: {errno}"));
        }
    }
}
