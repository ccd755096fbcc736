//! What people change or do while agents run: the rules file, a dry run, a pull by hand.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::json;

use super::{agent_pod, ensure};
use crate::cases::import;
use crate::images::{ImageBuilder, LayerVariant, PLAIN, Recipe};
use crate::pods::{TestNamespace, WAIT_DEADLINE, is_running};
use crate::registries::ScriptedRegistry;
use crate::test_bed::{NODES, TestBed, TestError, wait_for};

/// An image in a registry that refuses, held by one node.
fn provide_image(bed: &TestBed, name: &str, recipe: Recipe, provider: &str) -> Result<String, TestError> {
    let image = format!("{}/{name}", ScriptedRegistry::Refuses.host());
    let made = ImageBuilder::new(&bed.busybox())?.build(recipe, name);
    import(bed, provider, &[(image.clone(), &made)])?;
    Ok(image)
}

/// Writes the rules file.
fn write_policy_file(bed: &TestBed, text: &str) -> Result<(), TestError> {
    let agents = bed.get(&["-n", "lighterman", "daemonset", "lighterman"])?;
    let volumes = agents["spec"]["template"]["spec"]["volumes"].as_array().cloned().unwrap_or_default();
    let name = volumes.iter().find_map(|volume| volume["configMap"]["name"].as_str());
    let name = name.ok_or("the agents mount no ConfigMap with rules")?;
    bed.apply(&json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "lighterman"},
        "data": {"policy.yaml": text},
    }))
}

/// Makes the kubelets bring a changed ConfigMap to their nodes now, which they do when they look at the pod, every minute or two. They may
/// not know of the change yet: called until it has had its effect.
fn sync_agent_pods(bed: &TestBed) -> Result<(), TestError> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    for (node, _) in NODES {
        let mut pod = agent_pod(bed, node)?;
        (pod["apiVersion"], pod["kind"]) = ("v1".into(), "Pod".into());
        bed.cluster().annotate(&pod, &json!({"e2e/look": now.as_millis().to_string()}))?;
    }
    Ok(())
}

/// Waits until every agent says whether its rules file is right.
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
        // Until it is in force, pods are helped: each try is another pod.
        let mut tries = 0;
        wait_for("the kill switch to be in force", WAIT_DEADLINE, || {
            tries += 1;
            sync_agent_pods(bed)?;
            let probe = format!("probe-{tries}");
            space.pod(&probe, node, &format!("{}/nobody/{probe}:v1", ScriptedRegistry::Refuses.host()), true)?;
            space.wait_failing(&probe)?;
            // The agent looks at the file every two seconds.
            std::thread::sleep(Duration::from_secs(2));
            Ok((counted()? > before).then_some(()))
        })?;
        space.pod("waits", node, &image, true)?;
        let seen = counted()?;
        space.wait_failing("waits")?;
        wait_for("the agent to have looked at it", WAIT_DEADLINE, || Ok((counted()? > seen).then_some(())))?;
        // A file that is wrong changes nothing.
        write_policy_file(bed, "killSwitch: maybe\n")?;
        wait_policy_file_valid(bed, "the wrong file to be refused", 0.0)?;
        ensure(!is_running(&space.get_pod("waits")?), "it was helped although the kill switch is on")
    })();
    write_policy_file(bed, "killSwitch: false\n")?;
    outcome?;
    wait_policy_file_valid(bed, "the right file to be in force", 1.0)?;
    space.wait_running("waits").map(drop)
}

/// Sets variables of the agents and waits until all of them have them.
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
        let note = wait_for("an Event that says what would be done", WAIT_DEADLINE, || {
            Ok(space.events("dry", "ImageRecoveryDryRun")?.into_iter().next())
        })?;
        println!("  {note}");
        ensure(note.contains(provider), format!("it does not say where the image could come from: {note}"))?;
        let images = bed.ctl(&["ctr", node, "images", "ls", "-q"])?;
        ensure(!images.contains("dry/app"), "the image was brought all the same")?;
        ensure(bed.metric(node, "lighterman_fetched_bytes_total")? < 1e5, "more than a manifest was fetched")
    })();
    set_agents(bed, "LIGHTERMAN_DRY_RUN-")?;
    outcome?;
    space.wait_running("dry").map(drop)
}

/// Has the node's agent pull the image, and answers what it said.
pub(super) fn pull(bed: &TestBed, node: &str, image: &str) -> Result<String, TestError> {
    let pod = agent_pod(bed, node)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let pull = ["-n", "lighterman", "exec", name, "--", "lighterman", "pull", image];
    // The provider may not have told of it yet.
    let said = wait_for("the image to be had", WAIT_DEADLINE, || Ok(bed.kubectl(&pull).ok()));
    let said = said.map_err(|error| format!("{error}\n{:?}", bed.kubectl(&pull)))?;
    print!("{said}");
    Ok(said)
}

/// An image of a configuration alone cannot run, so no pod asks for it.
pub(super) fn manual_pull(bed: &TestBed) -> Result<(), TestError> {
    let (provider, node) = (NODES[0].0, NODES[2].0);
    let image = provide_image(bed, "hand/config-only:v1", Recipe { layer: LayerVariant::None, ..PLAIN }, provider)?;
    pull(bed, node, &image)?;
    let pod = agent_pod(bed, node)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let recorded = bed.ctl(&["ctr", node, "images", "ls", "-q"])?;
    ensure(recorded.lines().any(|line| line == image), format!("it is not recorded:\n{recorded}"))?;
    let wrong = bed.kubectl(&["-n", "lighterman", "exec", name, "--", "lighterman", "pull", "a b"]);
    ensure(wrong.is_err(), "a name that is none was accepted")
}

/// Before any container is made of it, its layers are there under the name that the configuration's label keeps, and the container is made on top of
/// them.
pub(super) fn unpacked(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-unpacked")?;
    for (number, (node, _)) in NODES.iter().enumerate() {
        let (provider, _) = NODES[(number + 1) % NODES.len()];
        let image = provide_image(bed, &format!("hand/unpacked-{node}:v1"), PLAIN, provider)?;
        let said = pull(bed, node, &image)?;
        ensure(said.contains("unpacking layer "), format!("nothing was unpacked on {node}:\n{said}"))?;
        let checked = bed.ctl(&["ctr", node, "images", "check", &format!("name=={image}")])?;
        let is_unpacked = checked.lines().any(|line| line.starts_with(&image) && line.trim_end().ends_with("true"));
        ensure(is_unpacked, format!("on {node} it is not unpacked before it is used:\n{checked}"))?;
        let before = bed.ctl(&["ctr", node, "snapshots", "ls"])?;
        space.pod(&format!("on-{node}"), node, &image, true)?;
        space.wait_running(&format!("on-{node}"))?;
        let after = bed.ctl(&["ctr", node, "snapshots", "ls"])?;
        let committed = |listed: &str| listed.lines().filter(|line| line.trim_end().ends_with("Committed")).count();
        // The image of the pod's sandbox is there since the agent's own pod was made.
        ensure(committed(&before) == committed(&after), format!("{node} unpacked more:\n{before}\n{after}"))?;
    }
    Ok(())
}
