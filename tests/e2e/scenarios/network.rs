//! The network between the nodes: a firewall that drops UDP, and the agents' load on DNS.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use socket2::{Domain, Protocol, Socket, Type};

use super::{RegistryDown, agent_pod, ensure};
use crate::pods::{TestNamespace, WAIT_DEADLINE};
use crate::test_bed::{NODES, REGISTRY, TestBed, TestError, wait_for};

/// A rule on every node that drops UDP to the blobs' port. The rule is deleted on drop.
struct UdpDropped<'a>(&'a TestBed);

impl<'a> UdpDropped<'a> {
    fn now(bed: &'a TestBed) -> Result<Self, TestError> {
        let dropped = Self(bed);
        dropped.change_rule("-I")?;
        Ok(dropped)
    }

    fn change_rule(&self, operation: &str) -> Result<(), TestError> {
        for (node, _) in NODES {
            let rule = ["INPUT", "-p", "udp", "--dport", "4701", "-j", "DROP"];
            self.0.ctl(&[&["in", node, "iptables", "-w", operation], &rule[..]].concat())?;
        }
        Ok(())
    }
}

impl Drop for UdpDropped<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.change_rule("-D") {
            eprintln!("{error}");
        }
    }
}

/// UDP is dropped and TCP passes: a small image is recovered, and the Event of a large image names
/// UDP.
pub(super) fn udp_dropped(bed: &TestBed) -> Result<(), TestError> {
    let (provider, node) = (NODES[1].0, NODES[2].0);
    let space = TestNamespace::new(bed, "e2e-udp-dropped")?;
    for (name, layers) in [("small", &[2, 1][..]), ("large", &[65])] {
        bed.push_image(&format!("shop/{name}-over-tcp:v1"), layers)?;
        let provider_pod = format!("holds-{name}");
        space.pod(&provider_pod, provider, &format!("{REGISTRY}/shop/{name}-over-tcp:v1"), true)?;
        space.wait_running(&provider_pod)?;
    }
    let _down = RegistryDown::now(bed)?;
    let dropped = UdpDropped::now(bed)?;
    let block_started = Instant::now();
    let wait_blocked = |wanted: f64| {
        wait_for(&format!("lighterman_udp_blocked {wanted}"), WAIT_DEADLINE, || {
            Ok((bed.metric(node, "lighterman_udp_blocked")? == wanted).then_some(()))
        })
    };
    wait_blocked(1.0)?;
    println!("\nfigure udp_block_found_s {:.1}", block_started.elapsed().as_secs_f64());

    let began = Instant::now();
    space.pod("small", node, &format!("{REGISTRY}/shop/small-over-tcp:v1"), true)?;
    space.wait_running("small")?;
    println!("figure created_to_running_over_tcp_s {:.2} (3 MiB, the registry is down)", began.elapsed().as_secs_f64());
    println!("  {}", space.wait_recovered("small")?);
    let tcp_bytes = bed.metric(node, "lighterman_fetched_over_tcp_bytes_total")?;
    ensure(tcp_bytes > f64::from(3 << 20), format!("{tcp_bytes} bytes came over TCP"))?;

    space.pod("large", node, &format!("{REGISTRY}/shop/large-over-tcp:v1"), true)?;
    let note = wait_for("an Event about the large image", WAIT_DEADLINE, || {
        let notes = space.events("large", "ImageRecoveryFailed")?;
        Ok(notes.into_iter().find(|note| note.contains("67108864")))
    })?;
    println!("  {note}");
    ensure(note.contains("UDP port 4701 is blocked"), format!("the Event does not name UDP: {note}"))?;
    drop(dropped);
    wait_blocked(0.0)
}

/// Queries for the name of the agents' Service, on the way to the cluster's DNS server. Each packet
/// crosses several devices of the hub, so sender and query ID tell packets apart.
struct DnsQueries {
    packets: File,
    seen: BTreeSet<(Ipv4Addr, u16, u16)>,
    names: Vec<(Ipv4Addr, String)>,
}

impl DnsQueries {
    /// Starts to capture. The calling thread must be in the hub's network namespace.
    fn watch() -> Result<Self, TestError> {
        /// `AF_PACKET` of packet(7), and the EtherType of IPv4.
        const AF_PACKET: i32 = 17;
        const IPV4: u16 = 0x0800;
        let opened = Socket::new(Domain::from(AF_PACKET), Type::DGRAM, Some(Protocol::from(i32::from(IPV4.to_be()))));
        let socket = opened.and_then(|socket| {
            socket.set_read_timeout(Some(Duration::from_millis(200)))?;
            socket.set_recv_buffer_size(8 << 20)?;
            Ok(socket)
        });
        let socket = socket.map_err(|error| format!("a packet socket: {error}"))?;
        Ok(Self { packets: OwnedFd::from(socket).into(), seen: BTreeSet::new(), names: Vec::new() })
    }

