//! Registries that stall, on nodes of their own: a stalled pull blocks the node's later pulls.
//!
//! Both nodes use the agents' default of two minutes. On the first node the agent ends stalled
//! pulls. On the second node containerd ends them, and `image_pull_progress_timeout` is 150 s there
//! to save time. `LIGHTERMAN_DEFAULT_PULL_TIMEOUT=1` keeps the default of 5 minutes.
//! `LIGHTERMAN_STALLED_CONTAINERDS` names other versions for both nodes (`1.7,2.4`).

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::cases::import;
use crate::images::{Image, ImageBuilder, PLAIN};
use crate::pods::{TestNamespace, is_running};
use crate::registries::ScriptedRegistry;
use crate::test_bed::{NODES, TestBed, TestError, wait_for};

type StallCase = fn(&TestBed) -> Result<(), TestError>;

/// All stall rows by name.
pub(crate) const ALL: &[(&str, StallCase)] = &[
    ("case::stalled_pulls_are_ended_by_the_setting_and_a_crawling_pull_continues", ended),
    ("case::a_stalled_pull_is_reported_once_and_its_pod_runs_when_containerd_ends_it", reported),
];

/// The node whose agent ends stalled pulls.
pub(crate) const ENDING: &str = "ending";

/// The node where only containerd ends stalled pulls.
const WAITING: &str = "waiting";

/// Parallel pulls of the first node: three that stall, and the pull that crawls.
pub(crate) const PARALLEL: usize = 4;

/// Covers containerd's default timeout, a retry of the kubelet, and a slow machine.
const WAIT_DEADLINE: Duration = Duration::from_secs(480);

/// The nodes and their containerd versions.
pub(crate) fn nodes() -> [(&'static str, String); 2] {
    let set = std::env::var("LIGHTERMAN_STALLED_CONTAINERDS").unwrap_or_else(|_| "2.3,1.7".into());
    let (first, second) = set.split_once(',').unwrap_or((&set, &set));
    [(ENDING, first.to_owned()), (WAITING, second.to_owned())]
}

/// containerd's timeout, in the form of a variable of `up.sh`.
pub(crate) fn pull_timeout() -> String {
    match std::env::var_os("LIGHTERMAN_DEFAULT_PULL_TIMEOUT") {
        Some(_) => String::new(),
        None => format!("{WAITING}=150s"),
    }
}

/// One image of a row.
struct Pull<'a> {
    space: &'a TestNamespace<'a>,
    name: &'static str,
    image: Image,
    reference: String,
}

impl<'a> Pull<'a> {
    /// Publishes an image, and imports the image on the provider if one is given.
    fn new(
        space: &'a TestNamespace<'a>,
        name: &'static str,
        (registry, path): (ScriptedRegistry, &str),
        provider: Option<&str>,
    ) -> Result<Self, TestError> {
        let image = ImageBuilder::new(&space.bed.busybox())?.build(PLAIN, &format!("{}-{name}", space.name));
        let repository = format!("{path}/{}", space.name);
        space.bed.registries().publish(&format!("{repository}:v1"), &image);
        let reference = format!("{}/{repository}:v1", registry.host());
        if let Some(provider) = provider {
            import(space.bed, provider, &[(reference.clone(), &image)])?;
        }
        Ok(Self { space, name, image, reference })
    }

    fn start(&self, node: &str) -> Result<(), TestError> {
        self.space.pod(self.name, node, &self.reference, true)
    }

    fn start_by_digest(&self, node: &str) -> Result<(), TestError> {
        let by_digest = format!("{}@{}", self.reference.trim_end_matches(":v1"), self.image.digest);
        self.space.pod(self.name, node, &by_digest, true)
    }

    /// Waits until containerd requests a path with this part from the stalling registry.
    fn wait_requested(&self, part: &str) -> Result<(), TestError> {
        wait_for(&format!("a GET of {part}"), WAIT_DEADLINE, || Ok((self.fetches(part) > 0).then_some(())))
    }

    /// GET requests to the stalling registry.
    fn fetches(&self, part: &str) -> usize {
        self.space.bed.registries().fetches(ScriptedRegistry::Stalls, part)
    }

    fn layer(&self) -> &str {
        self.image.own_layer.as_deref().unwrap_or_default()
    }

    fn events(&self, reason: &str) -> Result<Vec<String>, TestError> {
        self.space.events(self.name, reason)
    }

    /// Waits for an Event with this reason, and checks that the pod has no second Event of this
    /// reason.
    fn wait_only_event(&self, reason: &str) -> Result<String, TestError> {
        wait_for(&format!("{reason} on {}", self.name), WAIT_DEADLINE, || Ok(self.events(reason)?.pop()))?;
        let mut notes = self.events(reason)?;
        match notes.len() {
            1 => Ok(notes.remove(0)),
            _ => Err(format!("pod {} has not exactly one Event {reason}: {notes:#?}", self.name)),
        }
    }

    fn wait_running(&self) -> Result<Value, TestError> {
        let limit = WAIT_DEADLINE;
        let what = format!("{} to run", self.name);
        let running = self.space.bed.cluster().wait(&what, limit, |objects| {
            objects.pod(&self.space.name, self.name).filter(|pod| is_running(pod)).cloned()
        });
        running.map_err(|error| format!("{error}\n{}", self.space.bed.diagnostics()))
    }
}

