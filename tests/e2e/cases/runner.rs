//! Runs rows: imports images into the providers' containerds, creates the pods, and checks the
//! outcome.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::objects::{CONTAINER, CaseObjects, LABEL, namespaces};
use super::{Case, Expectation, ImageUse, LocalContent, Nodes, OptInForm, ROWS, ReferenceForm};
use crate::api::Objects;
use crate::images::{Image, ImageBuilder, PLAIN, write_layouts};
use crate::pods::{TestNamespace, WAIT_DEADLINE};
use crate::registries::{INVENTED_PORT, ScriptedRegistry};
use crate::test_bed::{NODES, TestBed, TestError};

/// A row on a node.
pub(crate) struct CaseOnNode {
    case: &'static Case,
    id: String,
    node: &'static str,
    provider: &'static str,
}

impl CaseOnNode {
    /// All rows on their nodes, by test name. Provider and node never have the same containerd.
    pub(crate) fn all() -> Vec<(String, Self)> {
        // The product of rows and nodes, for measurements outside CI.
        let is_product = std::env::var_os("LIGHTERMAN_EVERY_NODE").is_some();
        let mut cases = Vec::new();
        for (index, case) in ROWS.iter().enumerate() {
            for (number, (node, _)) in NODES.iter().enumerate() {
                let is_chosen = match case.nodes {
                    Nodes::One => is_product || number == index % NODES.len(),
                    Nodes::Each => true,
                    Nodes::Only(only) => only.contains(node),
                };
                if is_chosen {
                    let (provider, _) = NODES[(number + 1) % NODES.len()];
                    let id = format!("{}-{node}", case.slug());
                    cases.push((format!("case::{}::{node}", case.name), Self { case, id, node, provider }));
                }
            }
        }
        cases
    }

    /// The image's name at the provider, and the reference in the pod.
    fn names(&self, image: &Image) -> (String, String) {
        let (id, root) = (&self.id, &image.digest);
        let registry = self.case.registry.host();
        let repository = format!("{registry}/{id}/app");
        let tagged = format!("{repository}:v1");
        match self.case.reference_form {
            ReferenceForm::Tag => (tagged.clone(), tagged),
            ReferenceForm::Digest => (tagged, format!("{repository}@{root}")),
            ReferenceForm::TagAndDigest => (tagged.clone(), format!("{tagged}@{root}")),
            ReferenceForm::ImpliedLatest => (format!("{repository}:latest"), repository),
            ReferenceForm::ShortName => (format!("docker.io/library/{id}:v1"), format!("{id}:v1")),
            ReferenceForm::HostName => {
                let name = format!("registry.nowhere.test/team/{id}:v1");
                (name.clone(), name)
            }
            ReferenceForm::LongName => {
                let name = format!("{registry}/{id:l<100}/{}:{}", "n".repeat(99), "t".repeat(128));
                (name.clone(), name)
            }
            ReferenceForm::OtherRegistry => {
                let host = registry.split(':').next().unwrap_or_default();
                (tagged, format!("{host}:{INVENTED_PORT}/{id}/app@{root}"))
            }
            ReferenceForm::OtherRepository => (tagged, format!("{registry}/{id}/stranger@{root}")),
        }
    }

    /// An image for a probe pod on the same node, made after the row's pod. Once the probe runs,
    /// the agent has reconciled the row's pod.
    fn probe(&self) -> Option<String> {
        (!self.case.expectation.runs()).then(|| format!("{}/{}/probe:v1", ScriptedRegistry::Refuses.host(), self.id))
    }
}

/// The images of all rows, and the score.
pub(crate) struct CaseRunner {
    images: BTreeMap<String, Image>,
    attempted: AtomicUsize,
    passed: AtomicUsize,
}

