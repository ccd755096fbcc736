//! Plays rows: gives the images to the nodes that are to hold them, makes the pods, and looks what comes of it.

use std::collections::BTreeMap;
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde_json::{Value, json};

use super::objects::{CONTAINER, LABEL, Made, namespaces};
use super::{Asks, Case, Here, Nodes, Opted, ROWS, Then, Wants};
use crate::api::Objects;
use crate::bed::{Bed, Failure, NODES};
use crate::images::{Image, Maker, PLAIN, write_layouts};
use crate::pods::{PATIENCE, Space};
use crate::registries::{INVENTED_PORT, World};

/// A row on a node.
pub(crate) struct Turn {
    case: &'static Case,
    id: String,
    node: &'static str,
    holder: &'static str,
}

impl Turn {
    /// All of them, under the names that tests have. Holder and node never have the same containerd.
    pub(crate) fn all() -> Vec<(String, Self)> {
        // The product of rows and nodes, for measurements outside CI.
        let is_product = std::env::var_os("LIGHTERMAN_EVERY_NODE").is_some();
        let mut turns = Vec::new();
        for (place, case) in ROWS.iter().enumerate() {
            for (number, (node, _)) in NODES.iter().enumerate() {
                let chosen = match case.nodes {
                    Nodes::One => is_product || number == place % NODES.len(),
                    Nodes::Each => true,
                    Nodes::Only(only) => only.contains(node),
                };
                if chosen {
                    let (holder, _) = NODES[(number + 1) % NODES.len()];
                    let id = format!("{}-{node}", case.slug());
                    turns.push((format!("case::{}::{node}", case.name), Self { case, id, node, holder }));
                }
            }
        }
        turns
    }

    /// The image's name at its holder, and what the pod asks for.
    fn names(&self, image: &Image) -> (String, String) {
        let (id, root) = (&self.id, &image.root);
        let registry = self.case.world.registry();
        let repository = format!("{registry}/{id}/app");
        let tagged = format!("{repository}:v1");
        match self.case.asks {
            Asks::Tag => (tagged.clone(), tagged),
            Asks::Digest => (tagged, format!("{repository}@{root}")),
            Asks::TagAndDigest => (tagged.clone(), format!("{tagged}@{root}")),
            Asks::ImpliedLatest => (format!("{repository}:latest"), repository),
            Asks::ShortName => (format!("docker.io/library/{id}:v1"), format!("{id}:v1")),
            Asks::HostName => {
                let name = format!("registry.nowhere.test/team/{id}:v1");
                (name.clone(), name)
            }
            Asks::LongName => {
                let name = format!("{registry}/{id:l<100}/{}:{}", "n".repeat(99), "t".repeat(128));
                (name.clone(), name)
            }
            Asks::OtherRegistry => {
                let host = registry.split(':').next().unwrap_or_default();
                (tagged, format!("{host}:{INVENTED_PORT}/{id}/app@{root}"))
            }
            Asks::OtherRepository => (tagged, format!("{registry}/{id}/stranger@{root}")),
        }
    }

    /// An image that is to be brought to the same node afterwards: once it is there, the agent has looked at what came before.
    fn witness(&self) -> Option<String> {
        (!self.case.then.runs()).then(|| format!("{}/{}/witness:v1", World::Refuses.registry(), self.id))
    }
}

/// Images that were made and given out, and the cluster that rows are played on.
pub(crate) struct Stage {
    images: BTreeMap<String, Image>,
    played: AtomicUsize,
    ended_well: AtomicUsize,
}

