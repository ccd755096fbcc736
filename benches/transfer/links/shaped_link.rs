//! A sender and a receiver, each in a network namespace, and a switch in a third between them, whose port to the receiver has a rate and a
//! queue.
//!
//! The queue is in the switch, not before the sender's own link: there, what waits in it would count against the sender's socket buffer,
//! which no queue along the way does.

use std::fs::File;
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::fd::AsRawFd;
use std::process::{Command, Stdio, id};
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use crate::report::BenchError;

/// The namespaces have no way out.
pub(super) const SENDER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);
pub(super) const RECEIVER: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 2);

/// The namespaces have no names: they go when nobody has them open any more.
pub(super) struct ShapedLink {
    pub(super) sender: File,
    pub(super) receiver: File,
    /// Kept open for as long as the ends are there.
    switch: File,
}

impl ShapedLink {
    /// Only the way to the receiver is limited; acknowledgements have all the room they want.
    pub(super) fn new(mbit_s: u32, queue_ms: u32) -> Result<Self, BenchError> {
        let wire = Self { sender: namespace()?, receiver: namespace()?, switch: namespace()? };
        let at = |namespace: &File| format!("/proc/{}/fd/{}", id(), namespace.as_raw_fd());
        let ports = [("to-sender", &wire.sender, SENDER), ("to-receiver", &wire.receiver, RECEIVER)];
        let mut lines = vec!["link add name switch type bridge mcast_snooping 0".to_owned()];
        lines.push("link set dev switch addrgenmode none up".to_owned());
        for (port, namespace, _) in ports {
            lines.push(format!("link add name {port} type veth peer name wire netns {}", at(namespace)));
            lines.push(format!("link set dev {port} addrgenmode none master switch up"));
        }
        within(&wire.switch, "ip", &lines)?;
        for (_, namespace, address) in ports {
            // One packet at a time passes, as on a wire; the kernel would carry what one call sent as one packet of 64 KiB.
            let lines = [
                "link set dev wire gso_max_segs 1 addrgenmode none up".to_owned(),
                format!("address add {address}/24 dev wire"),
            ];
            within(namespace, "ip", &lines)?;
        }
        let shape = format!("qdisc add dev to-receiver root tbf rate {mbit_s}mbit burst 64kb latency {queue_ms}ms");
        within(&wire.switch, "tc", &[shape])?;
        Ok(wire)
    }
}

/// Makes this thread part of a namespace; the sockets it opens are, too.
pub(super) fn enter(namespace: &File) -> Result<(), BenchError> {
    Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?)
}

fn namespace() -> Result<File, BenchError> {
    let made = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| format!("no network of our own: {errno} (are you root?)"))?;
        Ok(File::open("/proc/thread-self/ns/net")?)
    });
    made.join().map_err(|_| "the thread panicked")?
}

/// Gives `ip` or `tc` these lines as a batch.
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
