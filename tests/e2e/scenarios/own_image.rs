//! The agents' next image. Once the pod of an agent is deleted, no agent on that node can recover
//! the image.

use std::process::Command;

use serde_json::{Value, json};

use super::{RegistryDown, agent_pod, ensure};
use crate::pods::WAIT_DEADLINE;
use crate::test_bed::{NODES, REGISTRY, TestBed, TestError, output, wait_for};

/// The node into which the next image is imported.
const PROVIDER: &str = NODES[1].0;

/// Makes the next image, with the same program and another layer. Returns the tagged name and the
/// manifest's digest.
fn make_next(bed: &TestBed) -> Result<(String, String), TestError> {
    let program = std::env::var("LIGHTERMAN_BIN").map_err(|_| "LIGHTERMAN_BIN does not name the static binary")?;
    let (name, tar) = (format!("{REGISTRY}/lighterman:next"), bed.folder().join("next.tar"));
    let mut make = Command::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/testbed/mkimage.sh"));
    make.arg(&tar).arg(&name).args(["--gzip", "--random", "4", "--env", "PATH=/", "--entrypoint", "/lighterman"]);
    let authorities = "/etc/ssl/certs/ca-certificates.crt";
    make.arg("--file").arg(format!("{program}:/lighterman"));
    make.arg("--file").arg(format!("{authorities}:{authorities}"));
    let made: Value = serde_json::from_str(&output(&mut make)?).map_err(|error| error.to_string())?;
    let digest = made["manifest"].as_str().ok_or("no manifest")?.to_owned();
    bed.ctl(&["ctr", PROVIDER, "images", "import", "--local", &tar.to_string_lossy()])?;
    Ok((name, digest))
}

/// Sets the image of the DaemonSet's template. With `OnDelete` no pod is replaced before it is
/// deleted.
fn set_template_image(bed: &TestBed, image: &str, strategy: &Value) -> Result<(), TestError> {
    let template = json!({"spec": {"containers": [{"name": "agent", "image": image}]}});
    let patch = json!({"spec": {"updateStrategy": strategy, "template": template}}).to_string();
    bed.kubectl(&["-n", "lighterman", "patch", "daemonset", "lighterman", "--patch", &patch]).map(drop)
}

fn has_image(bed: &TestBed, node: &str, image: &str) -> Result<bool, TestError> {
    Ok(bed.ctl(&["ctr", node, "images", "ls", "-q"])?.lines().any(|line| line == image))
}

/// Whether the image record has CRI's pinned label, which exempts the image from the kubelet's
/// image GC.
fn is_pinned(bed: &TestBed, node: &str, image: &str) -> Result<bool, TestError> {
    let listed = bed.ctl(&["ctr", node, "images", "ls", &format!("name=={image}")])?;
    Ok(listed.contains("io.cri-containerd.pinned=pinned"))
}

/// The line of `lighterman status` that names the next image, or an empty string.
fn status_of(bed: &TestBed, node: &str, image: &str) -> Result<String, TestError> {
    let pod = agent_pod(bed, node)?;
    let name = pod["metadata"]["name"].as_str().unwrap_or_default();
    let status = bed.kubectl(&["-n", "lighterman", "exec", name, "--", "lighterman", "status"])?;
    Ok(status.lines().find(|line| line.contains(&format!("next {image}"))).unwrap_or_default().to_owned())
}

fn uids(bed: &TestBed) -> Result<Vec<Value>, TestError> {
    NODES.iter().map(|(node, _)| Ok(agent_pod(bed, node)?["metadata"]["uid"].clone())).collect()
}

pub(super) fn upgraded_in_an_outage(bed: &TestBed) -> Result<(), TestError> {
    let daemonset = bed.get(&["-n", "lighterman", "daemonset", "lighterman"])?;
    let before = daemonset["spec"]["template"]["spec"]["containers"][0]["image"].as_str().ok_or("no image")?.to_owned();
    let (tag, digest) = make_next(bed)?;
    let next = format!("{REGISTRY}/lighterman@{digest}");
    let down = RegistryDown::now(bed)?;
    let outcome = upgrade(bed, &before, &tag, &next).map_err(|error| format!("{error}\n{}", bed.diagnostics()));
    drop(down);
    let rolling = json!({"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": "100%"}});
    set_template_image(bed, &before, &rolling)?;
    bed.kubectl(&["-n", "lighterman", "rollout", "status", "daemonset/lighterman", "--timeout=120s"])?;
    outcome?;
    for (node, _) in NODES {
        wait_for(&format!("{node} to unpin the image that the template no longer names"), WAIT_DEADLINE, || {
            Ok((!is_pinned(bed, node, &next)? && is_pinned(bed, node, &before)?).then_some(()))
        })?;
    }
    Ok(())
}

fn upgrade(bed: &TestBed, before: &str, tag: &str, next: &str) -> Result<(), TestError> {
    let old_pods = uids(bed)?;
    let on_delete = json!({"type": "OnDelete", "rollingUpdate": null});
    // A tag's digest is decided by the registry, even in an outage.
    set_template_image(bed, tag, &on_delete)?;
    for (node, _) in NODES.iter().filter(|(node, _)| *node != PROVIDER) {
        wait_for(&format!("{node} to report the tag as unresolved"), WAIT_DEADLINE, || {
            let line = status_of(bed, node, tag)?;
            ensure(!has_image(bed, node, tag)?, format!("{node} resolved the tag without the registry"))?;
            Ok(line.contains("did not resolve the tag").then_some(()))
        })?;
    }
    set_template_image(bed, next, &on_delete)?;
    for (node, _) in NODES {
        // The provider has the content only under the tag, and gets the name with the digest from a
        // peer.
        wait_for(&format!("{node} to have the next image"), WAIT_DEADLINE * 2, || {
            Ok(has_image(bed, node, next)?.then_some(()))
        })?;
        wait_for(&format!("{node} to pin both images"), WAIT_DEADLINE, || {
            Ok((is_pinned(bed, node, next)? && is_pinned(bed, node, before)?).then_some(()))
        })?;
        let line = wait_for("the status", WAIT_DEADLINE, || {
            Ok(Some(status_of(bed, node, next)?).filter(|line| line.contains(": fetched")))
        })?;
        println!("  {node}: {}", line.trim());
    }
    ensure(uids(bed)? == old_pods, "a pod was replaced before it was deleted")?;
    for (node, _) in NODES {
        let pod = agent_pod(bed, node)?;
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        bed.kubectl(&["-n", "lighterman", "delete", "pod", name, "--timeout=60s"])?;
        wait_for(&format!("the new agent on {node} to be ready"), WAIT_DEADLINE, || {
            let Ok(pod) = agent_pod(bed, node) else { return Ok(None) };
            let status = &pod["status"]["containerStatuses"][0];
            let is_next = pod["spec"]["containers"][0]["image"] == next;
            Ok((is_next && status["ready"] == true).then_some(()))
        })?;
        println!("  {node}: the new agent is ready");
    }
    Ok(())
}