impl CaseRunner {
    /// Makes the images of these rows and imports each into the provider's containerd.
    pub(crate) fn prepare(bed: &TestBed, cases: &[&CaseOnNode]) -> Result<Self, TestError> {
        for namespace in namespaces() {
            bed.cluster().apply(&namespace)?;
            TestNamespace::wait_usable(bed, namespace["metadata"]["name"].as_str().unwrap_or_default())?;
        }
        let builder = ImageBuilder::new(&bed.busybox())?;
        let built = cases
            .iter()
            .map(|case_on_node| (case_on_node.id.clone(), builder.build(case_on_node.case.recipe, &case_on_node.id)));
        let images: BTreeMap<_, _> = built.collect();
        for case_on_node in cases {
            bed.registries().publish(&format!("{}/app:v1", case_on_node.id), &images[&case_on_node.id]);
        }
        let probe = builder.build(PLAIN, "probe");
        for (node, _) in NODES {
            let mut imported = Vec::new();
            let mut removed = Vec::new();
            for case_on_node in cases {
                let image = &images[&case_on_node.id];
                let (name, reference) = case_on_node.names(image);
                if case_on_node.provider == node {
                    imported.push((name, image));
                    imported.extend(case_on_node.probe().map(|name| (name, &probe)));
                } else if case_on_node.node == node {
                    let absent_blob = match case_on_node.case.local_content {
                        LocalContent::Nothing => continue,
                        LocalContent::NoLayer => image.own_layer.clone(),
                        LocalContent::NoConfig => Some(image.config.clone()),
                    };
                    imported.push((reference, image));
                    removed.extend(absent_blob);
                }
            }
            import(bed, node, &imported)?;
            if !removed.is_empty() {
                let taken: Vec<_> = removed.iter().map(String::as_str).collect();
                bed.ctl(&[&["ctr", node, "content", "rm"], &taken[..]].concat())?;
            }
        }
        Ok(Self { images, attempted: AtomicUsize::new(0), passed: AtomicUsize::new(0) })
    }

    /// Runs one row, and deletes the row's pods.
    pub(crate) fn run(&self, bed: &TestBed, case_on_node: &CaseOnNode) -> Result<(), TestError> {
        let image = self.images.get(&case_on_node.id).ok_or("the image of the row was not made")?;
        let (_, reference) = case_on_node.names(image);
        let Case { policy, opt_in, .. } = *case_on_node.case;
        let case_objects =
            CaseObjects { id: &case_on_node.id, node: case_on_node.node, image: &reference, policy, opt_in };
        let running_case = RunningCase { bed, case_on_node, case_objects, image };
        self.attempted.fetch_add(1, Ordering::Relaxed);
        let outcome = running_case
            .begin()
            .and_then(|()| running_case.end())
            .map_err(|error| running_case.describe_failure(error));
        running_case.clear()?;
        outcome?;
        self.passed.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// The number of rows that passed, and of rows that ran.
    pub(crate) fn score(&self) -> (usize, usize) {
        (self.passed.load(Ordering::Relaxed), self.attempted.load(Ordering::Relaxed))
    }
}

/// Imports images into a node's containerd under these names, without unpacking.
pub(crate) fn import(bed: &TestBed, node: &str, images: &[(String, &Image)]) -> Result<(), TestError> {
    let [whole, partial] = write_layouts(images, bed.folder(), node)?;
    // containerd 2 imports through the transfer service by default, and the service chooses the
    // platforms itself.
    let local: &[&str] = if node == "n17" { &[] } else { &["--local"] };
    for (layout, platforms) in [(whole, &["--all-platforms"][..]), (partial, &[])] {
        if let Some(layout) = layout {
            let command = ["ctr", node, "images", "import", "--no-unpack"];
            bed.ctl(&[&command[..], local, platforms, &[layout.as_str()]].concat())?;
        }
    }
    Ok(())
}

/// A row while it runs.
struct RunningCase<'a> {
    bed: &'a TestBed,
    case_on_node: &'a CaseOnNode,
    case_objects: CaseObjects<'a>,
    image: &'a Image,
}

