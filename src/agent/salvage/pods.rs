//! What each pod needs: whether it is to be helped, and which images it lacks.
//!
//! A pod is decided on in two steps, because the second needs the API server and must hold up nobody: what its own words, the rules and
//! this node's images tell is seen at once; its namespace and its owners are asked for beside, and the answer decides.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::waiting::{Helped, WaitingPod};
use super::{Done, Salvager, now};
use crate::agent::notices::Notice;
use crate::agent::registries::Registries;
use crate::decide::cause::{Cause, cause, image_in_question, is_pending, names_another_host, waits_for_image};
use crate::decide::opt_in::{NotHelped, OddAnnotation, OptIn, Policy};
use crate::decide::pull_failure::{Consent, Failure, Leave, NotActionable, STALLED, Verdict, decide};
use crate::decide::queue::Joined;
use crate::model::{ContainerView, PodRef, PodView, PullPolicy};
use crate::oci::Reference;
use crate::ports::{Annotations, Cluster, ClusterError, NamespaceView, ReportKind};

/// How soon a pod is looked at again whose namespace could not be read. Longer than the 5 s for which the adapter remembers that the API
/// server did not answer.
const UNDECIDED_RETRY: Duration = Duration::from_secs(6);

/// Odd annotations that are told apart. More are counted as seen.
const MAX_ODD: usize = 256;

/// What the API server says about whether a pod is to be helped.
pub(super) struct Permission {
    namespace: Arc<NamespaceView>,
    /// Where the pod leaves it to them.
    owners: Option<Vec<Arc<Annotations>>>,
}

impl Permission {
    async fn ask(cluster: &dyn Cluster, policy: &Policy, pod: &PodView) -> Result<Self, ClusterError> {
        let namespace = cluster.namespace(&pod.pod.k8s_namespace).await?;
        let (labels, annotations) = (&namespace.labels, &namespace.annotations);
        let opt_in = policy.opt_in(pod, labels, annotations, None, &mut Vec::new());
        let owners = match (opt_in, &pod.owner) {
            (OptIn::AskOwners, Some(owner)) => Some(cluster.owners(&pod.pod.k8s_namespace, owner).await?),
            _ => None,
        };
        Ok(Self { namespace, owners })
    }
}

impl Salvager {
    pub(super) fn on_pod(&mut self, pod: PodView) {
        for container in pod.containers.iter().filter(|container| container.waiting.is_none()) {
            self.ledger.settle(&pod.pod, &container.name);
        }
        let failing = pod.containers.iter().any(waits_for_image);
        if pod.ending || !(failing || pod.containers.iter().any(is_pending)) {
            // What was said about images of no one container counts anew from here on.
            self.ledger.settle(&pod.pod, "");
            self.stop_waiting(&pod.pod, !pod.ending);
            return;
        }
        let waiting = self.waiting.entry(pod.pod.clone()).or_insert_with(|| WaitingPod::new(pod.clone(), now()));
        waiting.see(pod.clone(), now());
        let is_of_interest = failing || waiting.sandbox_suspected || !self.absent_images(&pod).is_empty();
        let refusal = self.rules.borrow().policy.refusal(&pod);
        match refusal {
            _ if !is_of_interest => self.needs_only(&pod.pod, BTreeSet::new()),
            // Told without asking anybody, so that the kill switch works while the API server is away.
            Some(reason) => self.do_not_help(&pod, reason),
            None => self.ask_permission(&pod),
        }
    }

    /// One question for a pod at a time; the answer decides on the pod as it is by then.
    fn ask_permission(&mut self, pod: &PodView) {
        let Some(waiting) = self.waiting.get_mut(&pod.pod).filter(|waiting| !waiting.is_asked_for) else { return };
        waiting.is_asked_for = true;
        let (rules, cluster) = (Arc::clone(&self.rules.borrow()), Arc::clone(&self.cluster));
        let (pod, asking, stopping) = (pod.clone(), Arc::clone(&self.asking), self.stopping.clone());
        self.work.spawn(async move {
            let question = async {
                let _turn = asking.acquire().await;
                Permission::ask(&*cluster, &rules.policy, &pod).await
            };
            let said = stopping.run_until_cancelled(question).await;
            said.map_or(Done::Told, |said| Done::Permitted { pod: pod.pod, said })
        });
    }