impl Stage {
    /// Makes the images of these rows and gives them to those who hold them.
    pub(crate) fn set(bed: &Bed, turns: &[&Turn]) -> Result<Self, Failure> {
        for namespace in namespaces() {
            bed.cluster().apply(&namespace)?;
            Space::wait_usable(bed, namespace["metadata"]["name"].as_str().unwrap_or_default())?;
        }
        let maker = Maker::new(&bed.busybox())?;
        let made = turns.iter().map(|turn| (turn.id.clone(), maker.make(turn.case.recipe, &turn.id)));
        let images: BTreeMap<_, _> = made.collect();
        for turn in turns {
            bed.registries().publish(&format!("{}/app:v1", turn.id), &images[&turn.id]);
        }
        let witness = maker.make(PLAIN, "witness");
        for (node, _) in NODES {
            let mut given = Vec::new();
            let mut taken = Vec::new();
            for turn in turns {
                let image = &images[&turn.id];
                let (name, asked) = turn.names(image);
                if turn.holder == node {
                    given.push((name, image));
                    given.extend(turn.witness().map(|name| (name, &witness)));
                } else if turn.node == node {
                    let missing = match turn.case.here {
                        Here::Nothing => continue,
                        Here::NoLayer => image.own_layer.clone(),
                        Here::NoConfig => Some(image.config.clone()),
                    };
                    given.push((asked, image));
                    taken.extend(missing);
                }
            }
            import(bed, node, &given)?;
            if !taken.is_empty() {
                let taken: Vec<_> = taken.iter().map(String::as_str).collect();
                bed.ctl(&[&["ctr", node, "content", "rm"], &taken[..]].concat())?;
            }
        }
        Ok(Self { images, played: AtomicUsize::new(0), ended_well: AtomicUsize::new(0) })
    }

    /// Plays one row, and takes its pods away again.
    pub(crate) fn play(&self, bed: &Bed, turn: &Turn) -> Result<(), Failure> {
        let image = self.images.get(&turn.id).ok_or("its image was not made")?;
        let (_, asked) = turn.names(image);
        let Case { policy, opted, .. } = *turn.case;
        let made = Made { id: &turn.id, node: turn.node, image: &asked, policy, opted };
        let act = Act { bed, turn, made, image };
        self.played.fetch_add(1, Ordering::Relaxed);
        let outcome = act.begin().and_then(|()| act.end()).map_err(|error| act.story(error));
        act.clear()?;
        outcome?;
        self.ended_well.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// How many rows ended as they have to, of how many that were played.
    pub(crate) fn score(&self) -> (usize, usize) {
        (self.ended_well.load(Ordering::Relaxed), self.played.load(Ordering::Relaxed))
    }
}

/// Gives images to a node, recorded under these names and not unpacked.
pub(crate) fn import(bed: &Bed, node: &str, images: &[(String, &Image)]) -> Result<(), Failure> {
    let [whole, partial] = write_layouts(images, bed.folder(), node)?;
    // By default containerd 2 imports through its transfer service, which chooses the platforms by itself.
    let local: &[&str] = if node == "n17" { &[] } else { &["--local"] };
    for (layout, platforms) in [(whole, &["--all-platforms"][..]), (partial, &[])] {
        if let Some(layout) = layout {
            let command = ["ctr", node, "images", "import", "--no-unpack"];
            bed.ctl(&[&command[..], local, platforms, &[layout.as_str()]].concat())?;
        }
    }
    Ok(())
}

/// A row while it is played.
struct Act<'a> {
    bed: &'a Bed,
    turn: &'a Turn,
    made: Made<'a>,
    image: &'a Image,
}

