//! Nodes and pods have addresses of both families. The Service of the agents lists both. On one
//! node a socket bound to `[::]` takes no IPv4 by default.

use super::{IPV6_REGISTRY, NODES, addresses, know_each_other, recovered_both_ways};
use crate::bed::{Bed, Failure};
use crate::pods::Space;
use crate::scenarios::{Scenario, ensure};

pub(super) const SCENARIOS: &[(&str, Scenario)] = &[
    ("family::dual::a_node_with_addresses_of_both_families_is_one_member", joined),
    ("family::dual::images_of_a_registry_named_by_either_family_are_recovered", by_either_family),
];

/// On such a node `[::]` means IPv6 alone, unless a program sets the socket's own option. The
/// kubelet probes the agent at the node's IPv4 address.
pub(super) fn before_agents(bed: &Bed) -> Result<(), Failure> {
    bed.ctl(&["in", NODES[1].0, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/bindv6only"]).map(drop)
}

pub(super) fn list_both_families(manifest: String) -> String {
    manifest.replace("  clusterIP: None\n", "  clusterIP: None\n  ipFamilyPolicy: RequireDualStack\n")
}

/// DNS lists each node twice. Agents greet each other at both addresses and themselves at neither.
fn joined(bed: &Bed) -> Result<(), Failure> {
    let listed =
        bed.kubectl(&["-n", "lighterman", "get", "endpointslices", "-o", "jsonpath={.items[*].addressType}"])?;
    ensure(listed.contains("IPv4") && listed.contains("IPv6"), format!("the Service lists {listed}"))?;
    know_each_other(bed)?;
    for (node, _) in NODES {
        ensure(addresses(bed, node)?.len() == 2, format!("{node} has no address of each family"))?;
        let logs =
            bed.kubectl(&["-n", "lighterman", "logs", "-l", "app.kubernetes.io/name=lighterman", "--tail=-1"])?;
        ensure(!logs.contains("no peer there yet"), format!("an address of DNS leads to no peer: {logs}"))?;
    }
    Ok(())
}

fn by_either_family(bed: &Bed) -> Result<(), Failure> {
    let space = Space::new(bed, "e2e-dual")?;
    recovered_both_ways(bed, &space, IPV6_REGISTRY, "ipv6")?;
    recovered_both_ways(bed, &space, &bed.env("REGISTRY")?, "ipv4")
}