    /// Reads packets for this time.
    fn read_for(&mut self, time: Duration) {
        let (deadline, mut packet) = (Instant::now() + time, [0; 2048]);
        while Instant::now() < deadline {
            let Ok(length) = self.packets.read(&mut packet) else { continue };
            let Some((from, port, id, name)) = query(&packet[..length]) else { continue };
            if name.starts_with("lighterman-peers") && self.seen.insert((from, port, id)) {
                self.names.push((from, name));
            }
        }
    }

    fn of(&self, address: Ipv4Addr) -> Vec<&str> {
        self.names.iter().filter(|(from, _)| *from == address).map(|(_, name)| name.as_str()).collect()
    }
}

/// The sender's address and port, the ID and the name of a query in an IPv4 packet to port 53 (RFC
/// 1035, section 4.1).
fn query(packet: &[u8]) -> Option<(Ipv4Addr, u16, u16, String)> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    let from = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?);
    let word = |at: usize| Some(u16::from_be_bytes(packet.get(header + at..header + at + 2)?.try_into().ok()?));
    if *packet.get(9)? != 17 || word(2)? != 53 {
        return None;
    }
    let (port, id, mut at, mut labels) = (word(0)?, word(8)?, header + 20, Vec::new());
    loop {
        let length = usize::from(*packet.get(at)?);
        if length == 0 {
            return Some((from, port, id, labels.join(".").to_lowercase()));
        }
        labels.push(String::from_utf8_lossy(packet.get(at + 1..at + 1 + length)?).into_owned());
        at += 1 + length;
    }
}

/// Variable with the length in seconds of the window after convergence. Without the variable no
/// window is measured.
const WINDOW: &str = "LIGHTERMAN_DNS_WINDOW";

/// Counts the packets of a look-up on the wire, and with [`WINDOW`] the packets of an agent in an
/// hour, extrapolated from the window. A look-up comes every 12 to 18 minutes, so a shorter window
/// may contain none.
pub(super) fn dns_queries(bed: &TestBed) -> Result<(), TestError> {
    let node = NODES[0].0;
    let address: Ipv4Addr = bed.env(&format!("NODE_{node}_IP"))?.parse().map_err(|error| format!("{error}"))?;
    let mut queries = DnsQueries::watch()?;
    let name = agent_pod(bed, node)?["metadata"]["name"].as_str().unwrap_or_default().to_owned();
    bed.kubectl(&["-n", "lighterman", "delete", "pod", &name, "--wait=true"])?;
    let look_ups = || {
        let of = |result: &str| bed.metric(node, &format!("lighterman_dns_lookups_total{{result=\"{result}\"}}"));
        Ok::<_, TestError>(of("answered")? + of("unanswered")?)
    };
    let is_converged =
        |peers: f64| Ok::<_, TestError>(bed.metric(node, "lighterman_peers").is_ok_and(|known| known == peers));
    // The nodes of the stall rows have agents too.
    let agents = bed.nodes().count() as f64;
    let deadline = Instant::now() + WAIT_DEADLINE;
    let counted = loop {
        queries.read_for(Duration::from_secs(2));
        // At least one look-up has ended, and none began while the packets were counted.
        let before = look_ups().unwrap_or(0.0);
        let sent = queries.of(address).len();
        queries.read_for(Duration::from_secs(2));
        let is_still = look_ups().is_ok_and(|after| after == before) && queries.of(address).len() == sent;
        if is_still && before >= 1.0 && is_converged(agents - 1.0)? {
            break before;
        }
        ensure(Instant::now() < deadline, "the new agent keeps querying DNS or lacks peers")?;
    };
    let names = queries.of(address);
    let packets_per_lookup = names.len() as f64 / counted;
    println!(
        "\nfigure dns_packets_per_look_up {packets_per_lookup:.1} ({} packets, {counted} look-ups of an agent that started)",
        names.len()
    );
    let expected = "lighterman-peers.lighterman.svc.cluster.local";
    ensure(names.iter().all(|name| *name == expected), format!("a search domain was tried: {names:?}"))?;
    ensure(packets_per_lookup <= 2.0, format!("a look-up is {packets_per_lookup} packets"))?;
    let window = std::env::var(WINDOW).ok().and_then(|seconds| seconds.parse::<u32>().ok());
    let Some(window) = window else { return Ok(()) };
    queries.names.clear();
    queries.read_for(Duration::from_secs(window.into()));
    let per_hour = queries.names.len() as f64 / agents * 3600.0 / f64::from(window);
    println!("figure dns_queries_per_agent_hour_wire {per_hour:.1} ({window} s after convergence, {agents} agents)");
    Ok(())
}