impl Act<'_> {
    fn begin(&self) -> Result<(), Failure> {
        let wants = self.turn.case.wants;
        let objects = self.made.objects(wants);
        if wants == Wants::StaticPod {
            return fs::write(self.manifest()?, yaml(&objects[0])).map_err(|error| error.to_string());
        }
        objects.iter().try_for_each(|object| self.bed.cluster().apply(object))?;
        if wants == Wants::Ephemeral {
            let pod = self.bed.cluster().wait("the pod itself to run", PATIENCE, |objects| {
                let pod = *self.pods(objects).first()?;
                (pod["status"]["phase"] == "Running").then(|| pod.clone())
            })?;
            self.bed.cluster().patch_part(&pod, "ephemeralcontainers", &self.made.ephemeral())?;
        }
        Ok(())
    }

    fn end(&self) -> Result<(), Failure> {
        match self.turn.case.then {
            Then::Runs => self.runs().map(drop),
            Then::RunsWithoutOutage => {
                let note = self.runs()?;
                // The Event gives the beginning of an outage that this node has found.
                let blames = note.contains("has failed since");
                if blames { Err(format!("the fault counts as an outage: {note}")) } else { Ok(()) }
            }
            Then::Told(reason, words) => {
                let told = |objects: &Objects| self.notes(objects, reason).into_iter().next();
                let note = self.bed.cluster().wait(&format!("an Event {reason}"), PATIENCE, told)?;
                let lower = note.to_lowercase();
                if let Some(word) = words.iter().find(|word| !lower.contains(**word)) {
                    return Err(format!("the Event does not say {word:?}: {note}"));
                }
                self.wait_for_two_failures()?;
                self.call_witness()?;
                self.nothing_came()?;
                let said = self.bed.cluster().now(|objects| self.ours(objects));
                if said.len() == 1 { Ok(()) } else { Err(format!("one Event was to be seen, not {said:#?}")) }
            }
            Then::Untouched => {
                self.wait_for_two_failures()?;
                self.call_witness()?;
                self.nothing_came()?;
                let said = self.bed.cluster().now(|objects| self.ours(objects));
                if said.is_empty() { Ok(()) } else { Err(format!("nothing was to be said: {said:#?}")) }
            }
        }
    }

    /// Waits until the container runs; the note of the Event about it.
    fn runs(&self) -> Result<String, Failure> {
        let wants = self.turn.case.wants;
        let many = if wants == Wants::TwoPods { 2 } else { 1 };
        let started = |objects: &Objects| {
            let pods = self.pods(objects);
            (pods.len() >= many && pods.iter().all(|pod| has_started(pod))).then(|| uids(&pods))
        };
        let first = self.bed.cluster().wait("a first pod", PATIENCE, |objects| {
            let pods = self.pods(objects);
            (pods.len() >= many).then(|| uids(&pods))
        })?;
        let last = self.bed.cluster().wait("the container to start", PATIENCE, started)?;
        if first != last {
            return Err(format!("pods were deleted and made again: {first:?}, then {last:?}"));
        }
        let note = self.bed.cluster().wait("the Event ImageSalvaged", PATIENCE, |objects| {
            self.notes(objects, "ImageSalvaged").into_iter().next()
        })?;
        let repository = self.turn.id.as_str();
        let is_named = note.contains(repository) || self.turn.case.asks == Asks::LongName;
        if is_named { Ok(note) } else { Err(format!("the Event does not name the image: {note}")) }
    }

    /// Twice, so that what is to be said once had a second occasion.
    fn wait_for_two_failures(&self) -> Result<(), Failure> {
        let never = self.turn.case.policy == "Never";
        self.bed.cluster().wait("the kubelet to fail, and fail again", PATIENCE, |objects| {
            let pod = *self.pods(objects).first()?;
            let name = pod["metadata"]["name"].as_str()?;
            let failures = objects.events(self.made.opted.k8s_namespace(), name, "Failed");
            let count: u64 = failures.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum();
            // An attempt that failed is two Events: what went wrong, and "Error: ErrImagePull".
            (count >= if never { 2 } else { 4 }).then_some(())
        })
    }

    fn call_witness(&self) -> Result<(), Failure> {
        let image = self.turn.witness().ok_or("no witness was made")?;
        let id = format!("w-{}", self.turn.id);
        let witness = Made { id: &id, image: &image, opted: Opted::Pod, policy: "IfNotPresent", node: self.turn.node };
        let objects = witness.objects(Wants::Container);
        objects.iter().try_for_each(|object| self.bed.cluster().apply(object))?;
        let runs =
            |objects: &Objects| objects.labelled(LABEL, &id).first().is_some_and(|pod| has_started(pod)).then_some(());
        let outcome = self.bed.cluster().wait("the witness to run", PATIENCE, runs);
        objects.iter().try_for_each(|object| self.bed.cluster().delete(object))?;
        outcome
    }

    fn nothing_came(&self) -> Result<(), Failure> {
        if self.bed.cluster().now(|objects| self.pods(objects).iter().any(|pod| has_started(pod))) {
            return Err("it runs".into());
        }
        let recorded = self.bed.ctl(&["ctr", self.turn.node, "images", "ls", "-q"])?;
        let about_it = |line: &&str| line.contains(&self.turn.id) && !line.contains("/witness");
        match recorded.lines().find(about_it) {
            Some(line) => Err(format!("its image was brought: {line}")),
            None => Ok(()),
        }
    }

    fn pods<'o>(&self, objects: &'o Objects) -> Vec<&'o Value> {
        objects.labelled(LABEL, &self.turn.id)
    }

    /// What Events with this reason say about its pods.
    fn notes(&self, objects: &Objects, reason: &str) -> Vec<String> {
        let names = self.pods(objects);
        let names = names.iter().filter_map(|pod| pod["metadata"]["name"].as_str());
        let events = names.flat_map(|name| objects.events(self.made.opted.k8s_namespace(), name, reason));
        events.filter_map(|event| event["message"].as_str().map(str::to_owned)).collect()
    }

    /// Everything that an agent said about its pods, as often as it was said.
    fn ours(&self, objects: &Objects) -> Vec<String> {
        let names = self.pods(objects);
        let names = names.iter().filter_map(|pod| pod["metadata"]["name"].as_str());
        let events = names.flat_map(|name| objects.events_of("lighterman", self.made.opted.k8s_namespace(), name));
        let said = events.flat_map(|event| {
            let times = event["count"].as_u64().unwrap_or(1) as usize;
            std::iter::repeat_n(format!("{}: {}", event["reason"], event["message"]), times)
        });
        said.collect()
    }

    /// What is known about a row that failed.
    fn story(&self, error: Failure) -> Failure {
        let pods = self.bed.cluster().now(|objects| {
            let pods = self.pods(objects);
            let told = pods.iter().map(|pod| {
                let name = pod["metadata"]["name"].as_str().unwrap_or_default();
                let said = objects.all_events(self.made.opted.k8s_namespace(), name);
                let said: Vec<_> =
                    said.iter().map(|event| format!("  {}: {}", event["reason"], event["message"])).collect();
                format!("{name}: {}\n{}", pod["status"]["containerStatuses"], said.join("\n"))
            });
            told.collect::<Vec<_>>().join("\n")
        });
        format!("{error}\n{} from {}, root {}\n{pods}", self.made.image, self.turn.holder, self.image.root)
    }

    fn clear(&self) -> Result<(), Failure> {
        if self.turn.case.wants == Wants::StaticPod {
            return fs::remove_file(self.manifest()?).map_err(|error| error.to_string());
        }
        self.made.objects(self.turn.case.wants).iter().try_for_each(|object| self.bed.cluster().delete(object))
    }

    fn manifest(&self) -> Result<std::path::PathBuf, Failure> {
        let folder = self.bed.env(&format!("NODE_{}_MANIFESTS", self.turn.node))?;
        Ok(std::path::Path::new(&folder).join(format!("{}.yaml", self.turn.id)))
    }
}

/// JSON is YAML, but the kubelet takes a file that begins with `{` for JSON of the wrong kind.
fn yaml(object: &Value) -> String {
    format!("---\n{object}\n")
}

fn uids(pods: &[&Value]) -> Vec<String> {
    pods.iter().map(|pod| pod["metadata"]["uid"].to_string()).collect()
}

/// Whether the container that it is about runs, or has ended as it should, at the first attempt.
fn has_started(pod: &Value) -> bool {
    let lists = ["containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"];
    let statuses = lists.iter().filter_map(|list| pod["status"][list].as_array()).flatten();
    statuses.filter(|status| status["name"] == CONTAINER).any(|status| {
        let state = &status["state"];
        let ended = state["terminated"]["exitCode"] == 0;
        (state["running"].is_object() || ended) && status["restartCount"] == json!(0)
    })
}
