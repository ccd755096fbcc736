//! Everything that is not a node is gone: the registry, the API server, DNS. The kubelets go on with the pods that they know, and the
//! agents with the peers that they know.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{RegistryDown, agent_pod, ensure};
use crate::bed::{Bed, Failure, NODES, REGISTRY, wait_for};
use crate::cases::import;
use crate::images::{Image, Maker, PLAIN};
use crate::pods::{PATIENCE, Space};

/// Nobody can nudge the kubelet now: it looks at a pod that waits for an image after a minute and a half at most.
const PATIENCE_WITHOUT_NUDGE: Duration = Duration::from_secs(300);

/// An agent writes down whom it knows each half minute.
const WRITTEN: Duration = Duration::from_secs(35);

/// No API server and no DNS while it lives.
struct CutOff<'a>(&'a Bed);

impl<'a> CutOff<'a> {
    fn now(bed: &'a Bed) -> Result<Self, Failure> {
        let cut_off = Self(bed);
        bed.ctl(&["dns", "stop"])?;
        bed.ctl(&["apiserver", "stop"])?;
        ensure(bed.kubectl(&["get", "--raw", "/readyz"]).is_err(), "the API server still answers")?;
        Ok(cut_off)
    }
}

impl Drop for CutOff<'_> {
    fn drop(&mut self) {
        let all_ready = ["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=120s"];
        let started = self.0.ctl(&["apiserver", "start"]).and_then(|_| self.0.ctl(&["dns", "start"]));
        if let Err(error) = started.and_then(|_| self.0.kubectl(&all_ready)) {
            eprintln!("{error}");
        }
    }
}

/// An image that nobody has yet, and a pod on this node that waits for it with the agent's knowledge.
fn awaited(space: &Space<'_>, name: &str, node: &str) -> Result<(String, Image), Failure> {
    let image = format!("{REGISTRY}/{name}");
    let made = Maker::new(&space.bed.busybox())?.make(PLAIN, name);
    space.pod("waits", node, &image, true)?;
    wait_for("the agent to say that nobody has the image", PATIENCE, || {
        Ok((!space.events("waits", "ImageNoProvider")?.is_empty()).then_some(()))
    })?;
    Ok((image, made))
}

/// The running container of this name in pods of this name's beginning, as the node's containerd knows it.
fn container(bed: &Bed, node: &str, pod: &str, name: &str) -> Result<Option<String>, Failure> {
    let label = |key: &str, value: &str, how: &str| format!("labels.\"{key}\"{how}{value}");
    let filter = [
        label("io.cri-containerd.kind", "container", "=="),
        label("io.kubernetes.pod.name", pod, "~="),
        label("io.kubernetes.container.name", name, "=="),
    ];
    let known = bed.ctl(&["ctr", node, "containers", "ls", "-q", &filter.join(",")])?;
    let tasks = bed.ctl(&["ctr", node, "tasks", "ls"])?;
    let runs = |id: &&str| tasks.lines().any(|line| line.starts_with(*id) && line.contains("RUNNING"));
    Ok(known.lines().find(runs).map(str::to_owned))
}

/// The agent of a node, which the API server need not be asked for.
fn agent(bed: &Bed, node: &str) -> Result<Option<String>, Failure> {
    container(bed, node, "lighterman", "agent")
}

pub(super) fn recovered(bed: &Bed) -> Result<(), Failure> {
    let (holder, node) = (NODES[1].0, NODES[2].0);
    let space = Space::new(bed, "e2e-cut-off")?;
    let _down = RegistryDown::now(bed)?;
    let (image, made) = awaited(&space, "shop/alone:v1", node)?;
    let agents = (agent(bed, holder)?, agent(bed, node)?);
    let cut_off = CutOff::now(bed)?;
    import(bed, holder, &[(image.clone(), &made)])?;
    let began = Instant::now();
    let images = || bed.ctl(&["ctr", node, "images", "ls", "-q"]);
    wait_for("the image to come", PATIENCE, || Ok(images()?.lines().any(|line| line == image).then_some(())))?;
    println!("\nfigure image_recovered_cut_off_s {:.2}", began.elapsed().as_secs_f64());
    wait_for("the pod's container to run", PATIENCE_WITHOUT_NUDGE, || container(bed, node, "waits", "c"))?;
    println!("figure container_running_cut_off_s {:.2}", began.elapsed().as_secs_f64());
    ensure(agents == (agent(bed, holder)?, agent(bed, node)?), "an agent was started again")?;
    drop(cut_off);
    space.wait_running("waits").map(drop)
}

/// Two agents know each other, and each has what it needs to find and convince the other after a restart.
fn acquainted(bed: &Bed, one: &str, other: &str) -> Result<(), Failure> {
    for (node, other) in [(one, other), (other, one)] {
        wait_for(&format!("the agent on {node} to know the one on {other}"), PATIENCE, || {
            let pod = agent_pod(bed, node)?;
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            // The agent may be starting.
            let asked = bed.kubectl(&["-n", "lighterman", "exec", name, "--", "lighterman", "status", "--json"]);
            let Ok(said) = asked else { return Ok(None) };
            let status: Value = serde_json::from_str(&said).map_err(|error| format!("{error}: {said}"))?;
            let members = status["mesh"]["members"].as_array().cloned().unwrap_or_default();
            let is_met = |member: &Value| member["node"] == other && member["neighbour"] == true;
            Ok(members.iter().any(is_met).then_some(()))
        })?;
    }
    thread::sleep(WRITTEN);
    Ok(())
}

/// Which pods there are a restarted agent learns from the API server alone, so a person asks for the image.
pub(super) fn restarted(bed: &Bed) -> Result<(), Failure> {
    let (holder, node) = (NODES[0].0, NODES[1].0);
    let space = Space::new(bed, "e2e-cut-off-restarted")?;
    let _down = RegistryDown::now(bed)?;
    let (image, made) = awaited(&space, "shop/alone:v2", node)?;
    acquainted(bed, holder, node)?;
    let cut_off = CutOff::now(bed)?;
    for node in [holder, node] {
        let before = agent(bed, node)?.ok_or("there is no agent")?;
        bed.ctl(&["ctr", node, "tasks", "kill", "--signal", "SIGKILL", &before])?;
        wait_for("the kubelet to start the agent again", PATIENCE, || {
            Ok(agent(bed, node)?.filter(|now| *now != before).map(drop))
        })?;
    }
    import(bed, holder, &[(image.clone(), &made)])?;
    // Where both see it: a node has a /run of its own.
    let fifos = bed.folder().to_string_lossy();
    let (mut asked, mut refused) = (0, Failure::new());
    let had = wait_for("the image to be had", PATIENCE, || {
        let Some(agent) = agent(bed, node)? else { return Ok(None) };
        asked += 1;
        let id = format!("pull-{asked}");
        let pull = ["tasks", "exec", "--fifo-dir", &fifos, "--exec-id", &id, &agent, "/lighterman", "pull", &image];
        // The agent may not serve yet, or not know the holder yet.
        let said = bed.ctl(&[&["ctr", node], &pull[..]].concat());
        Ok(said.map_err(|error| refused = error).ok())
    });
    let said = had.map_err(|error| format!("{error}\n{refused}"))?;
    print!("{said}");
    wait_for("the pod's container to run", PATIENCE_WITHOUT_NUDGE, || container(bed, node, "waits", "c"))?;
    drop(cut_off);
    space.wait_running("waits").map(drop)
}
