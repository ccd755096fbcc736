//! Faults that are no outage of a registry, and an outage of a mirror that is over. While
//! containerd can reach the registry, a pod of a moved tag must run the registry's current digest.
//! Peers have the image of the tag's former digest.

use std::path::Path;
use std::time::Duration;

use serde_json::json;

use super::{ensure, settings};
use crate::images::{Image, ImageBuilder, LayerVariant, PLAIN, Recipe};
use crate::pods::{TestNamespace, WAIT_DEADLINE, pod_spec};
use crate::registries::ScriptedRegistry;
use crate::test_bed::{NODES, TestBed, TestError, wait_for};

/// Default number of tries of each kind: one on each node.
const TRIES: usize = NODES.len();

/// Variable with the number of tries of each kind, for more tries than CI has time for.
const TRIES_VARIABLE: &str = "LIGHTERMAN_TRIES";

/// Time from the end of the mirror's outage to the pods of moved tags. Evidence of an outage
/// decides tags for 30 s.
const AFTER_HICCUP: Duration = Duration::from_secs(40);

/// One try: the pods run on `node`, two other nodes have the old image.
struct Try<'a> {
    space: &'a TestNamespace<'a>,
    builder: &'a ImageBuilder,
    number: usize,
    node: &'static str,
    providers: [&'static str; 2],
}

/// An image whose tag has moved in the registry since the providers pulled it.
struct MovedTag {
    image: String,
    old: Image,
    new: Image,
}

pub(super) fn run_no_old_image(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-false-outages")?;
    let builder = ImageBuilder::new(&bed.busybox())?;
    let tries: Vec<_> = (0..tries_of_each_kind()?)
        .map(|number| {
            let node = |offset: usize| NODES[(number + offset) % NODES.len()].0;
            Try { space: &space, builder: &builder, number, node: node(0), providers: [node(1), node(2)] }
        })
        .collect();
    let mut outcomes: Vec<_> = tries.iter().map(|a_try| ("broken image", a_try.after_a_broken_image())).collect();
    outcomes.extend(tries.iter().map(|a_try| ("killed containerd", a_try.after_a_killed_containerd())));
    outcomes.push(("hiccup of a mirror", after_a_hiccup(bed, &tries)));
    let (mut old_images, mut errors) = (0, Vec::new());
    for (kind, outcome) in outcomes {
        match outcome {
            Ok(count) => old_images += count,
            Err(error) => errors.push(format!("{kind}: {error}")),
        }
    }
    println!("  {} tries of each of 3 kinds", tries.len());
    println!("\nfigure old_image_with_registry_up {old_images}");
    ensure(errors.is_empty(), errors.join("\n"))?;
    ensure(old_images == 0, format!("{old_images} pods run the old image with the registry up"))
}

/// The number of tries is at least the number of nodes: each node meets the end of the outage in
/// another state.
fn tries_of_each_kind() -> Result<usize, TestError> {
    let Ok(tries) = std::env::var(TRIES_VARIABLE) else { return Ok(TRIES) };
    let tries = tries.parse().ok().filter(|tries| (TRIES..=1000).contains(tries));
    tries.ok_or_else(|| format!("{TRIES_VARIABLE} must be a number from {TRIES} to 1000"))
}