impl RunningCase<'_> {
    fn begin(&self) -> Result<(), TestError> {
        let image_use = self.case_on_node.case.image_use;
        let objects = self.case_objects.objects(image_use);
        if image_use == ImageUse::StaticPod {
            return fs::write(self.manifest()?, yaml(&objects[0])).map_err(|error| error.to_string());
        }
        objects.iter().try_for_each(|object| self.bed.cluster().apply(object))?;
        if image_use == ImageUse::Ephemeral {
            let pod = self.bed.cluster().wait("the pod's container to run", WAIT_DEADLINE, |objects| {
                let pod = *self.pods(objects).first()?;
                (pod["status"]["phase"] == "Running").then(|| pod.clone())
            })?;
            self.bed.cluster().patch_part(&pod, "ephemeralcontainers", &self.case_objects.ephemeral())?;
        }
        Ok(())
    }

    fn end(&self) -> Result<(), TestError> {
        match self.case_on_node.case.expectation {
            Expectation::Runs => self.wait_container_runs().map(drop),
            Expectation::RunsWithoutOutage => {
                let note = self.wait_container_runs()?;
                // The Event names the begin of an outage that this node found.
                let names_outage = note.contains("has failed since");
                if names_outage { Err(format!("the fault counts as an outage: {note}")) } else { Ok(()) }
            }
            Expectation::Event(reason, words) => {
                let first_message = |objects: &Objects| self.event_messages(objects, reason).into_iter().next();
                let note = self.bed.cluster().wait(&format!("an Event {reason}"), WAIT_DEADLINE, first_message)?;
                let lower = note.to_lowercase();
                if let Some(word) = words.iter().find(|word| !lower.contains(**word)) {
                    return Err(format!("the Event does not contain {word:?}: {note}"));
                }
                self.wait_for_two_failures()?;
                self.run_probe_pod()?;
                self.assert_nothing_recovered()?;
                let events = self.bed.cluster().now(|objects| self.agent_events(objects));
                if events.len() == 1 {
                    Ok(())
                } else {
                    Err(format!("the agents wrote other Events than one: {events:#?}"))
                }
            }
            Expectation::NoEvent => {
                self.wait_for_two_failures()?;
                self.run_probe_pod()?;
                self.assert_nothing_recovered()?;
                let events = self.bed.cluster().now(|objects| self.agent_events(objects));
                if events.is_empty() { Ok(()) } else { Err(format!("the agents wrote Events: {events:#?}")) }
            }
        }
    }

    /// Waits until the container runs. Returns the note of the recovery's Event.
    fn wait_container_runs(&self) -> Result<String, TestError> {
        let image_use = self.case_on_node.case.image_use;
        let expected_pods = if image_use == ImageUse::TwoPods { 2 } else { 1 };
        let started = |objects: &Objects| {
            let pods = self.pods(objects);
            (pods.len() >= expected_pods && pods.iter().all(|pod| has_started(pod))).then(|| uids(&pods))
        };
        let first = self.bed.cluster().wait("a first pod", WAIT_DEADLINE, |objects| {
            let pods = self.pods(objects);
            (pods.len() >= expected_pods).then(|| uids(&pods))
        })?;
        let last = self.bed.cluster().wait("the container to start", WAIT_DEADLINE, started)?;
        if first != last {
            return Err(format!("pods were deleted and created again: {first:?}, then {last:?}"));
        }
        let note = self.bed.cluster().wait("the Event ImageRecovered", WAIT_DEADLINE, |objects| {
            self.event_messages(objects, "ImageRecovered").into_iter().next()
        })?;
        let repository = self.case_on_node.id.as_str();
        let is_named = note.contains(repository) || self.case_on_node.case.reference_form == ReferenceForm::LongName;
        if is_named { Ok(note) } else { Err(format!("the Event does not name the image: {note}")) }
    }

    /// Waits for a second failure, so that an Event that must appear once could have been repeated.
    fn wait_for_two_failures(&self) -> Result<(), TestError> {
        let never = self.case_on_node.case.policy == "Never";
        self.bed.cluster().wait("a second failed pull of the kubelet", WAIT_DEADLINE, |objects| {
            let pod = *self.pods(objects).first()?;
            let name = pod["metadata"]["name"].as_str()?;
            let failures = objects.events(self.case_objects.opt_in.k8s_namespace(), name, "Failed");
            let count: u64 = failures.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum();
            // The kubelet writes two Events for a failed attempt: the cause, and "Error:
            // ErrImagePull".
            (count >= if never { 2 } else { 4 }).then_some(())
        })
    }

    fn run_probe_pod(&self) -> Result<(), TestError> {
        let image = self.case_on_node.probe().ok_or("no probe was made")?;
        let id = format!("w-{}", self.case_on_node.id);
        let probe = CaseObjects {
            id: &id,
            image: &image,
            opt_in: OptInForm::Pod,
            policy: "IfNotPresent",
            node: self.case_on_node.node,
        };
        let objects = probe.objects(ImageUse::Container);
        objects.iter().try_for_each(|object| self.bed.cluster().apply(object))?;
        let runs =
            |objects: &Objects| objects.labeled(LABEL, &id).first().is_some_and(|pod| has_started(pod)).then_some(());
        let outcome = self.bed.cluster().wait("the probe to run", WAIT_DEADLINE, runs);
        objects.iter().try_for_each(|object| self.bed.cluster().delete(object))?;
        outcome
    }

    fn assert_nothing_recovered(&self) -> Result<(), TestError> {
        if self.bed.cluster().now(|objects| self.pods(objects).iter().any(|pod| has_started(pod))) {
            return Err("the container runs".into());
        }
        let recorded = self.bed.ctl(&["ctr", self.case_on_node.node, "images", "ls", "-q"])?;
        let is_about_image = |line: &&str| line.contains(&self.case_on_node.id) && !line.contains("/probe");
        match recorded.lines().find(is_about_image) {
            Some(line) => Err(format!("the image was fetched: {line}")),
            None => Ok(()),
        }
    }

    fn pods<'o>(&self, objects: &'o Objects) -> Vec<&'o Value> {
        objects.labeled(LABEL, &self.case_on_node.id)
    }

    /// The messages of Events with this reason on the row's pods.
    fn event_messages(&self, objects: &Objects, reason: &str) -> Vec<String> {
        let names = self.pods(objects);
        let names = names.iter().filter_map(|pod| pod["metadata"]["name"].as_str());
        let events = names.flat_map(|name| objects.events(self.case_objects.opt_in.k8s_namespace(), name, reason));
        events.filter_map(|event| event["message"].as_str().map(str::to_owned)).collect()
    }

    /// All Events of agents on the row's pods. An Event with a count is repeated that often.
    fn agent_events(&self, objects: &Objects) -> Vec<String> {
        let names = self.pods(objects);
        let names = names.iter().filter_map(|pod| pod["metadata"]["name"].as_str());
        let events =
            names.flat_map(|name| objects.events_of("lighterman", self.case_objects.opt_in.k8s_namespace(), name));
        let event_lines = events.flat_map(|event| {
            let times = event["count"].as_u64().unwrap_or(1) as usize;
            std::iter::repeat_n(format!("{}: {}", event["reason"], event["message"]), times)
        });
        event_lines.collect()
    }

    /// The error, the image, and the pods with their Events.
    fn describe_failure(&self, error: TestError) -> TestError {
        let pods = self.bed.cluster().now(|objects| {
            let pods = self.pods(objects);
            let descriptions = pods.iter().map(|pod| {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                let events = objects.all_events(self.case_objects.opt_in.k8s_namespace(), name);
                let event_lines: Vec<_> =
                    events.iter().map(|event| format!("  {}: {}", event["reason"], event["message"])).collect();
                format!("{name}: {}\n{}", pod["status"]["containerStatuses"], event_lines.join("\n"))
            });
            descriptions.collect::<Vec<_>>().join("\n")
        });
        format!(
            "{error}\n{} from {}, root {}\n{pods}",
            self.case_objects.image, self.case_on_node.provider, self.image.digest
        )
    }

    fn clear(&self) -> Result<(), TestError> {
        if self.case_on_node.case.image_use == ImageUse::StaticPod {
            return fs::remove_file(self.manifest()?).map_err(|error| error.to_string());
        }
        self.case_objects
            .objects(self.case_on_node.case.image_use)
            .iter()
            .try_for_each(|object| self.bed.cluster().delete(object))
    }

    fn manifest(&self) -> Result<std::path::PathBuf, TestError> {
        let folder = self.bed.env(&format!("NODE_{}_MANIFESTS", self.case_on_node.node))?;
        Ok(std::path::Path::new(&folder).join(format!("{}.yaml", self.case_on_node.id)))
    }
}

/// A manifest file of a static pod. JSON is YAML, but the kubelet takes a file that begins with `{`
/// for JSON of another kind.
fn yaml(object: &Value) -> String {
    format!("---\n{object}\n")
}

fn uids(pods: &[&Value]) -> Vec<String> {
    pods.iter().map(|pod| pod["metadata"]["uid"].to_string()).collect()
}

/// Whether the row's container runs or has ended with exit code 0, at the first attempt.
fn has_started(pod: &Value) -> bool {
    let lists = ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"];
    let statuses = lists.iter().filter_map(|list| pod["status"][list].as_array()).flatten();
    statuses.filter(|status| status["name"] == CONTAINER).any(|status| {
        let state = &status["state"];
        let ended = state["terminated"]["exitCode"] == 0;
        (state["running"].is_object() || ended) && status["restartCount"] == json!(0)
    })
}
