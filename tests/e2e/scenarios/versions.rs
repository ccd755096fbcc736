//! Two builds side by side in an outage: one node runs the agent of an earlier commit, the other
//! nodes run this tree's. Then two nodes exchange builds and keep their data folders.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use super::{RegistryDown, agent_pod, ensure};
use crate::pods::{TestNamespace, WAIT_DEADLINE, pod_spec};
use crate::test_bed::{NODES, REGISTRY, TestBed, TestError, shipped_manifest, wait_for};

/// The commit that `scripts/previous.sh` builds.
const COMMIT: &str = include_str!("../previous-commit");

/// The tag of the image that is built from that commit.
const TAG: &str = "previous";

/// The image that `scripts/previous.sh` made, and the manifest of its commit.
struct Previous {
    image: PathBuf,
    manifest: PathBuf,
}

impl Previous {
    fn find() -> Result<Self, TestError> {
        let set = std::env::var_os("LIGHTERMAN_PREVIOUS").map(PathBuf::from);
        let folder = set.unwrap_or_else(|| crate::test_bed::cache().join("previous").join(COMMIT.trim()));
        let (image, manifest) = (folder.join("image.tar"), folder.join("lighterman.yaml"));
        match image.is_file() && manifest.is_file() {
            true => Ok(Self { image, manifest }),
            false => Err(format!(
                "{} has no build of commit {}: scripts/previous.sh makes it from the repository's history, which a shallow clone lacks",
                folder.display(),
                COMMIT.trim()
            )),
        }
    }
}

/// Why the scenario cannot run here.
pub(super) fn ignored() -> Option<String> {
    Previous::find().err()
}

/// A build of the agent.
#[derive(Clone, Copy, PartialEq)]
enum Build {
    Previous,
    Current,
}

/// The builds of the cluster's agents. On drop, all agents are of this tree again.
struct Builds<'a> {
    bed: &'a TestBed,
    previous: Previous,
}

impl<'a> Builds<'a> {
    fn of(bed: &'a TestBed) -> Result<Self, TestError> {
        let previous = Previous::find()?;
        for (node, _) in NODES {
            bed.ctl(&["ctr", node, "images", "import", &previous.image.to_string_lossy()])?;
        }
        Ok(Self { bed, previous })
    }

    /// Upgrades or rolls back one node, as an administrator does: applies the manifest of that
    /// build with `OnDelete`, and deletes the node's agent.
    fn install(&self, build: Build, node: &str) -> Result<(), TestError> {
        let bed = self.bed;
        let manifest = match build {
            Build::Previous => with_tag(&read(&self.previous.manifest)?, TAG),
            Build::Current => shipped_manifest()?,
        };
        bed.install(&bed.for_tests(on_delete(&manifest))?)?;
        let old = agent_pod(bed, node)?;
        let name = old["metadata"]["name"].as_str().unwrap_or_default();
        bed.kubectl(&["-n", "lighterman", "delete", "pod", name, "--timeout=60s"])?;
        wait_for(&format!("the agent of the other build on {node}"), WAIT_DEADLINE, || {
            let pod = agent_pod(bed, node).ok().filter(|pod| pod["metadata"]["uid"] != old["metadata"]["uid"]);
            Ok(pod
                .filter(|pod| is_build(pod, build) && pod["status"]["containerStatuses"][0]["ready"] == true)
                .map(drop))
        })
        .map_err(|error| format!("{error}\n{}", bed.diagnostics()))?;
        // A starting agent does not serve metrics yet.
        wait_for("every agent to see the others", WAIT_DEADLINE, || {
            let mut seen = NODES.iter().map(|(node, _)| bed.metric(node, "lighterman_peers").unwrap_or(0.0));
            Ok(seen.all(|peers| peers == bed.nodes().count() as f64 - 1.0).then_some(()))
        })
        .map_err(|error| format!("{error}\n{}", bed.diagnostics()))
    }
}

impl Drop for Builds<'_> {
    fn drop(&mut self) {
        for (node, _) in NODES {
            let is_previous = agent_pod(self.bed, node).is_ok_and(|pod| is_build(&pod, Build::Previous));
            if let Err(error) = if is_previous { self.install(Build::Current, node) } else { Ok(()) } {
                eprintln!("{error}");
            }
        }
        let restored = shipped_manifest().and_then(|manifest| self.bed.install(&self.bed.for_tests(manifest)?));
        if let Err(error) = restored {
            eprintln!("{error}");
        }
    }
}

fn is_build(pod: &Value, build: Build) -> bool {
    let image = pod["spec"]["containers"][0]["image"].as_str().unwrap_or_default();
    image.ends_with(&format!(":{TAG}")) == (build == Build::Previous)
}

fn read(path: &Path) -> Result<String, TestError> {
    fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))
}

/// Sets the tag of the agents' image in a manifest.
fn with_tag(manifest: &str, tag: &str) -> String {
    let name = "image: \"lighterman.dev/lighterman:";
    let change = |line: &str| match line.split_once(name) {
        Some((indent, _)) => format!("{indent}{name}{tag}\""),
        None => line.to_owned(),
    };
    manifest.lines().map(change).collect::<Vec<_>>().join("\n")
}

