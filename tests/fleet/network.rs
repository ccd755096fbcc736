//! Network of the agents: a network namespace for each agent, with two links to a namespace in the
//! middle, the switch.
//!
//! The mesh link carries only traffic between agents, so the link's counters are exact and a test
//! may take the link down. The API server and the admin ports are on the other link, which stays
//! up.

use std::fs::File;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns};

/// Address of the switch on the links of the API server and the admin ports. The namespaces have no
/// route to other networks.
pub(crate) const SWITCH: Ipv4Addr = Ipv4Addr::new(10, 97, 0, 1);

/// Drop removes all namespaces. A crash of this process removes the namespaces too.
pub(crate) struct AgentNetwork {
    tag: String,
    agents: usize,
    /// A shell whose standard input closes when this process ends. The shell then kills the
    /// processes in the agents' namespaces and removes all namespaces.
    cleanup: Child,
}

/// `$1` is the switch, whose servers end by themselves; the other arguments are the agents'
/// namespaces.
const CLEANUP_SCRIPT: &str = r#"
trap '' INT TERM
cat > /dev/null
switch=$1
shift
for agent; do
  ip netns pids "$agent" | xargs -r kill -KILL
  ip netns del "$agent"
done
ip netns del "$switch"
"#;

/// Traffic on one agent's mesh link. Bytes include Ethernet headers.
#[derive(Clone, Copy, Default)]
pub(crate) struct LinkBytes {
    pub(crate) sent: u64,
    pub(crate) received: u64,
    /// Packets in both directions together.
    pub(crate) packets: u64,
}

impl LinkBytes {
    pub(crate) fn since(self, before: Self) -> Self {
        Self {
            sent: self.sent - before.sent,
            received: self.received - before.received,
            packets: self.packets - before.packets,
        }
    }
}

/// Address at which an agent accepts peers.
pub(crate) fn mesh_address(agent: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 98, 0, last_byte(agent)), 4701).into()
}

/// Address of an agent's admin port.
pub(crate) fn admin_address(agent: usize) -> SocketAddr {
    (Ipv4Addr::new(10, 97, 0, last_byte(agent)), 4702).into()
}

fn last_byte(agent: usize) -> u8 {
    u8::try_from(11 + agent).expect("the subnet has an address for every agent")
}

impl AgentNetwork {
    /// Creates the namespaces and links of this many agents.
    pub(crate) fn new(agents: usize) -> Self {
        let tag = format!("lighterman-{}", std::process::id());
        let names: Vec<_> = (0..agents).map(|agent| namespace(&tag, agent)).collect();
        let switch = format!("{tag}-switch");
        let cleanup = Command::new("sh")
            .args(["-c", CLEANUP_SCRIPT, "sh", &switch])
            .args(&names)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("sh runs");
        let network = Self { tag, agents, cleanup };
        let mut lines = vec!["link set lo up".to_owned()];
        for bridge in ["mesh", "control"] {
            lines.push(format!("link add {bridge} type bridge mcast_snooping 0"));
            lines.push(format!("link set {bridge} addrgenmode none up"));
        }
        lines.push(format!("address add {SWITCH}/24 dev control"));
        ip(&["netns", "add", &switch], &[]);
        for (agent, name) in names.iter().enumerate() {
            ip(&["netns", "add", name], &[]);
            for bridge in ["mesh", "control"] {
                let end = format!("{bridge}-{agent}");
                lines.push(format!("link add {end} type veth peer name {bridge} netns {name}"));
                lines.push(format!("link set {end} addrgenmode none master {bridge} up"));
            }
        }
        ip(&["-n", &switch], &lines);
        for (agent, name) in names.iter().enumerate() {
            let mut lines = vec!["link set lo up".to_owned()];
            for (link, address) in [("mesh", mesh_address(agent)), ("control", admin_address(agent))] {
                // One segment per packet, so that each segment counts with the headers of a real
                // wire.
                lines.push(format!("link set {link} gso_max_segs 1"));
                lines.push(format!("link set {link} addrgenmode none up"));
                lines.push(format!("address add {}/24 dev {link}", address.ip()));
            }
            ip(&["-n", name], &lines);
        }
        network
    }

    /// Moves this thread into the switch. Its later threads and processes start there.
    pub(crate) fn enter_switch(&self) {
        let namespace = File::open(format!("/var/run/netns/{}-switch", self.tag)).unwrap();
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// A command in an agent's namespace. `nsenter` replaces itself with the program, so the
    /// process ID of the command is the program's.
    pub(crate) fn command(&self, agent: usize, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net=/var/run/netns/{}", namespace(&self.tag, agent))).arg(program);
        command
    }

    /// Traffic of each mesh link so far. To be called on a thread of the switch.
    pub(crate) fn link_bytes(&self) -> Vec<LinkBytes> {
        let table = std::fs::read_to_string("/proc/thread-self/net/dev").unwrap();
        let of_agent = |agent: usize| {
            let link = format!("mesh-{agent}:");
            let numbers = table.lines().find_map(|line| line.trim_start().strip_prefix(&link)).unwrap();
            let numbers: Vec<u64> = numbers.split_whitespace().map(|number| number.parse().unwrap()).collect();
            // Counters at the switch's end of the link: received bytes are bytes that the agent
            // sent.
            LinkBytes { sent: numbers[0], received: numbers[8], packets: numbers[1] + numbers[9] }
        };
        (0..self.agents).map(of_agent).collect()
    }
}

impl Drop for AgentNetwork {
    fn drop(&mut self) {
        drop(self.cleanup.stdin.take());
        let _ = self.cleanup.wait();
    }
}

fn namespace(tag: &str, agent: usize) -> String {
    format!("{tag}-agent-{agent}")
}

/// Runs `ip` with these arguments. Lines, if any, are a batch on the standard input.
pub(crate) fn ip(arguments: &[&str], lines: &[String]) {
    let mut command = Command::new("ip");
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::piped());
    if !lines.is_empty() {
        command.args(["-batch", "-"]);
    }
    let mut child = command.spawn().expect("ip runs");
    child.stdin.take().unwrap().write_all(lines.join("\n").as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{command:?} (are you root?): {}", String::from_utf8_lossy(&output.stderr));
}
