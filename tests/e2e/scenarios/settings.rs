//! Changes and commands while agents run: the policy file, a dry run, a manual pull.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{agent_pod, ensure};
use crate::cases::import;
use crate::images::{ImageBuilder, LayerVariant, PLAIN, Recipe};
use crate::pods::{TestNamespace, WAIT_DEADLINE, is_running};
use crate::registries::ScriptedRegistry;
use crate::test_bed::{NODES, TestBed, TestError, wait_for};

/// Makes an image of a registry that refuses connections, and imports the image on the provider.
fn provide_image(bed: &TestBed, name: &str, recipe: Recipe, provider: &str) -> Result<String, TestError> {
    let image = format!("{}/{name}", ScriptedRegistry::Refuses.host());
    let built = ImageBuilder::new(&bed.busybox())?.build(recipe, name);
    import(bed, provider, &[(image.clone(), &built)])?;
    Ok(image)
}

fn write_policy_file(bed: &TestBed, text: &str) -> Result<(), TestError> {
    let agents = bed.get(&["-n", "lighterman", "daemonset", "lighterman"])?;
    let volumes = agents["spec"]["template"]["spec"]["volumes"].as_array().cloned().unwrap_or_default();
    let name = volumes.iter().find_map(|volume| volume["configMap"]["name"].as_str());
    let name = name.ok_or("the agents mount no ConfigMap with the policy file")?;
    bed.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "lighterman"},
        "data": {"policy.yaml": text},
    }))
}

/// Changes an annotation of the agents' pods, so that the kubelets update the ConfigMap on their
/// nodes now. The kubelet's own sync comes every minute or two. A kubelet may still have the old
/// ConfigMap, so callers repeat the call until the change has an effect.
fn sync_agent_pods(bed: &TestBed) -> Result<(), TestError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for (node, _) in NODES {
        let mut pod = agent_pod(bed, node)?;
        (pod["apiVersion"], pod["kind"]) = ("v1".into(), "Pod".into());
        bed.cluster().annotate(&pod, &json!({"e2e/look": now.as_millis().to_string()}))?;
    }
    Ok(())
}

/// Waits until the metric of the policy file has this value on every node.
fn wait_policy_file_valid(bed: &TestBed, what: &str, value: f64) -> Result<(), TestError> {
    wait_for(what, WAIT_DEADLINE, || {
        sync_agent_pods(bed)?;
        let values: Result<Vec<_>, _> =
            NODES.iter().map(|(node, _)| bed.metric(node, "lighterman_policy_file_valid")).collect();
        Ok(values?.iter().all(|now| *now == value).then_some(()))
    })
}

pub(super) fn kill_switch(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-kill-switch")?;
    let (provider, node) = (NODES[1].0, NODES[0].0);
    let image = provide_image(bed, "switch/app:v1", PLAIN, provider)?;
    let counted = || bed.metric(node, "lighterman_image_pull_failures_total{verdict=\"kill_switch\"}");
    let before = counted()?;
    write_policy_file(bed, "killSwitch: true\n")?;
    let outcome = (|| {
        // Until the kill switch is in force, pods are recovered: each try makes another pod.
        let mut tries = 0;
        wait_for("the kill switch to be in force", WAIT_DEADLINE, || {
            tries += 1;
            sync_agent_pods(bed)?;
            let probe = format!("probe-{tries}");
            space.pod(&probe, node, &format!("{}/nobody/{probe}:v1", ScriptedRegistry::Refuses.host()), true)?;
            space.wait_failing(&probe)?;
            // The agent checks the policy file every two seconds.
            std::thread::sleep(Duration::from_secs(2));
            Ok((counted()? > before).then_some(()))
        })?;
        space.pod("waits", node, &image, true)?;
        let seen = counted()?;
        space.wait_failing("waits")?;
        wait_for("the agent to handle the pod", WAIT_DEADLINE, || Ok((counted()? > seen).then_some(())))?;
        // An invalid file does not change the policy in force.
        write_policy_file(bed, "killSwitch: maybe\n")?;
        wait_policy_file_valid(bed, "the invalid policy file to be rejected", 0.0)?;
        ensure(!is_running(&space.get_pod("waits")?), "the pod was recovered although the kill switch is on")
    })();
    write_policy_file(bed, "killSwitch: false\n")?;
    outcome?;
    wait_policy_file_valid(bed, "the valid policy file to be in force", 1.0)?;
    space.wait_running("waits").map(drop)
}

