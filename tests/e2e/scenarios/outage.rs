//! A registry whose packets vanish, which is worse than one that refuses: clients wait for their time-outs, and kubelets pull one image
//! after the other.

use std::time::{Duration, Instant};

use super::ensure;
use crate::bed::{Bed, Failure, NODES, REGISTRY, wait_for};
use crate::pods::{PATIENCE, Space, is_running, waiting_reason};

/// A kubelet reports the first failure after a minute and the third pod's after three (measured).
const PATIENCE_IN_OUTAGE: Duration = Duration::from_secs(300);

/// Lets the registry's packets vanish while it lives.
struct PacketsVanish<'a>(&'a Bed);

impl<'a> PacketsVanish<'a> {
    fn now(bed: &'a Bed) -> Result<Self, Failure> {
        bed.ctl(&["registry", "drop"])?;
        Ok(Self(bed))
    }
}

impl Drop for PacketsVanish<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.ctl(&["registry", "undrop"]) {
            eprintln!("{error}");
        }
    }
}

pub(super) fn packets_vanish(bed: &Bed) -> Result<(), Failure> {
    let space = Space::new(bed, "e2e-outage")?;
    let (holder, node) = (NODES[1].0, NODES[2].0);
    bed.push_image("shop/early:v1", &[8, 8])?;
    let image = format!("{REGISTRY}/shop/early:v1");
    space.pod("holder", holder, &image, true)?;
    space.wait_running("holder")?;
    // An image of the registry is here, so the agent has asked the registry while it answered: its
    // silence then decides tags together with the first failed pull.
    bed.push_image("shop/ordinary:v1", &[1])?;
    space.pod("ordinary", node, &format!("{REGISTRY}/shop/ordinary:v1"), true)?;
    space.wait_running("ordinary")?;
    let known_outages = || bed.metric(node, "lighterman_registries_down");
    let before = known_outages()?;

    let _vanish = PacketsVanish::now(bed)?;
    // Nobody has these; one of them is none of our business.
    space.pod("before-1", node, &format!("{REGISTRY}/nobody/has-this:v1"), true)?;
    space.pod("before-2", node, &format!("{REGISTRY}/nobody/has-that:v1"), false)?;
    let queued = Instant::now();
    wait_for("the outage to be known", PATIENCE_IN_OUTAGE, || {
        let failed = waiting_reason(&space.get_pod("before-1")?).contains("Pull");
        Ok((failed || known_outages()? > before).then_some(()))
    })?;
    println!("\nfigure outage_known_s {:.1}", queued.elapsed().as_secs_f64());

    let transfer = || bed.metric(node, "lighterman_recovery_seconds_sum");
    let moved_before = transfer()?;
    let created = Instant::now();
    space.usual_pod("wanted", node, &image)?;
    bed.cluster().wait("the wanted pod to run", PATIENCE_IN_OUTAGE, |objects| {
        objects.pod(&space.name, "wanted").filter(|pod| is_running(pod)).map(drop)
    })?;
    let took = created.elapsed().as_secs_f64();
    // The histogram counts a recovery when it has ended, which is before the pod runs.
    let moving = transfer()? - moved_before;
    println!("figure created_to_running_in_outage_s {:.2}", took - moving);
    println!("  in all {took:.2} s, of which the recovery {moving:.2} s");
    space.wait_salvaged("wanted")?;
    ensure(!is_running(&space.get_pod("before-2")?), "a pod runs whose image nobody has")?;
    ensure(space.events("before-2", "ImageNoProvider")?.is_empty(), "an Event on a pod that did not opt in")
}

pub(super) fn sandbox_image(bed: &Bed) -> Result<(), Failure> {
    const PAUSE: &str = "local.test/pause:1";
    let space = Space::new(bed, "e2e-sandbox")?;
    let node = NODES[0].0;
    bed.push_image("shop/sandboxed:v1", &[1])?;
    let image = format!("{REGISTRY}/shop/sandboxed:v1");
    space.pod("first", node, &image, true)?;
    space.wait_running("first")?;
    // The image, and the ID under which CRI knows it too.
    let made = std::fs::read_to_string(bed.folder().join("log/pause.json")).map_err(|error| error.to_string())?;
    let made: serde_json::Value = serde_json::from_str(&made).map_err(|error| error.to_string())?;
    let id = made["config"].as_str().ok_or("the sandbox image has no ID")?;
    bed.ctl(&["ctr", node, "images", "rm", "--sync", PAUSE, id])?;
    let outcome = (|| {
        space.pod("second", node, &image, true)?;
        wait_for("the kubelet to miss the sandbox image", PATIENCE, || {
            let failed = !space.events("second", "FailedCreatePodSandBox")?.is_empty();
            Ok((failed || is_running(&space.get_pod("second")?)).then_some(()))
        })?;
        space.wait_running("second")?;
        let note = space.wait_salvaged("second")?;
        ensure(note.contains(PAUSE), format!("the Event does not name the sandbox image: {note}"))
    })();
    // Others need it, however this ended.
    let recorded = bed.ctl(&["ctr", node, "images", "ls", "-q"])?;
    if !recorded.lines().any(|line| line == PAUSE) {
        let tar = bed.folder().join("pause.tar");
        bed.ctl(&["ctr", node, "images", "import", &tar.to_string_lossy()])?;
    }
    outcome
}
