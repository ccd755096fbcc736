//! A registry whose packets are dropped, which is worse than refused connections: clients wait for
//! time-outs, and kubelets pull one image after the other.

use std::time::{Duration, Instant};

use super::ensure;
use crate::pods::{TestNamespace, WAIT_DEADLINE, is_running, waiting_reason};
use crate::test_bed::{NODES, REGISTRY, TestBed, TestError, wait_for};

/// A kubelet reports the first failure after one minute and that of the third pod after three
/// (measured).
const DEADLINE_IN_OUTAGE: Duration = Duration::from_secs(300);

/// Drops the registry's packets while this value lives.
struct PacketsDropped<'a>(&'a TestBed);

impl<'a> PacketsDropped<'a> {
    fn now(bed: &'a TestBed) -> Result<Self, TestError> {
        bed.ctl(&["registry", "drop"])?;
        Ok(Self(bed))
    }
}

impl Drop for PacketsDropped<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.ctl(&["registry", "undrop"]) {
            eprintln!("{error}");
        }
    }
}

pub(super) fn dropped_packets(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-outage")?;
    let (provider, node) = (NODES[1].0, NODES[2].0);
    bed.push_image("shop/early:v1", &[8, 8])?;
    let image = format!("{REGISTRY}/shop/early:v1");
    space.pod("provider", provider, &image, true)?;
    space.wait_running("provider")?;
    // The node has an image of the registry, so the agent has contacted the registry while it
    // answered. The registry's silence then decides tags together with the first failed pull.
    bed.push_image("shop/ordinary:v1", &[1])?;
    space.pod("ordinary", node, &format!("{REGISTRY}/shop/ordinary:v1"), true)?;
    space.wait_running("ordinary")?;
    let known_outages = || bed.metric(node, "lighterman_registries_down");
    let before = known_outages()?;

    let _dropped = PacketsDropped::now(bed)?;
    // No node has these images, and the second pod does not opt in.
    space.pod("before-1", node, &format!("{REGISTRY}/nobody/has-this:v1"), true)?;
    space.pod("before-2", node, &format!("{REGISTRY}/nobody/has-that:v1"), false)?;
    let queued = Instant::now();
    wait_for("the outage to be found", DEADLINE_IN_OUTAGE, || {
        let failed = waiting_reason(&space.get_pod("before-1")?).contains("Pull");
        Ok((failed || known_outages()? > before).then_some(()))
    })?;
    println!("\nfigure outage_known_s {:.1}", queued.elapsed().as_secs_f64());

    let recovery_seconds = || bed.metric(node, "lighterman_recovery_seconds_sum");
    let seconds_before = recovery_seconds()?;
    let created = Instant::now();
    space.pod_with_token("wanted", node, &image)?;
    bed.cluster().wait("the wanted pod to run", DEADLINE_IN_OUTAGE, |objects| {
        objects.pod(&space.name, "wanted").filter(|pod| is_running(pod)).map(drop)
    })?;
    let took = created.elapsed().as_secs_f64();
    // The histogram counts a recovery when the recovery ends, which is before the pod runs.
    let recovery_time = recovery_seconds()? - seconds_before;
    println!("figure created_to_running_in_outage_s {:.2}", took - recovery_time);
    println!("  in all {took:.2} s, of which the recovery {recovery_time:.2} s");
    space.wait_recovered("wanted")?;
    ensure(!is_running(&space.get_pod("before-2")?), "a pod runs without opt-in and without a provider")?;
    ensure(space.events("before-2", "ImageNoProvider")?.is_empty(), "an Event on a pod that did not opt in")
}

pub(super) fn sandbox_image(bed: &TestBed) -> Result<(), TestError> {
    const PAUSE: &str = "local.test/pause:1";
    let space = TestNamespace::new(bed, "e2e-sandbox")?;
    let node = NODES[0].0;
    bed.push_image("shop/sandboxed:v1", &[1])?;
    let image = format!("{REGISTRY}/shop/sandboxed:v1");
    space.pod("first", node, &image, true)?;
    space.wait_running("first")?;
    // Removes the image record and the record of CRI's image ID.
    let made = std::fs::read_to_string(bed.folder().join("log/pause.json")).map_err(|error| error.to_string())?;
    let made: serde_json::Value = serde_json::from_str(&made).map_err(|error| error.to_string())?;
    let id = made["config"].as_str().ok_or("the sandbox image has no ID")?;
    bed.ctl(&["ctr", node, "images", "rm", "--sync", PAUSE, id])?;
    let outcome = (|| {
        space.pod("second", node, &image, true)?;
        wait_for("the kubelet to miss the sandbox image", WAIT_DEADLINE, || {
            let failed = !space.events("second", "FailedCreatePodSandBox")?.is_empty();
            Ok((failed || is_running(&space.get_pod("second")?)).then_some(()))
        })?;
        space.wait_running("second")?;
        let note = space.wait_recovered("second")?;
        ensure(note.contains(PAUSE), format!("the Event does not name the sandbox image: {note}"))
    })();
    // Other scenarios need the sandbox image, whatever the outcome.
    let recorded = bed.ctl(&["ctr", node, "images", "ls", "-q"])?;
    if !recorded.lines().any(|line| line == PAUSE) {
        let tar = bed.folder().join("pause.tar");
        bed.ctl(&["ctr", node, "images", "import", &tar.to_string_lossy()])?;
    }
    outcome
}