    pub(super) fn on_permission(&mut self, pod: &PodRef, said: Result<Permission, ClusterError>) {
        let Some(waiting) = self.waiting.get_mut(pod) else { return };
        waiting.is_asked_for = false;
        let view = waiting.view.clone();
        let Permission { namespace, owners } = match said {
            Ok(permission) => permission,
            Err(error) => return self.put_off(pod, &error),
        };
        self.undecided.remove(pod);
        let mut odd = Vec::new();
        let owners = owners.as_ref().map(|owners| owners.iter().map(|owner| &**owner).collect::<Vec<_>>());
        let rules = Arc::clone(&self.rules.borrow());
        let (labels, annotations) = (&namespace.labels, &namespace.annotations);
        let opt_in = rules.policy.opt_in(&view, labels, annotations, owners.as_deref(), &mut odd);
        let priority = rules.policy.priority(&view, &mut odd);
        self.complain(&view, odd);
        match opt_in {
            OptIn::Yes { on_denied, repositories } => self.help(&view, &Helped { on_denied, repositories, priority }),
            OptIn::No(reason) => self.do_not_help(&view, reason),
            // Its annotations changed while the API server was asked.
            OptIn::AskOwners => self.ask_permission(&view),
        }
    }

    fn do_not_help(&mut self, pod: &PodView, reason: NotHelped) {
        if let Some(waiting) = self.waiting.get_mut(&pod.pod) {
            waiting.do_not_help();
        }
        if self.learn_of_outages(pod, Registries::has_answered) {
            self.look_at_outages();
        }
        for container in pod.containers.iter().filter(|container| waits_for_image(container)) {
            let (image, _) = image_in_question(pod, container);
            self.leave(pod, &container.name, image, Leave::NotHelped(reason));
        }
        self.needs_only(&pod.pod, BTreeSet::new());
    }

    fn help(&mut self, pod: &PodView, helped: &Helped) {
        if let Some(waiting) = self.waiting.get_mut(&pod.pod) {
            waiting.helped = Some(helped.clone());
        }
        if self.learn_of_outages(pod, |_, _| true) {
            self.look_at_outages();
        }
        let failing = pod.containers.iter().filter(|container| waits_for_image(container));
        let mut needed: BTreeSet<_> = failing.filter_map(|container| self.on_failure(pod, container, helped)).collect();
        for (image, policy) in self.absent_images(pod) {
            needed.extend(self.on_absence(pod, &image, policy, helped));
        }
        let sandbox = self.waiting.get(&pod.pod).and_then(|waiting| waiting.sandbox.clone());
        if let Some((reference, cause)) = sandbox {
            let image = reference.to_string();
            let cause = self.ledger.learn(&pod.pod, "", &image, Some(cause));
            let failure = self.failure(&image, PullPolicy::IfNotPresent, cause, "");
            needed.extend(self.on_verdict(pod, "", failure, helped));
        }
        self.needs_only(&pod.pod, needed);
    }

    /// One container that waits for its image; answers the image if it is to be recovered.
    fn on_failure(&mut self, pod: &PodView, container: &ContainerView, helped: &Helped) -> Option<Reference> {
        let (image, policy) = image_in_question(pod, container);
        let waiting = container.waiting.as_ref();
        let known = self.ledger.learn(&pod.pod, &container.name, image, waiting.and_then(cause));
        let said = waiting.map_or("", |waiting| waiting.message.as_str());
        let failure = self.failure(image, policy, known, said);
        let reference = self.on_verdict(pod, &container.name, failure, helped)?;
        // The image came while the kubelet was still trying to pull it: it does not look again by itself for a while.
        if self.queue.is_here(&reference) && self.ledger.is_news(&pod.pod, &container.name, image, "nudged") {
            self.spawn_nudge(pod.pod.clone());
        }
        Some(reference)
    }

    /// An image that is not here and that nobody has failed to pull yet.
    fn on_absence(&mut self, pod: &PodView, image: &str, policy: PullPolicy, helped: &Helped) -> Option<Reference> {
        let is_stalled = self.waiting.get(&pod.pod).is_some_and(|waiting| waiting.stalled.contains(image));
        let cause = if is_stalled { Cause::Stalled } else { Cause::KnownOutage };
        let failure = self.failure(image, policy, Some(cause), "");
        if !failure.may_be_early && !is_stalled {
            self.ask_registry(&image.parse::<Reference>().ok()?.repository().registry);
            return None;
        }
        if self.ledger.is_denied(&pod.pod, image) && !helped.on_denied {
            return None;
        }
        let of_container = pod.containers.iter().find(|container| container.image == image);
        let name = of_container.map_or("", |container| container.name.as_str());
        let needed = self.on_verdict(pod, name, failure, helped)?;
        if is_stalled && self.ledger.is_news(&pod.pod, name, image, ReportKind::Stalled.reason()) {
            let note =
                format!("{STALLED} {image} is brought from peers meanwhile: new pods of this node find it at once.");
            self.spawn_report(pod.pod.clone(), ReportKind::Stalled, note);
        }
        Some(needed)
    }

