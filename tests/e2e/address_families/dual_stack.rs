//! Nodes and pods have addresses of both families. The Service of the agents lists both. On one
//! node a socket bound to `[::]` accepts no IPv4 by default.

use super::{IPV6_REGISTRY, NODES, addresses, recover_in_both_directions, wait_connected};
use crate::pods::TestNamespace;
use crate::scenarios::{Scenario, ensure};
use crate::test_bed::{TestBed, TestError};

pub(super) const SCENARIOS: &[(&str, Scenario)] = &[
    ("family::dual::a_node_with_addresses_of_both_families_is_one_member", single_member),
    ("family::dual::images_of_a_registry_named_by_either_family_are_recovered", by_either_family),
];

/// On this node `[::]` means IPv6 only, unless a program sets the socket option itself. The kubelet
/// probes the agent at the node's IPv4 address.
pub(super) fn before_agents(bed: &TestBed) -> Result<(), TestError> {
    bed.ctl(&["in", NODES[1].0, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/bindv6only"]).map(drop)
}

pub(super) fn list_both_families(manifest: String) -> String {
    manifest.replace("  clusterIP: None\n", "  clusterIP: None\n  ipFamilyPolicy: RequireDualStack\n")
}

/// DNS lists each node twice. Agents dial each other at both addresses, and never dial themselves.
fn single_member(bed: &TestBed) -> Result<(), TestError> {
    let listed =
        bed.kubectl(&["-n", "lighterman", "get", "endpointslices", "-o", "jsonpath={.items[*].addressType}"])?;
    ensure(listed.contains("IPv4") && listed.contains("IPv6"), format!("the Service lists {listed}"))?;
    wait_connected(bed)?;
    for (node, _) in NODES {
        ensure(addresses(bed, node)?.len() == 2, format!("{node} has no address of each family"))?;
        let logs =
            bed.kubectl(&["-n", "lighterman", "logs", "-l", "app.kubernetes.io/name=lighterman", "--tail=-1"])?;
        // The first dial may come before the agent's own token.
        let is_unanswered = |line: &str| line.contains("no peer there yet") && !line.contains("no credential to show");
        ensure(!logs.lines().any(is_unanswered), format!("an address from DNS has no agent: {logs}"))?;
    }
    Ok(())
}

fn by_either_family(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-dual")?;
    recover_in_both_directions(bed, &space, IPV6_REGISTRY, "ipv6")?;
    recover_in_both_directions(bed, &space, &bed.env("REGISTRY")?, "ipv4")
}