fn ensure(condition: bool, message: impl Into<String>) -> Result<(), TestError> {
    if condition { Ok(()) } else { Err(message.into()) }
}

fn counted(bed: &TestBed, node: &str, result: &str) -> Result<f64, TestError> {
    bed.metric(node, &format!("lighterman_stalled_connections_total{{result=\"{result}\"}}"))
}

/// The setting is on: silent pulls end, a crawling pull continues, and the kubelet's queue moves.
fn ended(bed: &TestBed) -> Result<(), TestError> {
    let (space, provider) = (TestNamespace::new(bed, "e2e-stalls-ended")?, Some(NODES[0].0));
    let layer = Pull::new(&space, "layer", (ScriptedRegistry::Stalls, "layer"), provider)?;
    let manifest = Pull::new(&space, "manifest", (ScriptedRegistry::Stalls, "manifest"), provider)?;
    let crawl = Pull::new(&space, "crawl", (ScriptedRegistry::Stalls, "crawl"), None)?;
    let late = Pull::new(&space, "late", (ScriptedRegistry::Stalls, "late"), None)?;
    let queued = Pull::new(&space, "queued", (ScriptedRegistry::Serves, "queued"), None)?;
    // All images share a first layer. containerd fetches a layer once at a time, so without this
    // import the other pulls would wait for the first pull.
    let shell = ImageBuilder::new(&bed.busybox())?.build(PLAIN, "shell");
    import(bed, ENDING, &[(format!("{}/shell:v1", ScriptedRegistry::Serves.host()), &shell)])?;
    let began = Instant::now();
    layer.start_by_digest(ENDING)?;
    [&manifest, &crawl, &late].into_iter().try_for_each(|pull| pull.start(ENDING))?;
    layer.wait_requested(layer.layer())?;
    manifest.wait_requested("/v2/manifest/")?;
    crawl.wait_requested(crawl.layer())?;
    late.wait_requested(late.layer())?;
    // All parallel pulls are taken: this pull waits in the kubelet's queue.
    queued.start(ENDING)?;
    queued.wait_running()?;
    println!("\nfigure stalled_queue_freed_s {:.1}", began.elapsed().as_secs_f64());
    let note = layer.wait_only_event("ImagePullEnded")?;
    println!("  {note}");
    ensure(
        note.contains(ScriptedRegistry::Stalls.host().as_str()),
        format!("the Event does not name the registry: {note}"),
    )?;
    for pull in [&layer, &manifest] {
        pull.wait_running()?;
        space.wait_recovered(pull.name)?;
        println!("  {}: {:?}", pull.name, pull.events("Failed")?);
    }
    crawl.wait_running()?;
    println!("figure crawling_pull_s {:.1}", began.elapsed().as_secs_f64());
    ensure(crawl.events("Failed")?.is_empty(), "the crawling pull failed")?;
    ensure(crawl.fetches(crawl.layer()) == 1, "the crawling layer was fetched again")?;
    // The reason for the default "off": ending a pull loses a response that would have come.
    late.wait_running()?;
    println!("  late: {:?}, fetched {} times", late.events("Failed")?, late.fetches(late.layer()));
    ensure(!late.events("Failed")?.is_empty(), "a pull that was silent for three minutes was not ended")?;
    let (ended, failed) = (counted(bed, ENDING, "ended")?, counted(bed, ENDING, "failed")?);
    println!("figure stalled_connections_ended {ended}");
    ensure(ended >= 2.0 && failed == 0.0, format!("{ended} connections were ended, and {failed} attempts failed"))
}

/// The setting is off: an Event is written once, the image is recovered, and pods run when
/// containerd ends the pull.
fn reported(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-stalls-told")?;
    let layer = Pull::new(&space, "layer", (ScriptedRegistry::Stalls, "layer"), Some(NODES[1].0))?;
    let blocked = Pull::new(&space, "behind", (ScriptedRegistry::Serves, "behind"), None)?;
    let began = Instant::now();
    layer.start_by_digest(WAITING)?;
    layer.wait_requested(layer.layer())?;
    blocked.start(WAITING)?;
    let note = layer.wait_only_event("ImagePullStalled")?;
    println!("\nfigure stalled_event_s {:.1}\n  {note}", began.elapsed().as_secs_f64());
    for words in [layer.image.digest.as_str(), "image_pull_progress_timeout", "endStalledPulls"] {
        ensure(note.contains(words), format!("the Event does not contain {words}: {note}"))?;
    }
    layer.wait_only_event("ImageRecovered")?;
    ensure(!is_running(&space.get_pod("behind")?), "a later pull was not blocked")?;
    layer.wait_running()?;
    blocked.wait_running()?;
    println!("figure stalled_pull_to_running_s {:.1}", began.elapsed().as_secs_f64());
    println!("  {:?}", layer.events("Failed")?);
    layer.wait_only_event("ImagePullStalled")?;
    ensure(layer.events("ImagePullEnded")?.is_empty(), "a pull was ended although the setting is off")?;
    let ended = counted(bed, WAITING, "ended")?;
    ensure(ended == 0.0, format!("{ended} connections were ended"))
}
