//! Nodes and pods have IPv6 addresses only.

use std::net::{IpAddr, SocketAddr, TcpStream};
use std::time::Duration;

use socket2::{Domain, Socket, Type};

use super::{IPV6_REGISTRY, NAMED_REGISTRY, NODES, addresses, recover_in_both_directions, wait_connected};
use crate::pods::{TestNamespace, WAIT_DEADLINE};
use crate::scenarios::{Scenario, ensure};
use crate::test_bed::{TestBed, TestError, wait_for};

pub(super) const SCENARIOS: &[(&str, Scenario)] = &[
    ("family::ipv6::agents_find_each_other_by_aaaa_records", connected),
    ("family::ipv6::images_of_a_registry_named_by_its_address_are_recovered", by_address),
    ("family::ipv6::images_of_a_registry_with_an_aaaa_record_alone_are_recovered", by_name),
    ("family::ipv6::a_subnet_of_clients_leaves_slots_at_the_admin_port", subnet_of_clients),
];

/// A subnet of 2^64 addresses, all of the hub.
const CLIENTS: &str = "fd66::/64";

pub(super) fn before_agents(bed: &TestBed) -> Result<(), TestError> {
    bed.ctl(&["in", "hub", "ip", "route", "add", "local", CLIENTS, "dev", "lo"])?;
    bed.ctl(&["in", "hub", "sh", "-c", "echo 1 > /proc/sys/net/ipv6/ip_nonlocal_bind"])?;
    let hub = bed.env("HUB_IP")?;
    NODES.iter().try_for_each(|(node, _)| bed.ctl(&["in", node, "ip", "route", "add", CLIENTS, "via", &hub]).map(drop))
}

fn connected(bed: &TestBed) -> Result<(), TestError> {
    let query_dns = |kind: &str| -> Result<String, TestError> {
        let busybox = bed.busybox().to_string_lossy().into_owned();
        let name = "lighterman-peers.lighterman.svc.cluster.local";
        let command = [&busybox, "nslookup", &format!("-type={kind}"), name, &bed.env("DNS_IP")?].map(str::to_owned);
        // busybox fails where no record of this type exists.
        let answer = bed.ctl(&[&["in", "hub"], &command.each_ref().map(String::as_str)[..]].concat());
        Ok(answer.unwrap_or_else(|error| error))
    };
    for (node, _) in NODES {
        let address = addresses(bed, node)?[0].to_string();
        ensure(query_dns("aaaa")?.contains(&address), format!("DNS does not list {address}"))?;
    }
    let records = query_dns("a")?;
    ensure(!records.contains("Address: 10."), format!("there are A records: {records}"))?;
    wait_connected(bed)
}

fn by_address(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-ipv6-address")?;
    recover_in_both_directions(bed, &space, IPV6_REGISTRY, "address")
}

fn by_name(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-ipv6-name")?;
    recover_in_both_directions(bed, &space, NAMED_REGISTRY, "name")
}

/// Connects from one address of the clients' subnet.
fn connect(host: u16, agent: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    let from = IpAddr::from([0xfd66, 0, 0, 0, 0, 0, 0, host]);
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&agent.into(), Duration::from_secs(10))?;
    Ok(socket.into())
}

/// Idle clients from one subnet take at most half of the admin port's connections. Meanwhile the
/// agent answers a scrape from another subnet.
fn subnet_of_clients(bed: &TestBed) -> Result<(), TestError> {
    let node = NODES[0].0;
    let agent = SocketAddr::new(addresses(bed, node)?[0], 4702);
    let rejected = || bed.metric(node, "lighterman_admin_connections_rejected_total{reason=\"subnet\"}");
    let before = rejected()?;
    let clients: Result<Vec<_>, _> = (1..=200).map(|host| connect(host, agent)).collect();
    let clients = clients.map_err(|error| format!("{agent}: {error}"))?;
    wait_for("connections to be rejected, and a scrape meanwhile", WAIT_DEADLINE, || {
        Ok((rejected()? >= before + 100.0).then_some(()))
    })?;
    drop(clients);
    Ok(())
}