    fn failure<'a>(&self, image: &'a str, policy: PullPolicy, cause: Option<Cause>, said: &'a str) -> Failure<'a> {
        let reference = image.parse::<Reference>();
        let may_be_early = reference.is_ok_and(|reference| self.registries.may_recover_early(&reference, now()));
        Failure { image, pull_policy: policy, cause, said, may_be_early }
    }

    fn on_verdict(
        &mut self,
        pod: &PodView,
        container: &str,
        failure: Failure<'_>,
        helped: &Helped,
    ) -> Option<Reference> {
        let rules = Arc::clone(&self.rules.borrow());
        let Helped { on_denied, ref repositories, priority } = *helped;
        let image = failure.image;
        match decide(failure, Consent { salvage_on: &rules.policy.salvage_on, on_denied, repositories }) {
            Verdict::Recover(reference, cause) => {
                if self.ledger.is_news(&pod.pod, container, image, "recover") {
                    self.metrics.pod_failure_seen("recover");
                    tracing::info!(pod = %pod.pod, container, %reference, ?cause, "a pod cannot get its image");
                }
                self.want(&reference, pod, container, image, priority);
                return Some(reference);
            }
            Verdict::Tell(reason) => {
                if self.ledger.is_news(&pod.pod, container, image, reason.label()) {
                    self.metrics.pod_failure_seen(reason.label());
                    let note = reason.note(image);
                    tracing::info!(pod = %pod.pod, container, note, "not actionable");
                    let pods = std::slice::from_ref(&pod.pod);
                    let kind = match reason {
                        NotActionable::NotUnderstood(_) => ReportKind::NotUnderstood,
                        NotActionable::Stalled => ReportKind::Stalled,
                        _ => ReportKind::NotActionable,
                    };
                    self.notices.send(Notice::not_recovered(image, kind, pods, &note));
                    self.spawn_report(pod.pod.clone(), kind, note);
                }
            }
            Verdict::Leave(reason) => self.leave(pod, container, image, reason),
        }
        None
    }

    fn want(&mut self, reference: &Reference, pod: &PodView, container: &str, image: &str, priority: i64) {
        match self.queue.want(reference, &pod.pod, priority) {
            Joined::First => {
                let came = self.waiting.get(&pod.pod).map_or_else(now, |waiting| waiting.came);
                self.wanted_since.insert(reference.clone(), came);
            }
            Joined::Here => {
                self.ledger.is_news(&pod.pod, container, image, "nudged");
                self.spawn_nudge(pod.pod.clone());
            }
            Joined::Others | Joined::Already => {}
        }
    }

    fn leave(&mut self, pod: &PodView, container: &str, image: &str, reason: Leave) {
        if reason == Leave::CauseUnknown {
            // The failure is decided on, and counted, when the cause is known. What the kubelet said before may name it.
            if let Some(waiting) = self.waiting.get_mut(&pod.pod) {
                waiting.ask_for_a_cause(now());
            }
        } else if self.ledger.is_news(&pod.pod, container, image, reason.label()) {
            self.metrics.pod_failure_seen(reason.label());
            tracing::debug!(pod = %pod.pod, container, ?reason, "left alone");
        }
    }

    /// Images of containers that the kubelet has not come to, and of volumes, that are not on this node and that it would look for first.
    pub(super) fn absent_images(&self, pod: &PodView) -> Vec<(String, PullPolicy)> {
        let here = self.names_here.borrow();
        // What is here is not known yet, right after the start.
        let Some(here) = here.as_ref().filter(|_| pod.containers.iter().any(is_pending)) else { return Vec::new() };
        let containers = pod.containers.iter().filter(|container| is_pending(container));
        let of_containers = containers.map(|container| (&container.image, container.pull_policy));
        let of_volumes = pod.image_volumes.iter().map(|volume| (&volume.image, volume.pull_policy));
        let is_absent =
            |image: &str| image.parse::<Reference>().is_ok_and(|reference| !here.contains_key(&reference.to_string()));
        let absent: BTreeSet<_> = of_containers
            .chain(of_volumes)
            .filter(|(image, policy)| *policy == PullPolicy::IfNotPresent && is_absent(image))
            .map(|(image, _)| image.clone())
            .collect();
        absent.into_iter().map(|image| (image, PullPolicy::IfNotPresent)).collect()
    }

