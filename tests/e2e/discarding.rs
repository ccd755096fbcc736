//! A second cluster, where every node's containerd deletes layers after unpacking. The nodes are
//! like those of GKE in other respects too: `/opt` is read-only, containerd's disk is at 83 % in
//! use, and pods of the system priority classes need a ResourceQuota.
//!
//! Images of the namespace [`NAMESPACE_BEFORE_AGENTS`] were pulled before any agent ran.

mod recovered;

use std::time::Duration;

use serde_json::{Value, json};

use crate::pods::{TestNamespace, is_running, pod_spec};
use crate::scenarios::{RegistryDown, Scenario, ensure};
use crate::test_bed::{REGISTRY, TestBed, TestError, set_variable, shipped_manifest, testbed, wait_for};

/// The scenarios, in the order they run.
pub(crate) const ALL: &[(&str, Scenario)] = &[
    ("discarding::a_default_installation_recovers_an_image_on_gke_like_nodes", recovers_like_gke),
    ("discarding::a_single_event_reports_a_node_whose_images_mostly_lack_layers", node_event),
    ("discarding::an_image_whose_layers_every_node_discarded_is_recovered", recovered::every_image),
];

/// The nodes and the series of their containerd. Figures of 1.7 have no target.
const NODES: [(&str, &str); 3] = [("n23", "2.3"), ("n24", "2.4"), ("n17", "1.7")];

/// A node that is added where `setup.sh` built containerd 2.0. Figures of 2.0 have no target.
const EXTRA: (&str, &str) = ("n20", "2.0");

/// Disk use in percent: within the kubelet's default band of image GC, 80 to 85 %.
const PERCENT_IN_USE: &str = "83";

/// The namespace of images that were pulled before any agent ran.
const NAMESPACE_BEFORE_AGENTS: &str = "e2e-fresh";

fn nodes() -> Vec<(&'static str, &'static str)> {
    let extra = testbed().join("containerd-2.0/bin/containerd").exists().then_some(EXTRA);
    NODES.into_iter().chain(extra).collect()
}

/// Starts the cluster, lets each node pull two images, and fills the disks.
pub(crate) fn up() -> Result<TestBed, TestError> {
    let names: Vec<_> = nodes().iter().map(|(name, _)| *name).collect();
    let all = names.join(" ");
    let variables = ["LIGHTERMAN_DISCARD_LAYERS", "LIGHTERMAN_DISK", "LIGHTERMAN_READ_ONLY_OPT"];
    let mut variables: Vec<_> = variables.iter().map(|name| (*name, &*all)).collect();
    variables.extend([("LIGHTERMAN_ZONES", ""), ("LIGHTERMAN_CRITICAL_QUOTA", "1")]);
    let bed = TestBed::start("d", &nodes(), &variables)?;
    bed.import_agents()?;
    let fresh = TestNamespace::new(&bed, NAMESPACE_BEFORE_AGENTS)?;
    let mut pulled = Vec::new();
    // Two images on each node: with one, the agent's own image would be half of the node's images,
    // and half does not count as most.
    for (node, name) in names.iter().flat_map(|node| [(node, (*node).to_owned()), (node, format!("{node}-too"))]) {
        let image = DiscardedImage::push(&bed, &format!("fresh/{name}:v1"))?;
        fresh.pod(&format!("on-{name}"), node, &image.by_tag, true)?;
        pulled.push((node, name, image));
    }
    for (node, name, image) in pulled {
        fresh.wait_running(&format!("on-{name}"))?;
        collect(&bed, node)?;
        let left = image.layers_on(&bed, node)?;
        ensure(left == 0, format!("containerd on {node} keeps {left} layers: it does not discard them"))?;
        bed.ctl(&["node", node, "disk-fill", PERCENT_IN_USE])?;
    }
    // The pods and their images stay.
    std::mem::forget(fresh);
    Ok(bed)
}

/// Reinstalls the agents by the shipped manifest with these variables.
fn install(bed: &TestBed, variables: &[(&str, &str)]) -> Result<(), TestError> {
    let manifest = shipped_manifest()?;
    let manifest = variables.iter().fold(manifest, |text, (name, value)| set_variable(&text, name, value));
    bed.kubectl(&[
        "-n",
        "lighterman",
        "delete",
        "daemonset",
        "lighterman",
        "--ignore-not-found",
        "--cascade=foreground",
    ])?;
    bed.deploy(&manifest)
}

/// An image in the bed's registry. No other image shares a layer with this image.
struct DiscardedImage {
    by_tag: String,
    by_digest: String,
    layers: Vec<String>,
}

impl DiscardedImage {
    fn push(bed: &TestBed, name: &str) -> Result<Self, TestError> {
        // containerd downloads no layer that is unpacked already, so the layer of the shell has to
        // differ.
        let own = bed.folder().join("own");
        std::fs::write(&own, name).map_err(|error| error.to_string())?;
        let made = bed.push_image_with(name, &[3, 2, 1], &["--file", &format!("{}:/own", own.display())])?;
        let text = |value: &Value| value.as_str().map(str::to_owned).ok_or_else(|| format!("no digest in {made}"));
        let repository = name.split(':').next().unwrap_or(name);
        let layers = made["layers"].as_array().into_iter().flatten();
        Ok(Self {
            by_tag: format!("{REGISTRY}/{name}"),
            by_digest: format!("{REGISTRY}/{repository}@{}", text(&made["manifest"])?),
            layers: layers.map(|layer| text(&layer["digest"])).collect::<Result<_, _>>()?,
        })
    }

