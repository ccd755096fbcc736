//! Interruptions: agents are killed and pods are deleted, and no partial image or ingest stays
//! behind.

use std::time::{SystemTime, UNIX_EPOCH};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use serde_json::{Value, json};

use super::{RegistryDown, agent_pod, agent_restarts, assert_complete, ensure, kill_agent};
use crate::pods::{TestNamespace, WAIT_DEADLINE, is_running};
use crate::test_bed::{NODES, REGISTRY, TestBed, TestError, wait_for};

/// Limits the link of a node to 200 Mbit/s until dropped. An image of 200 MB then takes nine
/// seconds, so there is time for an interruption.
struct SlowLink<'a>(&'a TestBed, &'a str);

impl<'a> SlowLink<'a> {
    fn of(bed: &'a TestBed, node: &'a str) -> Result<Self, TestError> {
        let shape = ["add", "dev", "eth0", "root", "tbf", "rate", "200mbit", "burst", "256kb", "latency", "50ms"];
        bed.ctl(&[&["in", node, "tc", "qdisc"], &shape[..]].concat())?;
        Ok(Self(bed, node))
    }
}

impl Drop for SlowLink<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.ctl(&["in", self.1, "tc", "qdisc", "del", "dev", "eth0", "root"]) {
            eprintln!("{error}");
        }
    }
}

/// Pushes an image of this name, and runs a pod of the image on the provider.
fn provide_image(space: &TestNamespace<'_>, name: &str, layers: &[u32], provider: &str) -> Result<String, TestError> {
    space.bed.push_image(name, layers)?;
    let image = format!("{REGISTRY}/{name}");
    space.pod("provider", provider, &image, true)?;
    space.wait_running("provider")?;
    Ok(image)
}

fn fetched_bytes(bed: &TestBed, node: &str) -> Result<f64, TestError> {
    bed.metric(node, "lighterman_fetched_bytes_total")
}

/// Checks that the node has no image record with missing content. The record is written after the
/// last blob, and may exist already.
fn assert_no_partial_image(bed: &TestBed, node: &str, image: &str) -> Result<(), TestError> {
    let images = bed.ctl(&["ctr", node, "images", "ls", "-q"])?;
    if images.lines().any(|line| line == image) { assert_complete(bed, node, image) } else { Ok(()) }
}

fn assert_no_ingests(bed: &TestBed, node: &str) -> Result<(), TestError> {
    let unfinished = bed.ctl(&["ctr", node, "content", "active"])?;
    ensure(!unfinished.contains("lighterman-"), format!("containerd has an abandoned ingest:\n{unfinished}"))
}

pub(super) fn killed(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-killed")?;
    let (provider, node) = (NODES[2].0, NODES[0].0);
    let image = provide_image(&space, "shop/big:v4", &[96, 96, 32], provider)?;
    let _down = RegistryDown::now(bed)?;
    let _slow = SlowLink::of(bed, provider)?;
    let before = fetched_bytes(bed, node)?;
    space.pod("victim", node, &image, true)?;
    wait_for("40 MB to be fetched", WAIT_DEADLINE, || Ok((fetched_bytes(bed, node)? > before + 40e6).then_some(())))?;
    let restarts = agent_restarts(bed, node)?;
    kill_agent(bed, node)?;
    assert_no_partial_image(bed, node, &image)?;
    wait_for("the agent to be restarted", WAIT_DEADLINE, || Ok((agent_restarts(bed, node)? > restarts).then_some(())))?;
    space.wait_running("victim")?;
    assert_no_ingests(bed, node)?;
    assert_complete(bed, node, &image)
}

/// The number of kills. The agent's pod is deleted after each kill: the kubelet would restart the
/// same pod after longer and longer back-offs.
const KILLS: usize = 4;

pub(super) fn killed_at_random(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-killed-at-random")?;
    let (provider, node) = (NODES[0].0, NODES[1].0);
    let layers = [24, 24, 24, 24, 24];
    let image = provide_image(&space, "shop/unlucky:v1", &layers, provider)?;
    let _down = RegistryDown::now(bed)?;
    let _slow = SlowLink::of(bed, provider)?;
    let seed = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut random = SmallRng::seed_from_u64(seed);
    let size = f64::from(layers.iter().sum::<u32>()) * 1e6;
    let before = fetched_bytes(bed, node)?;
    space.pod("victim", node, &image, true)?;
    let mut kills = 0;
    for round in 0..KILLS {
        // Bytes fetched by this agent. The first agent has fetched other bytes before.
        let threshold = random.random_range(0.0..size) / 2.0 + if round == 0 { before } else { 0.0 };
        let progress = wait_for("the bytes of this round to be fetched", WAIT_DEADLINE, || {
            let runs = is_running(&space.get_pod("victim")?);
            // An agent that is still starting does not answer.
            let bytes = fetched_bytes(bed, node).unwrap_or(0.0);
            Ok((runs || bytes > threshold).then_some((runs, bytes)))
        })?;
        if progress.0 {
            break;
        }
        kill_agent(bed, node)?;
        assert_no_partial_image(bed, node, &image)?;
        kills += 1;
        println!("  killed after {:.0} MB (seed {seed}, round {round})", progress.1 / 1e6);
        let pod = agent_pod(bed, node)?;
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        bed.kubectl(&["-n", "lighterman", "delete", "pod", name, "--force", "--grace-period=0"])?;
        // The kubelet may start the new agent twice: the old agent keeps the ports until its
        // process ends.
        wait_for("another agent", WAIT_DEADLINE, || {
            let is_another = |now: &Value| now["metadata"]["uid"] != pod["metadata"]["uid"];
            let is_ready = |now: &Value| now["status"]["containerStatuses"][0]["ready"] == true;
            Ok(agent_pod(bed, node).is_ok_and(|now| is_another(&now) && is_ready(&now)).then_some(()))
        })?;
    }
    ensure(kills > 0, "the agent was never killed")?;
    space.wait_running("victim")?;
    assert_no_ingests(bed, node)?;
    assert_complete(bed, node, &image)
}

pub(super) fn deleted(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-deleted")?;
    let (provider, node) = (NODES[1].0, NODES[2].0);
    let image = provide_image(&space, "shop/fickle:v1", &[96, 96], provider)?;
    let _down = RegistryDown::now(bed)?;
    let _slow = SlowLink::of(bed, provider)?;
    let abandoned = || bed.metric(node, "lighterman_recoveries_total{outcome=\"abandoned\"}");
    let (bytes, ended) = (fetched_bytes(bed, node)?, abandoned()?);
    space.pod("fickle", node, &image, true)?;
    wait_for("20 MB to be fetched", WAIT_DEADLINE, || Ok((fetched_bytes(bed, node)? > bytes + 20e6).then_some(())))?;
    bed.cluster().delete(&json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "fickle", "namespace": space.name},
    }))?;
    wait_for("the recovery to end with its pod", WAIT_DEADLINE, || Ok((abandoned()? > ended).then_some(())))?;
    assert_no_partial_image(bed, node, &image)?;
    assert_no_ingests(bed, node)?;
    space.pod("steady", node, &image, true)?;
    space.wait_running("steady")?;
    assert_complete(bed, node, &image)
}
