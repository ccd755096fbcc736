//! An outage of the registry, the API server and DNS. Only the nodes run. The kubelets keep their
//! pods running, and the agents use the peers that they already have.

use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::{RegistryDown, agent_pod, ensure};
use crate::cases::import;
use crate::images::{Image, ImageBuilder, PLAIN};
use crate::pods::{TestNamespace, WAIT_DEADLINE};
use crate::test_bed::{NODES, REGISTRY, TestBed, TestError, wait_for};

/// Deadline without a nudge, which needs the API server. The kubelet itself retries a pod that
/// waits for an image after at most a minute and a half.
const DEADLINE_WITHOUT_NUDGE: Duration = Duration::from_secs(300);

/// Covers the agents' interval of half a minute between writes of the peers file.
const STATE_FILE_INTERVAL: Duration = Duration::from_secs(35);

/// Stops the API server and DNS until dropped.
struct ControlPlaneDown<'a>(&'a TestBed);

impl<'a> ControlPlaneDown<'a> {
    fn now(bed: &'a TestBed) -> Result<Self, TestError> {
        let outage = Self(bed);
        bed.ctl(&["dns", "stop"])?;
        bed.ctl(&["apiserver", "stop"])?;
        ensure(bed.kubectl(&["get", "--raw", "/readyz"]).is_err(), "the API server still answers")?;
        Ok(outage)
    }
}

impl Drop for ControlPlaneDown<'_> {
    fn drop(&mut self) {
        let all_ready = ["wait", "--for=condition=Ready", "nodes", "--all", "--timeout=120s"];
        let started = self.0.ctl(&["apiserver", "start"]).and_then(|_| self.0.ctl(&["dns", "start"]));
        if let Err(error) = started.and_then(|_| self.0.kubectl(&all_ready)) {
            eprintln!("{error}");
        }
    }
}

/// Makes an image that no node has, and a pod on this node. Waits until the agent has handled the
/// pod.
fn pod_waiting_for_image(space: &TestNamespace<'_>, name: &str, node: &str) -> Result<(String, Image), TestError> {
    let image = format!("{REGISTRY}/{name}");
    let built = ImageBuilder::new(&space.bed.busybox())?.build(PLAIN, name);
    space.pod("waits", node, &image, true)?;
    wait_for("the agent to report that no peer has the image", WAIT_DEADLINE, || {
        Ok((!space.events("waits", "ImageNoProvider")?.is_empty()).then_some(()))
    })?;
    Ok((image, built))
}

/// The running container of this name, by the node's containerd, in a pod whose name begins with
/// `pod`.
fn container(bed: &TestBed, node: &str, pod: &str, name: &str) -> Result<Option<String>, TestError> {
    let label = |key: &str, value: &str, how: &str| format!("labels.\"{key}\"{how}{value}");
    let filter = [
        label("io.cri-containerd.kind", "container", "=="),
        label("io.kubernetes.pod.name", pod, "~="),
        label("io.kubernetes.container.name", name, "=="),
    ];
    let listed = bed.ctl(&["ctr", node, "containers", "ls", "-q", &filter.join(",")])?;
    let tasks = bed.ctl(&["ctr", node, "tasks", "ls"])?;
    let runs = |id: &&str| tasks.lines().any(|line| line.starts_with(*id) && line.contains("RUNNING"));
    Ok(listed.lines().find(runs).map(str::to_owned))
}

/// The agent's container on a node, found without the API server.
fn agent_container(bed: &TestBed, node: &str) -> Result<Option<String>, TestError> {
    container(bed, node, "lighterman", "agent")
}