    /// Learns from the kubelet's words about a pull that just failed. Whether they told of a fault of a registry.
    ///
    /// Any pod's failed pull is evidence. A pod that is not helped may name any registry, so only registries that `counts` accepts are
    /// learnt of from it: those that have answered this agent.
    fn learn_of_outages(&mut self, pod: &PodView, counts: impl Fn(&Registries, &str) -> bool) -> bool {
        let Some(waiting) = self.waiting.get_mut(&pod.pod) else { return false };
        let mut has_news = false;
        let fresh = std::mem::take(&mut waiting.fresh_failures);
        // Permission may take seconds to ask for, and evidence is as old as the pod's status.
        let seen = waiting.came;
        for container in pod.containers.iter().filter(|container| fresh.contains(&container.name)) {
            let (image, _) = image_in_question(pod, container);
            let cause = container.waiting.as_ref().and_then(cause);
            let Ok(reference) = image.parse::<Reference>() else { continue };
            let registry = &reference.repository().registry;
            match cause {
                Some(Cause::Unavailable(kind)) if counts(&self.registries, registry) => {
                    let said = container.waiting.as_ref().map_or("", |waiting| waiting.message.as_str());
                    self.registries.pull_failed(registry, kind, names_another_host(said, registry), seen);
                    has_news = true;
                }
                Some(Cause::NotFound | Cause::Denied) => self.registries.pull_answered(registry),
                _ => {}
            }
        }
        has_news
    }

    fn complain(&mut self, pod: &PodView, odd: Vec<OddAnnotation>) {
        for annotation in odd {
            if self.odd.len() < MAX_ODD && self.odd.insert(annotation.clone()) {
                self.metrics.odd_annotation_seen();
                let OddAnnotation { key, value } = annotation;
                tracing::warn!(pod = %pod.pod, key, value, "an annotation's value is not understood, so it permits nothing; use \"true\"");
            }
        }
    }

    fn put_off(&mut self, pod: &PodRef, error: &ClusterError) {
        self.decide_again_at.get_or_insert(now() + UNDECIDED_RETRY);
        if self.undecided.insert(pod.clone()) {
            tracing::warn!(%pod, %error, "cannot read the pod's namespace or owner, so whether it opted in; trying again");
        }
    }

    pub(super) fn decide_again(&mut self) {
        if self.decide_again_at.is_none_or(|at| at > now()) {
            return;
        }
        self.decide_again_at = None;
        for pod in self.undecided.clone() {
            self.look_at(&pod);
        }
    }

    /// Decides anew on a pod as it was last seen.
    pub(super) fn look_at(&mut self, pod: &PodRef) {
        if let Some(view) = self.waiting.get(pod).map(|waiting| waiting.view.clone()) {
            self.on_pod(view);
        }
    }

    /// Decides anew on every pod that waits.
    pub(super) fn look_at_all(&mut self) {
        let pods: Vec<_> = self.waiting.keys().cloned().collect();
        for pod in pods {
            self.look_at(&pod);
        }
    }

    pub(super) fn on_gone(&mut self, pod: &PodRef) {
        self.ledger.forget(pod);
        self.stop_waiting(pod, false);
    }

    fn stop_waiting(&mut self, pod: &PodRef, goes_on: bool) {
        if let Some(waited) = self.waiting.remove(pod).filter(|_| goes_on) {
            if let Some(imported) = waited.imported {
                self.metrics.pod_went_on(now().saturating_duration_since(imported));
            }
            self.note_went_on(pod, waited.needed.iter());
        }
        self.undecided.remove(pod);
        self.needs_only(pod, BTreeSet::new());
    }

    /// It waits for these images no more, before we heard that one of them has come.
    fn note_went_on<'a>(&mut self, pod: &PodRef, images: impl Iterator<Item = &'a Reference>) {
        for reference in images {
            // Only the image that we just named can have made it go on.
            if let Some(running) = self.running.get_mut(reference).filter(|running| running.progress.is_named()) {
                running.went_on.insert(pod.clone());
            }
        }
    }

    fn needs_only(&mut self, pod: &PodRef, needed: BTreeSet<Reference>) {
        // One of its containers may have gone on while others wait.
        let before = self.waiting.get(pod).map(|waiting| waiting.needed.clone()).unwrap_or_default();
        self.note_went_on(pod, before.difference(&needed));
        for reference in self.queue.needs_only(pod, &needed) {
            self.lacking.remove(&reference);
            self.wanted_since.remove(&reference);
            if let Some(running) = self.running.get(&reference) {
                running.stop.cancel();
            }
        }
        if let Some(waiting) = self.waiting.get_mut(pod) {
            waiting.needed = needed;
        }
    }
}