/// Stops a mirror until two pods of each node have failed. The mirror is the only host of these
/// registries.
fn after_a_hiccup(bed: &TestBed, tries: &[Try<'_>]) -> Result<usize, TestError> {
    let mut moved = Vec::new();
    for a_try in tries {
        a_try.write_hosts()?;
        for tag in 0..3 {
            moved.push((a_try, a_try.publish_moved_tag(&a_try.mirrored_registry(), &format!("mirrored-{tag}"))?));
        }
    }
    let hiccup = Hiccup::now(bed)?;
    for a_try in tries {
        for pod in a_try.failing_pods() {
            let image = format!("{}/failing/{pod}:v1", a_try.mirrored_registry());
            a_try.space.pod(&pod, a_try.node, &image, true)?;
        }
    }
    for a_try in tries {
        a_try.failing_pods().iter().try_for_each(|pod| a_try.wait_failed(pod, &["failed to do request"]))?;
    }
    // When the mirror is back, the pods of the first node find their images and those of the second
    // node find none. On the third node the pods are deleted.
    for a_try in tries {
        for pod in a_try.failing_pods() {
            match a_try.number % NODES.len() {
                0 => bed.registries().publish(&format!("failing/{pod}:v1"), &a_try.builder.build(PLAIN, &pod)),
                2 => drop(bed.kubectl(&["-n", &a_try.space.name, "delete", "pod", &pod, "--wait=false"])?),
                _ => {}
            }
        }
    }
    drop(hiccup);
    println!("  {}: the mirror is back", jiff::Timestamp::now());
    // The scenario requires that this time passes.
    std::thread::sleep(AFTER_HICCUP);
    for (a_try, moved) in &moved {
        a_try.create_pod(moved)?;
    }
    println!("  {}: the pods of moved tags are made", jiff::Timestamp::now());
    for pod in tries[..NODES.len() - 1].iter().flat_map(Try::failing_pods) {
        println!("  {pod}: {:?}", tries[0].space.events(&pod, "Failed")?);
    }
    let old: Result<Vec<_>, _> = moved.iter().map(|(a_try, moved)| a_try.runs_old(moved)).collect();
    Ok(old?.into_iter().filter(|is_old| *is_old).count())
}

impl Try<'_> {
    fn bed(&self) -> &TestBed {
        self.space.bed
    }

    /// A layer cannot be unpacked, and the registry is healthy.
    fn after_a_broken_image(&self) -> Result<usize, TestError> {
        let moved = self.publish_moved_tag(&ScriptedRegistry::Serves.host(), "broken")?;
        let (name, pod) = (format!("broken/image-{}:v1", self.number), format!("broken-{}", self.number));
        let broken = self.builder.build(Recipe { layer: LayerVariant::CutShort, ..PLAIN }, &pod);
        self.bed().registries().publish(&name, &broken);
        self.space.pod(&pod, self.node, &format!("{}/{name}", ScriptedRegistry::Serves.host()), true)?;
        self.wait_failed(&pod, &["failed to extract layer"])?;
        self.create_pod(&moved)?;
        self.runs_old(&moved).map(usize::from)
    }

    /// containerd is killed while the registry stalls within a layer.
    fn after_a_killed_containerd(&self) -> Result<usize, TestError> {
        let moved = self.publish_moved_tag(&ScriptedRegistry::Serves.host(), "killed")?;
        let (name, pod) = (format!("stalls/image-{}:v1", self.number), format!("stalled-{}", self.number));
        let stalled = self.builder.build(PLAIN, &pod);
        self.bed().registries().publish(&name, &stalled);
        self.space.pod(&pod, self.node, &format!("{}/{name}", ScriptedRegistry::Serves.host()), true)?;
        let layer = stalled.own_layer.as_deref().ok_or("the image has no layer")?;
        wait_for("the layer to be fetched", WAIT_DEADLINE, || {
            Ok((self.bed().registries().fetches(ScriptedRegistry::Serves, layer) > 0).then_some(()))
        })?;
        self.bed().ctl(&["node", self.node, "containerd-kill"])?;
        self.bed().ctl(&["node", self.node, "containerd-start"])?;
        self.wait_failed(&pod, &["error reading from server", "transport is closing", "connection refused"])?;
        self.create_pod(&moved)?;
        self.runs_old(&moved).map(usize::from)
    }

    /// Publishes an image that both other nodes get, and then moves the tag in the registry.
    fn publish_moved_tag(&self, registry: &str, kind: &str) -> Result<MovedTag, TestError> {
        let name = format!("moved/{kind}-{}:v1", self.number);
        let image = format!("{registry}/{name}");
        let [old, new] = ["old", "new"].map(|age| self.builder.build(PLAIN, &format!("{name}-{age}")));
        self.bed().registries().publish(&name, &old);
        let [provider, third] = self.providers;
        let pod = format!("provider-{kind}-{}", self.number);
        self.space.pod(&pod, provider, &image, true)?;
        self.space.wait_running(&pod)?;
        // The third node's agent finds the image by the mesh, so the provider has announced the
        // image.
        settings::pull(self.bed(), third, &image)?;
        self.bed().registries().publish(&name, &new);
        Ok(MovedTag { image, old, new })
    }

    /// Creates the pod of the moved tag. The kubelet looks for the image after the init container
    /// ends, so an agent that wrongly recovers the tag has time to do so.
    fn create_pod(&self, moved: &MovedTag) -> Result<(), TestError> {
        let mut spec = pod_spec(&moved.image, Some(self.node));
        spec["initContainers"] = json!([{
            "name": "first", "image": "local.test/pause:1", "imagePullPolicy": "IfNotPresent",
            "command": ["/busybox", "sleep", "5"],
        }]);
        let metadata = json!({
            "name": moved.pod(), "namespace": self.space.name, "annotations": {"lighterman.dev/recover": "true"},
        });
        self.bed().apply(&json!({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}))
    }

    /// Whether the pod of the moved tag runs the old image.
    fn runs_old(&self, moved: &MovedTag) -> Result<bool, TestError> {
        let pod = self.space.wait_running(&moved.pod())?;
        let id = pod["status"]["containerStatuses"][0]["imageID"].as_str().unwrap_or_default();
        let is_image = |image: &Image| id.contains(&image.digest) || id.contains(&image.config);
        if is_image(&moved.old) {
            println!("  {} runs its old image on {}:\n{}", moved.image, self.node, self.event_log(moved)?);
            return Ok(true);
        }
        if is_image(&moved.new) { Ok(false) } else { Err(format!("{} runs {id}", moved.image)) }
    }

    /// The Events of the moved pod and the failing pods, and the agents' log lines about the
    /// registry. All times are of the same clock.
    fn event_log(&self, moved: &MovedTag) -> Result<String, TestError> {
        let pods: Vec<_> = self.failing_pods().into_iter().chain([moved.pod()]).collect();
        let events = self.bed().get(&["-n", &self.space.name, "events"])?;
        let events = events["items"].as_array().into_iter().flatten();
        let mut lines: Vec<_> = events
            .filter_map(|event| {
                let pod = event["involvedObject"]["name"].as_str().filter(|name| pods.iter().any(|pod| pod == name))?;
                let text = |key: &str| event[key].as_str().unwrap_or_default().to_owned();
                let (first, last) = (text("firstTimestamp"), text("lastTimestamp"));
                let times = format!("{first}..{last} {} {}", event["eventTime"], event["count"]);
                Some(format!("    {times} {pod} {}: {}", text("reason"), text("message")))
            })
            .collect();
        lines.sort();
        let log = self.bed().kubectl(&[
            "-n",
            "lighterman",
            "logs",
            "-l",
            "app.kubernetes.io/name=lighterman",
            "--prefix",
            "--tail=-1",
        ])?;
        let registry = moved.image.split('/').next().unwrap_or_default();
        lines.extend(log.lines().filter(|line| line.contains(registry)).map(|line| format!("    {line}")));
        Ok(lines.join("\n"))
    }

    /// Waits for an Event of the kubelet about a failed pull with one of these texts.
    fn wait_failed(&self, pod: &str, texts: &[&str]) -> Result<(), TestError> {
        let note = wait_for(&format!("pod {pod} to fail with {texts:?}"), WAIT_DEADLINE, || {
            let notes = self.space.events(pod, "Failed")?;
            Ok(notes.into_iter().find(|note| texts.iter().any(|text| note.contains(text))))
        })
        .map_err(|error| format!("{error}\n{:?}", self.space.events(pod, "Failed")))?;
        println!("  {}: {note}", self.node);
        Ok(())
    }

    /// The name of a registry that only the mirror serves.
    fn mirrored_registry(&self) -> String {
        format!("mirrored-{}.test", self.number)
    }

    fn failing_pods(&self) -> [String; 2] {
        [1, 2].map(|pod| format!("failing-{}-{pod}", self.number))
    }

    /// Configures the mirror in every containerd.
    fn write_hosts(&self) -> Result<(), TestError> {
        let (registry, mirror) = (self.mirrored_registry(), ScriptedRegistry::Mirror.host());
        let hosts = format!(
            "server = \"https://{registry}\"\n[host.\"http://{mirror}\"]\ncapabilities = [\"pull\", \"resolve\"]\n"
        );
        for (node, _) in NODES {
            let config = self.bed().env(&format!("NODE_{node}_CONFIG"))?;
            let folder = Path::new(&config).join("certs.d").join(&registry);
            let written =
                std::fs::create_dir_all(&folder).and_then(|()| std::fs::write(folder.join("hosts.toml"), &hosts));
            written.map_err(|error| format!("{}: {error}", folder.display()))?;
        }
        Ok(())
    }
}

impl MovedTag {
    fn pod(&self) -> String {
        let name = self.image.split_once("/moved/").map_or("", |(_, name)| name);
        format!("moved-{}", name.trim_end_matches(":v1"))
    }
}

/// Rejects connections to the mirror until dropped.
struct Hiccup<'a>(&'a TestBed);

impl<'a> Hiccup<'a> {
    fn now(bed: &'a TestBed) -> Result<Self, TestError> {
        let hiccup = Self(bed);
        hiccup.change("-I").map(|()| hiccup)
    }

    fn change(&self, operation: &str) -> Result<(), TestError> {
        let port = ScriptedRegistry::Mirror.port().to_string();
        let rule = ["-p", "tcp", "--dport", port.as_str(), "-j", "REJECT", "--reject-with", "tcp-reset"];
        let command = ["in", "hub", "iptables", "-w", operation, "INPUT"];
        self.0.ctl(&[&command[..], &rule].concat()).map(drop)
    }
}

impl Drop for Hiccup<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.change("-D") {
            eprintln!("{error}");
        }
    }
}
