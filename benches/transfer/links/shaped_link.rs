//! A sender and a receiver, each in a network namespace, and a switch in a third namespace between
//! them. The switch's port to the receiver has a rate and a queue.
//!
//! The queue is in the switch. A queue at the sender's own link would count against the sender's
//! socket buffer, unlike a queue on the path.

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio, id};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::report::BenchError;

/// Addresses in the namespaces, which have no route to the outside.
pub(super) const SENDER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub(super) const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 2);

/// The namespaces have no names, and end when no process has them open.
pub(super) struct ShapedLink {
    pub(super) sender: File,
    pub(super) receiver: File,
    /// Keeps the switch's namespace open.
    switch: File,
}

impl ShapedLink {
    /// Only the direction to the receiver is limited. Acknowledgements pass without a limit.
    pub(super) fn new(mbit_s: u32, queue_ms: u32) -> Result<Self, BenchError> {
        let link = Self { sender: namespace()?, receiver: namespace()?, switch: namespace()? };
        let at = |namespace: &File| format!("/proc/{}/fd/{}", id(), namespace.as_raw_fd());
        let ports = [("to-sender", &link.sender, SENDER), ("to-receiver", &link.receiver, RECEIVER)];
        let mut lines = vec!["link add name switch type bridge mcast_snooping 0".to_owned()];
        lines.push("link set dev switch addrgenmode none up".to_owned());
        for (port, namespace, _) in ports {
            lines.push(format!("link add name {port} type veth peer name wire netns {}", at(namespace)));
            lines.push(format!("link set dev {port} addrgenmode none master switch up"));
        }
        within(&link.switch, "ip", &lines)?;
        for (_, namespace, address) in ports {
            // Sends packets one at a time, as on a wire. Otherwise the kernel carries the bytes of
            // a system call as a single packet of 64 KiB.
            let lines = [
                "link set dev wire gso_max_segs 1 addrgenmode none up".to_owned(),
                format!("address add {address}/24 dev wire"),
            ];
            within(namespace, "ip", &lines)?;
        }
        let shape = format!("qdisc add dev to-receiver root tbf rate {mbit_s}mbit burst 64kb latency {queue_ms}ms");
        within(&link.switch, "tc", &[shape])?;
        Ok(link)
    }
}

/// Moves this thread into a namespace. New sockets of the thread belong to that namespace.
pub(super) fn enter(namespace: &File) -> Result<(), BenchError> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

fn namespace() -> Result<File, BenchError> {
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(|errno| format!("cannot make a network namespace: {errno} (run as root)"))?;
        Ok(File::open("/proc/thread-self/ns/net")?)
    });
    made.join().map_err(|_| "the thread panicked")?
}

/// Runs `ip` or `tc` with these lines as a batch.
fn within(namespace: &File, program: &str, lines: &[String]) -> Result<(), BenchError> {
    let (namespace, input) = (namespace.try_clone()?, lines.join("\n") + "\n");
    let mut command = Command::new(program);
    command.args(["-batch", "-"]).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    let ran = thread::spawn(move || {
        enter(&namespace)?;
        let mut child = command.spawn()?;
        child.stdin.take().ok_or("no standard input")?.write_all(input.as_bytes())?;
        let output = child.wait_with_output()?;
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned().into()) }
    });
    let result: Result<(), BenchError> = ran.join().map_err(|_| "the thread panicked")?;
    result.map_err(|error| format!("{program}: {error}").into())
}
