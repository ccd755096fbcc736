//! Clusters of the other address families: IPv6 only, and dual stack. Each cluster is small and
//! uses the manifest's settings.

mod dual_stack;
mod ipv6_only;

use std::net::{IpAddr, SocketAddr};

use serde_json::Value;

use crate::pods::{TestNamespace, WAIT_DEADLINE};
use crate::scenarios::{RegistryDown, Scenario, agent_pod, ensure};
use crate::test_bed::{TestBed, TestError, set_variable, shipped_manifest, wait_for};

/// The nodes of each cluster and the series of their containerd.
const NODES: [(&str, &str); 2] = [("n23", "2.3"), ("n24", "2.4")];

/// The registry's IPv6 address in images.
const IPV6_REGISTRY: &str = "[fd77::1]:5000";

/// The registry's host name, with a DNS record of each family of the cluster.
const NAMED_REGISTRY: &str = "registry.test:5000";

/// A cluster with scenarios.
pub(crate) struct Family {
    /// The name of the family in `up.sh`.
    pub(crate) name: &'static str,
    pub(crate) scenarios: &'static [(&'static str, Scenario)],
    /// Changes nodes before the agents start.
    before_agents: fn(&TestBed) -> Result<(), TestError>,
    /// Changes the manifest.
    change: fn(String) -> String,
}

/// Every family except IPv4, which the first cluster has.
pub(crate) const ALL: &[Family] = &[
    Family {
        name: "ipv6",
        scenarios: ipv6_only::SCENARIOS,
        before_agents: ipv6_only::before_agents,
        change: std::convert::identity,
    },
    Family {
        name: "dual",
        scenarios: dual_stack::SCENARIOS,
        before_agents: dual_stack::before_agents,
        change: dual_stack::list_both_families,
    },
];

impl Family {
    pub(crate) fn up(&self) -> Result<TestBed, TestError> {
        let Self { name, scenarios: _, before_agents, change } = self;
        let variables = [("LIGHTERMAN_ZONES", ""), ("LIGHTERMAN_FAMILY", name)];
        let bed = TestBed::start(&format!("-{name}"), &NODES, &variables)?;
        before_agents(&bed)?;
        bed.import_agents()?;
        let insecure = format!("{IPV6_REGISTRY},{NAMED_REGISTRY},{}", bed.env("REGISTRY")?);
        let manifest = set_variable(&shipped_manifest()?, "LIGHTERMAN_INSECURE_REGISTRY", &insecure);
        bed.deploy(&change(manifest))?;
        Ok(bed)
    }
}

/// The addresses of a node, the main address first.
fn addresses(bed: &TestBed, node: &str) -> Result<Vec<IpAddr>, TestError> {
    let listed = bed.env(&format!("NODE_{node}_IPS"))?;
    listed.split(',').map(|address| address.parse().map_err(|error| format!("{address}: {error}"))).collect()
}

fn status(bed: &TestBed, node: &str) -> Result<Value, TestError> {
    let pod = agent_pod(bed, node)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let text = bed.kubectl(&["-n", "lighterman", "exec", name, "--", "lighterman", "status", "--json"])?;
    serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))
}

/// Waits until each agent is connected to the other. `status`, the admin port and the metric must
/// show one peer, under the main address of the peer's node.
fn wait_connected(bed: &TestBed) -> Result<(), TestError> {
    let [(one, _), (other, _)] = NODES;
    for (node, other) in [(one, other), (other, one)] {
        let expected = SocketAddr::new(addresses(bed, other)?[0], 4701).to_string();
        wait_for(&format!("the agent on {node} to be connected to the agent on {other}"), WAIT_DEADLINE, || {
            let status = status(bed, node)?;
            let members = status["mesh"]["members"].as_array().cloned().unwrap_or_default();
            ensure(members.len() <= 1, format!("the other node has several members: {members:?}"))?;
            let is_connected = |member: &Value| member["address"] == expected.as_str() && member["neighbor"] == true;
            Ok(members.iter().any(is_connected).then_some(()))
        })?;
        for address in addresses(bed, node)? {
            let admin = SocketAddr::new(address, 4702);
            let page = bed.get_admin(admin, "/debug/mesh?format=table")?;
            ensure(page.contains(&expected), format!("the page of {admin} lacks {expected}: {page}"))?;
        }
        let peers = bed.metric(node, "lighterman_peers")?;
        ensure(peers == 1.0, format!("{node} counts {peers} peers"))?;
        println!("  {node} is connected to {other} at {expected}");
    }
    Ok(())
}

/// Recovers an image by tag from the first node to the second, and an image by digest in the other
/// direction, while the registry of this name is down.
fn recover_in_both_directions(
    bed: &TestBed,
    space: &TestNamespace<'_>,
    registry: &str,
    name: &str,
) -> Result<(), TestError> {
    let [(one, _), (other, _)] = NODES;
    let mut waiting = Vec::new();
    for (by_what, provider, node) in [("tag", one, other), ("digest", other, one)] {
        let repository = format!("shop/{name}-{by_what}");
        let digest = bed.push_image(&format!("{repository}:v1"), &[12, 1])?;
        let image = match by_what {
            "tag" => format!("{registry}/{repository}:v1"),
            _ => format!("{registry}/{repository}@{digest}"),
        };
        let provider_pod = format!("{name}-{by_what}-provider");
        space.pod(&provider_pod, provider, &image, true)?;
        space.wait_running(&provider_pod)?;
        waiting.push((format!("{name}-{by_what}"), provider, node, image));
    }
    let _down = RegistryDown::now(bed)?;
    for (pod, _, node, image) in &waiting {
        space.pod(pod, node, image, true)?;
    }
    for (pod, provider, node, image) in &waiting {
        space.wait_running(pod)?;
        let note = space.wait_recovered(pod)?;
        ensure(note.contains(image) && note.contains(&format!("came from {provider}")), format!("on {node}: {note}"))?;
        println!("  {note}");
        let down = status(bed, node)?["registriesDown"].to_string();
        ensure(down.contains(&format!("\"{registry}\"")), format!("registriesDown lacks {registry}: {down}"))?;
    }
    Ok(())
}