pub(super) fn recovered(bed: &TestBed) -> Result<(), TestError> {
    let (provider, node) = (NODES[1].0, NODES[2].0);
    let space = TestNamespace::new(bed, "e2e-cut-off")?;
    let _down = RegistryDown::now(bed)?;
    let (image, built) = pod_waiting_for_image(&space, "shop/alone:v1", node)?;
    let agents = (agent_container(bed, provider)?, agent_container(bed, node)?);
    let outage = ControlPlaneDown::now(bed)?;
    import(bed, provider, &[(image.clone(), &built)])?;
    let began = Instant::now();
    let images = || bed.ctl(&["ctr", node, "images", "ls", "-q"]);
    wait_for("the image to be recovered", WAIT_DEADLINE, || {
        Ok(images()?.lines().any(|line| line == image).then_some(()))
    })?;
    println!("\nfigure image_recovered_cut_off_s {:.2}", began.elapsed().as_secs_f64());
    wait_for("the pod's container to run", DEADLINE_WITHOUT_NUDGE, || container(bed, node, "waits", "c"))?;
    println!("figure container_running_cut_off_s {:.2}", began.elapsed().as_secs_f64());
    ensure(agents == (agent_container(bed, provider)?, agent_container(bed, node)?), "an agent was restarted")?;
    drop(outage);
    space.wait_running("waits").map(drop)
}

/// Waits until two agents are connected to each other. Waits also until each has written the files
/// by which a restarted agent finds and admits the other.
fn wait_connected(bed: &TestBed, one: &str, other: &str) -> Result<(), TestError> {
    for (node, other) in [(one, other), (other, one)] {
        wait_for(&format!("the agent on {node} to be connected to the agent on {other}"), WAIT_DEADLINE, || {
            let pod = agent_pod(bed, node)?;
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            // The agent may still be starting.
            let exec = bed.kubectl(&["-n", "lighterman", "exec", name, "--", "lighterman", "status", "--json"]);
            let Ok(text) = exec else { return Ok(None) };
            let status: Value = serde_json::from_str(&text).map_err(|error| format!("{error}: {text}"))?;
            let members = status["mesh"]["members"].as_array().cloned().unwrap_or_default();
            let is_connected = |member: &Value| member["node"] == other && member["neighbor"] == true;
            Ok(members.iter().any(is_connected).then_some(()))
        })?;
    }
    thread::sleep(STATE_FILE_INTERVAL);
    Ok(())
}

/// A restarted agent gets its pods only from the API server, so the test requests the image by
/// `lighterman pull`.
pub(super) fn restarted(bed: &TestBed) -> Result<(), TestError> {
    let (provider, node) = (NODES[0].0, NODES[1].0);
    let space = TestNamespace::new(bed, "e2e-cut-off-restarted")?;
    let _down = RegistryDown::now(bed)?;
    let (image, built) = pod_waiting_for_image(&space, "shop/alone:v2", node)?;
    wait_connected(bed, provider, node)?;
    let outage = ControlPlaneDown::now(bed)?;
    for node in [provider, node] {
        let before = agent_container(bed, node)?.ok_or("there is no agent")?;
        bed.ctl(&["ctr", node, "tasks", "kill", "--signal", "SIGKILL", &before])?;
        wait_for("the kubelet to restart the agent", WAIT_DEADLINE, || {
            Ok(agent_container(bed, node)?.filter(|now| *now != before).map(drop))
        })?;
    }
    import(bed, provider, &[(image.clone(), &built)])?;
    // A folder that the node and the test share: a node has a `/run` of its own.
    let fifos = bed.folder().to_string_lossy();
    let (mut attempts, mut last_error) = (0, TestError::new());
    let pulled = wait_for("the manual pull to succeed", WAIT_DEADLINE, || {
        let Some(agent) = agent_container(bed, node)? else { return Ok(None) };
        attempts += 1;
        let id = format!("pull-{attempts}");
        let pull = ["tasks", "exec", "--fifo-dir", &fifos, "--exec-id", &id, &agent, "/lighterman", "pull", &image];
        // The agent may not serve yet, or may lack the announcement of the provider.
        let text = bed.ctl(&[&["ctr", node], &pull[..]].concat());
        Ok(text.map_err(|error| last_error = error).ok())
    });
    let text = pulled.map_err(|error| format!("{error}\n{last_error}"))?;
    print!("{text}");
    wait_for("the pod's container to run", DEADLINE_WITHOUT_NUDGE, || container(bed, node, "waits", "c"))?;
    drop(outage);
    space.wait_running("waits").map(drop)
}