/// Sets the update strategy `OnDelete` in a manifest.
fn on_delete(manifest: &str) -> String {
    let depth = |line: &str| line.len() - line.trim_start().len();
    let (mut lines, mut within) = (Vec::new(), None);
    for line in manifest.lines() {
        if within.is_some_and(|outer| depth(line) > outer) {
            continue;
        }
        within = None;
        lines.push(line.to_owned());
        if line.trim() == "updateStrategy:" {
            within = Some(depth(line));
            lines.push(format!("{}type: OnDelete", " ".repeat(depth(line) + 2)));
        }
    }
    lines.join("\n")
}

/// The files that an agent reads at start.
struct StateFiles {
    key: Vec<u8>,
}

impl StateFiles {
    fn on(bed: &TestBed, node: &str) -> Result<Self, TestError> {
        let folder = PathBuf::from(bed.env(&format!("NODE_{node}_STATE"))?);
        let key = fs::read(folder.join("identity.key")).map_err(|error| format!("the key of {node}: {error}"))?;
        for name in ["admission.json", "peers.json"] {
            wait_for(&format!("{name} on {node}"), WAIT_DEADLINE, || Ok(folder.join(name).is_file().then_some(())))?;
        }
        Ok(Self { key })
    }

    /// Checks that the key is unchanged, and that the latest agent has read the files.
    fn assert_unchanged(&self, bed: &TestBed, node: &str) -> Result<(), TestError> {
        ensure(Self::on(bed, node)?.key == self.key, format!("the agent on {node} has another key"))?;
        let folder = PathBuf::from(bed.env(&format!("NODE_{node}_STATE"))?);
        let names = fs::read_dir(&folder).map_err(|error| error.to_string())?;
        let names: Vec<_> = names.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        ensure(!names.iter().any(|name| name.contains(".version-")), format!("a file was set aside: {names:?}"))?;
        let pod = agent_pod(bed, node)?;
        let name = pod["metadata"]["name"].as_str().unwrap_or_default();
        let log = bed.kubectl(&["-n", "lighterman", "logs", name])?;
        let unused = log.lines().find(|line| line.contains("not used") || line.contains("are not used"));
        ensure(unused.is_none(), format!("the other build cannot use a file of {node}: {unused:?}"))
    }
}

/// Pushes an image, and runs a pod of the image on this node alone.
fn provide_image(space: &TestNamespace<'_>, name: &str, node: &str) -> Result<String, TestError> {
    space.bed.push_image(&format!("versions/{name}:v1"), &[9, 1])?;
    let image = format!("{REGISTRY}/versions/{name}:v1");
    space.pod(&format!("holds-{name}"), node, &image, true)?;
    space.wait_running(&format!("holds-{name}"))?;
    Ok(image)
}

fn recover_image(space: &TestNamespace<'_>, name: &str, image: &str, node: &str) -> Result<(), TestError> {
    // The previous build reads the annotation `auto-salvage` only. The Events of the two builds
    // have different reasons.
    let annotations = json!({"lighterman.dev/recover": "true", "lighterman.dev/auto-salvage": "true"});
    space.bed.apply(&json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": space.name, "annotations": annotations},
        "spec": pod_spec(image, Some(node)),
    }))?;
    space.wait_running(name)?;
    let note = wait_for(&format!("the Event on pod {name}"), WAIT_DEADLINE, || {
        let notes = ["ImageRecovered", "ImageSalvaged"].map(|reason| space.events(name, reason));
        let notes = notes.into_iter().collect::<Result<Vec<_>, _>>()?;
        Ok(notes.into_iter().flatten().next())
    })?;
    println!("  {name}: {note}");
    Ok(())
}

pub(super) fn side_by_side(bed: &TestBed) -> Result<(), TestError> {
    // The previous build does not start on the first node, which has no IPv6.
    let (one, other) = (NODES[1].0, NODES[2].0);
    let builds = Builds::of(bed)?;
    let space = TestNamespace::new(bed, "e2e-versions")?;
    builds.install(Build::Previous, one)?;
    let state_files = (StateFiles::on(bed, one)?, StateFiles::on(bed, other)?);
    let [first, second] = ["first", "second"].map(|turn| {
        let of_one = provide_image(&space, &format!("{turn}-of-{one}"), one);
        of_one.and_then(|of_one| Ok((of_one, provide_image(&space, &format!("{turn}-of-{other}"), other)?)))
    });
    let (first, second) = (first?, second?);

    let _down = RegistryDown::now(bed)?;
    recover_image(&space, "current-from-previous", &first.0, other)?;
    recover_image(&space, "previous-from-current", &first.1, one)?;

    // Exchanges the builds during the outage, on the same data folders.
    builds.install(Build::Current, one)?;
    builds.install(Build::Previous, other)?;
    state_files.0.assert_unchanged(bed, one)?;
    state_files.1.assert_unchanged(bed, other)?;
    recover_image(&space, "rolled-back-from-upgraded", &second.0, other)?;
    recover_image(&space, "upgraded-from-rolled-back", &second.1, one)?;

    builds.install(Build::Current, other)?;
    state_files.1.assert_unchanged(bed, other)
}