/// Sets a variable of the agents, and waits for the end of the rollout.
fn set_agents(bed: &TestBed, variable: &str) -> Result<(), TestError> {
    bed.kubectl(&["-n", "lighterman", "set", "env", "daemonset/lighterman", variable])?;
    bed.kubectl(&["-n", "lighterman", "rollout", "status", "daemonset/lighterman", "--timeout=120s"]).map(drop)
}

pub(super) fn dry_run(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-dry-run")?;
    let (provider, node) = (NODES[2].0, NODES[1].0);
    let image = provide_image(bed, "dry/app:v1", PLAIN, provider)?;
    set_agents(bed, "LIGHTERMAN_DRY_RUN=true")?;
    let outcome = (|| {
        space.pod("dry", node, &image, true)?;
        let note = wait_for("an Event with the plan of the recovery", WAIT_DEADLINE, || {
            Ok(space.events("dry", "ImageRecoveryDryRun")?.into_iter().next())
        })?;
        println!("  {note}");
        ensure(note.contains(provider), format!("the Event does not name the provider: {note}"))?;
        let images = bed.ctl(&["ctr", node, "images", "ls", "-q"])?;
        ensure(!images.contains("dry/app"), "the image was fetched in a dry run")?;
        ensure(bed.metric(node, "lighterman_fetched_bytes_total")? < 1e5, "more than a manifest was fetched")
    })();
    set_agents(bed, "LIGHTERMAN_DRY_RUN-")?;
    outcome?;
    space.wait_running("dry").map(drop)
}

/// Runs `lighterman pull` on the node, and returns the output.
pub(super) fn pull(bed: &TestBed, node: &str, image: &str) -> Result<String, TestError> {
    let pod = agent_pod(bed, node)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let pull = ["-n", "lighterman", "exec", name, "--", "lighterman", "pull", image];
    // The provider may not have announced the image yet.
    let text = wait_for("the manual pull to succeed", WAIT_DEADLINE, || Ok(bed.kubectl(&pull).ok()));
    let text = text.map_err(|error| format!("{error}\n{:?}", bed.kubectl(&pull)))?;
    print!("{text}");
    Ok(text)
}

/// An image that consists of a config cannot run, so no pod uses the image.
pub(super) fn manual_pull(bed: &TestBed) -> Result<(), TestError> {
    let (provider, node) = (NODES[0].0, NODES[2].0);
    let image = provide_image(bed, "hand/config-only:v1", Recipe { layer: LayerVariant::None, ..PLAIN }, provider)?;
    pull(bed, node, &image)?;
    let pod = agent_pod(bed, node)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let recorded = bed.ctl(&["ctr", node, "images", "ls", "-q"])?;
    ensure(recorded.lines().any(|line| line == image), format!("the image has no record:\n{recorded}"))?;
    let wrong = bed.kubectl(&["-n", "lighterman", "exec", name, "--", "lighterman", "pull", "a b"]);
    ensure(wrong.is_err(), "an invalid image name was accepted")
}

/// Checks that the agent unpacks a recovered image. The snapshots exist before the first container,
/// under the chain IDs that CRI uses, and the container adds no committed snapshot.
pub(super) fn unpacked(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-unpacked")?;
    for (number, (node, _)) in NODES.iter().enumerate() {
        let (provider, _) = NODES[(number + 1) % NODES.len()];
        let image = provide_image(bed, &format!("hand/unpacked-{node}:v1"), PLAIN, provider)?;
        let text = pull(bed, node, &image)?;
        ensure(text.contains("unpacking layer "), format!("nothing was unpacked on {node}:\n{text}"))?;
        let checked = bed.ctl(&["ctr", node, "images", "check", &format!("name=={image}")])?;
        let is_unpacked = checked.lines().any(|line| line.starts_with(&image) && line.trim_end().ends_with("true"));
        ensure(is_unpacked, format!("on {node} the image was not unpacked by the pull:\n{checked}"))?;
        let before = bed.ctl(&["ctr", node, "snapshots", "ls"])?;
        space.pod(&format!("on-{node}"), node, &image, true)?;
        space.wait_running(&format!("on-{node}"))?;
        let after = bed.ctl(&["ctr", node, "snapshots", "ls"])?;
        let committed = |listed: &str| listed.lines().filter(|line| line.trim_end().ends_with("Committed")).count();
        // The sandbox image is unpacked since the agent's own pod was made.
        ensure(committed(&before) == committed(&after), format!("{node} unpacked layers again:\n{before}\n{after}"))?;
    }
    Ok(())
}