    /// The number of layers in the node's containerd.
    fn layers_on(&self, bed: &TestBed, node: &str) -> Result<usize, TestError> {
        let listed = bed.ctl(&["ctr", node, "content", "ls", "-q"])?;
        Ok(self.layers.iter().filter(|layer| listed.lines().any(|line| line == **layer)).count())
    }
}

/// Runs the garbage collection of the node's containerd. The synchronous deletion of a lease waits
/// for the end of the collection.
fn collect(bed: &TestBed, node: &str) -> Result<(), TestError> {
    bed.ctl(&["ctr", node, "leases", "create", "--id", "e2e"])?;
    bed.ctl(&["ctr", node, "leases", "rm", "--sync", "e2e"]).map(drop)
}

/// Percent in use of containerd's disk, and whether the kubelet reports disk pressure.
fn disk(bed: &TestBed, node: &str) -> Result<(u64, bool), TestError> {
    let df = bed.ctl(&["in", "--mount", node, "df", "-B1", "--output=size,used", "/var/lib/containerd"])?;
    let numbers: Vec<u64> = df.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    let [size, used] = numbers[..] else { return Err(format!("on {node}: {df}")) };
    let object = bed.get(&["node", node])?;
    let conditions = object["status"]["conditions"].as_array().cloned().unwrap_or_default();
    let pressure = conditions.iter().any(|it| it["type"] == "DiskPressure" && it["status"] == "True");
    Ok((used * 100 / size, pressure))
}

/// Default values and no other preparation: the agents become ready, and an image is recovered
/// while the registry is down.
fn recovers_like_gke(bed: &TestBed) -> Result<(), TestError> {
    let outcome = try_gke_like(bed);
    println!("\nfigure default_install_gke_like {}", u8::from(outcome.is_ok()));
    outcome
}

fn try_gke_like(bed: &TestBed) -> Result<(), TestError> {
    let space = TestNamespace::new(bed, "e2e-gke")?;
    let ((provider, _), (node, _)) = (NODES[0], NODES[1]);
    assert_like_gke(bed, &space, node)?;
    install(bed, &[])?;
    let image = DiscardedImage::push(bed, "gke/app:v1")?;
    space.pod("provider", provider, &image.by_tag, true)?;
    space.wait_running("provider")?;
    let _down = RegistryDown::now(bed)?;
    collect(bed, provider)?;
    space.pod("wants", node, &image.by_tag, true)?;
    space.wait_running("wants")?;
    println!("  {}", space.wait_recovered("wants")?);
    for node in [provider, node] {
        let (percent, pressure) = disk(bed, node)?;
        ensure(!pressure, format!("{node} has disk pressure at {percent} %"))?;
    }
    ensure(is_running(&space.get_pod("provider")?), "the provider's pod stopped running")
}

/// Checks that the bed has the properties that make installations on GKE fail.
fn assert_like_gke(bed: &TestBed, space: &TestNamespace, node: &str) -> Result<(), TestError> {
    let mut spec = pod_spec("local.test/pause:1", Some(node));
    spec["priorityClassName"] = "system-node-critical".into();
    let critical = json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "critical", "namespace": space.name}, "spec": spec});
    let rejection = bed.apply(&critical).err().unwrap_or_default();
    ensure(rejection.contains("insufficient quota"), format!("a critical pod needs no quota: {rejection}"))?;
    let written = bed.ctl(&["in", "--mount", node, "mkdir", "/opt/containerd"]);
    ensure(written.is_err_and(|error| error.contains("Read-only")), "/opt is not read-only")?;
    let (percent, _) = disk(bed, node)?;
    ensure(percent >= 82, format!("the disk is at {percent} %"))
}

/// No layer can be fetched here: the registry speaks plain HTTP, and agents with default values
/// require TLS. So every node lacks layers of the images that were pulled before the agents ran.
fn node_event(bed: &TestBed) -> Result<(), TestError> {
    if bed.kubectl(&["-n", "lighterman", "get", "daemonset", "lighterman"]).is_err() {
        install(bed, &[])?;
    }
    for (node, _) in NODES {
        let selector = format!("involvedObject.kind=Node,involvedObject.name={node},reason=ImagesLackLayers");
        let note = wait_for(&format!("the Event on node {node}"), BACKGROUND_DEADLINE, || {
            let events = bed.get(&["-n", "default", "events", "--field-selector", &selector])?;
            let items = events["items"].as_array().cloned().unwrap_or_default();
            ensure(items.len() < 2, format!("{} Events on {node}", items.len()))?;
            Ok(items.first().and_then(|event| event["message"].as_str().map(str::to_owned)))
        })?;
        println!("  {note}");
        for part in [node, "discarded after unpacking", "discard_unpacked_layers = false"] {
            ensure(note.contains(part), format!("the Event does not contain {part}: {note}"))?;
        }
        let described = bed.kubectl(&["describe", "node", node])?;
        ensure(described.contains("ImagesLackLayers"), format!("kubectl describe node lacks the Event:\n{described}"))?;
    }
    Ok(())
}

/// Deadline for background work of agents. The Event on a node is written after a minute.
const BACKGROUND_DEADLINE: Duration = Duration::from_secs(240);
