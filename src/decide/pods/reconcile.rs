//! Reconciles a pod: whether the pod opted in, and which images the pod lacks.
//!
//! Each decision takes two steps, because the second step needs an answer of the API server and
//! must not block other pods. The pod itself, the policy and this node's image records decide at
//! once. The answer on namespace and owners completes the decision.

use std::collections::BTreeSet;

use super::waiting_pod::{PodOptIn, WaitingPod};
use super::{Action, Observation, Step, notes};
use crate::decide::cause::{Cause, classify, failing_image, is_pending, names_another_host, waits_for_image};
use crate::decide::container_records::{Subject, Topic};
use crate::decide::opt_in::OptOutReason;
use crate::decide::outage::RegistryOutages;
use crate::decide::pull_failure::{Consent, FailedPull, IgnoreReason, NotRecoverable, PullVerdict, decide};
use crate::decide::recovery_queue::JoinOutcome;
use crate::model::{ContainerView, PodRef, PodReportKind, PodView, PullPolicy};
use crate::oci::Reference;

impl Step<'_> {
    pub(super) fn reconcile(&mut self, pod: PodView) {
        for container in pod.containers.iter().filter(|container| container.waiting.is_none()) {
            self.pods.container_records.remove_container(&pod.pod, &container.name);
        }
        let failing = pod.containers.iter().any(waits_for_image);
        if pod.is_ending || !(failing || pod.containers.iter().any(is_pending)) {
            self.pods.container_records.retain_containers(&pod.pod);
            self.stop_waiting(&pod.pod, !pod.is_ending);
            return;
        }
        let now = self.context.now;
        let waiting = self.pods.waiting.entry(pod.pod.clone()).or_insert_with(|| WaitingPod::new(pod.clone(), now));
        waiting.update(pod.clone(), now);
        let is_of_interest = failing || waiting.sandbox_suspected || !self.absent_images(&pod).is_empty();
        match self.context.policy.opt_in.opt_out_reason(&pod) {
            _ if !is_of_interest => self.set_needed_images(&pod.pod, BTreeSet::new()),
            // Needs no API server: the kill switch works during the API server's outage.
            Some(reason) => self.reconcile_opted_out(&pod, reason),
            None => self.read_opt_in(&pod),
        }
    }

    pub(super) fn reconcile_opted_out(&mut self, pod: &PodView, reason: OptOutReason) {
        if let Some(waiting) = self.pods.waiting.get_mut(&pod.pod) {
            waiting.clear_opt_in();
        }
        if self.record_outages(pod, RegistryOutages::has_answered) {
            self.reconcile_pods_in_outages();
        }
        for container in pod.containers.iter().filter(|container| waits_for_image(container)) {
            let (image, _) = failing_image(pod, container);
            let subject = Subject::container(&container.name, image);
            self.record_ignored(&pod.pod, &subject, IgnoreReason::OptedOut(reason));
        }
        self.set_needed_images(&pod.pod, BTreeSet::new());
    }

    pub(super) fn reconcile_opted_in(&mut self, pod: &PodView, opt_in: &PodOptIn) {
        if let Some(waiting) = self.pods.waiting.get_mut(&pod.pod) {
            waiting.opt_in = Some(opt_in.clone());
        }
        if self.record_outages(pod, |_, _| true) {
            self.reconcile_pods_in_outages();
        }
        let failing = pod.containers.iter().filter(|container| waits_for_image(container));
        let mut needed: BTreeSet<_> =
            failing.filter_map(|container| self.on_pull_failure(pod, container, opt_in)).collect();
        for image in self.absent_images(pod) {
            needed.extend(self.on_absent_image(pod, &image, opt_in));
        }
        let sandbox = self.pods.waiting.get(&pod.pod).and_then(|waiting| waiting.missing_sandbox_image.clone());
        if let Some((reference, cause)) = sandbox {
            let image = reference.to_string();
            let subject = Subject::Sandbox(image.clone());
            let cause = self.pods.container_records.record_cause(&pod.pod, &subject, Some(cause));
            let failure = self.failure(&image, PullPolicy::IfNotPresent, cause, "");
            needed.extend(self.on_verdict(&pod.pod, &subject, failure, opt_in));
        }
        self.set_needed_images(&pod.pod, needed);
    }

    /// Reconciles one container that waits for an image. Returns the image if a recovery is due.
    fn on_pull_failure(&mut self, pod: &PodView, container: &ContainerView, opt_in: &PodOptIn) -> Option<Reference> {
        let (image, policy) = failing_image(pod, container);
        let (subject, waiting) = (Subject::container(&container.name, image), container.waiting.as_ref());
        let cause = self.pods.container_records.record_cause(&pod.pod, &subject, waiting.and_then(classify));
        let message = waiting.map_or("", |waiting| waiting.message.as_str());
        let failure = self.failure(image, policy, cause, message);
        let reference = self.on_verdict(&pod.pod, &subject, failure, opt_in)?;
        // The image arrived during the kubelet's own attempt. Without a nudge, the kubelet retries
        // only after its back-off.
        if self.pods.queue.is_settling(&reference) && self.mark_reported(&pod.pod, &subject, Topic::Nudge) {
            self.nudge(pod.pod.clone());
        }
        Some(reference)
    }

    /// Reconciles an image that is absent and that the kubelet has not tried to pull yet, or whose
    /// pull has stalled.
    fn on_absent_image(&mut self, pod: &PodView, image: &str, opt_in: &PodOptIn) -> Option<Reference> {
        let is_stalled = self.pods.waiting.get(&pod.pod).is_some_and(|waiting| waiting.stalled_images.contains(image));
        let cause = if is_stalled { Cause::Stalled } else { Cause::KnownOutage };
        let failure = self.failure(image, PullPolicy::IfNotPresent, Some(cause), "");
        if !failure.may_be_early && !is_stalled {
            self.probe_registry(&image.parse::<Reference>().ok()?.repository().registry);
            return None;
        }
        if self.pods.container_records.is_denied(&pod.pod, image) && !opt_in.on_denied {
            return None;
        }
        // Not a container that runs: the reports about such a container are dropped at each look.
        let container = pod.containers.iter().find(|container| container.image == image && is_pending(container));
        let of_volume = || Subject::Image(image.to_owned());
        let subject = container.map_or_else(of_volume, |container| Subject::container(&container.name, image));
        let needed = self.on_verdict(&pod.pod, &subject, failure, opt_in)?;
        if is_stalled && self.mark_reported(&pod.pod, &subject, Topic::Event(PodReportKind::Stalled)) {
            self.report(pod.pod.clone(), PodReportKind::Stalled, notes::recovered_meanwhile(image));
        }
        Some(needed)
    }

    fn failure<'a>(
        &self,
        image: &'a str,
        pull_policy: PullPolicy,
        cause: Option<Cause>,
        message: &'a str,
    ) -> FailedPull<'a> {
        FailedPull { image, pull_policy, cause, message, may_be_early: self.may_recover_early(image) }
    }

    fn on_verdict(
        &mut self,
        pod: &PodRef,
        subject: &Subject,
        failure: FailedPull<'_>,
        opt_in: &PodOptIn,
    ) -> Option<Reference> {
        let PodOptIn { on_denied, ref repositories, priority } = *opt_in;
        let image = failure.image;
        let recover_on = &self.context.policy.opt_in.recover_on;
        let verdict = decide(failure, Consent { recover_on, on_denied, repositories });
        match &verdict {
            PullVerdict::Recover(reference, _) => {
                let reference = reference.clone();
                self.observe_verdict(pod, subject, Topic::Recovery, verdict);
                self.request_recovery(&reference, pod, subject, priority);
                return Some(reference);
            }
            PullVerdict::Report(reason) => {
                let (note, kind) = (reason.event_text(image), report_kind(reason));
                if self.observe_verdict(pod, subject, Topic::from(reason), verdict) {
                    let (image, pods) = (image.to_owned(), vec![pod.clone()]);
                    self.actions.push(Action::NotifyNotRecovered { image, kind, pods, note: note.clone() });
                    self.report(pod.clone(), kind, note);
                }
            }
            PullVerdict::Ignore(reason) => self.record_ignored(pod, subject, *reason),
        }
        None
    }

    fn request_recovery(&mut self, reference: &Reference, pod: &PodRef, subject: &Subject, priority: i64) {
        match self.pods.queue.join(reference, pod, priority) {
            JoinOutcome::First => {
                let seen_at = self.pods.waiting.get(pod).map_or(self.context.now, |waiting| waiting.seen_at);
                self.pods.requested_since.insert(reference.clone(), seen_at);
            }
            JoinOutcome::Recovered => {
                self.mark_reported(pod, subject, Topic::Nudge);
                self.nudge(pod.clone());
            }
            JoinOutcome::JoinedOthers | JoinOutcome::AlreadyWaiting => {}
        }
    }

    fn record_ignored(&mut self, pod: &PodRef, subject: &Subject, reason: IgnoreReason) {
        if reason == IgnoreReason::CauseUnknown {
            // A later message decides on the failure and counts it. Earlier Events of the kubelet
            // may name the cause.
            if let Some(waiting) = self.pods.waiting.get_mut(pod) {
                waiting.schedule_event_read(self.context.now);
            }
        } else {
            self.observe_verdict(pod, subject, Topic::Ignored(reason), PullVerdict::Ignore(reason));
        }
    }

    /// Whether this is the first report of the topic.
    pub(super) fn mark_reported(&mut self, pod: &PodRef, subject: &Subject, topic: Topic) -> bool {
        self.pods.container_records.mark_reported(pod, subject, topic)
    }

    /// Observes a verdict that is new. Returns whether the verdict is new.
    fn observe_verdict(&mut self, pod: &PodRef, subject: &Subject, topic: Topic, verdict: PullVerdict) -> bool {
        let is_new = self.mark_reported(pod, subject, topic);
        if is_new {
            self.observe(Observation::Verdict { pod: pod.clone(), subject: subject.clone(), verdict });
        }
        is_new
    }

    /// Records the kubelet's fresh messages about failed pulls as evidence. Returns whether a
    /// message reported a fault of a registry.
    ///
    /// Any pod's failed pull is evidence. A pod without opt-in may name any registry, so such a pod
    /// counts only for registries that `is_counted` accepts: those that have answered this agent.
    fn record_outages(&mut self, pod: &PodView, is_counted: impl Fn(&RegistryOutages, &str) -> bool) -> bool {
        let Some(waiting) = self.pods.waiting.get_mut(&pod.pod) else { return false };
        let mut has_recorded = false;
        let fresh = std::mem::take(&mut waiting.fresh_failures);
        // A read of the opt-in may take seconds, and evidence is as old as the pod's status.
        let seen_at = waiting.seen_at;
        let registries = &mut self.pods.registries;
        for container in pod.containers.iter().filter(|container| fresh.contains(&container.name)) {
            let (image, _) = failing_image(pod, container);
            let Ok(reference) = image.parse::<Reference>() else { continue };
            let (registry, waiting) = (&reference.repository().registry, container.waiting.as_ref());
            match waiting.and_then(classify) {
                Some(Cause::Unavailable(kind)) if is_counted(registries, registry) => {
                    let has_mirror = waiting.is_some_and(|waiting| names_another_host(&waiting.message, registry));
                    registries.record_failed_pull(registry, kind, has_mirror, seen_at, self.context.clock);
                    has_recorded = true;
                }
                Some(Cause::NotFound | Cause::Denied) => registries.record_answered_pull(registry),
                _ => {}
            }
        }
        if has_recorded {
            self.actions.push(Action::PublishOutages);
        }
        has_recorded
    }

    /// Reconciles the pod as last seen.
    pub(super) fn reconcile_pod(&mut self, pod: &PodRef) {
        if let Some(view) = self.pods.waiting.get(pod).map(|waiting| waiting.view.clone()) {
            self.reconcile(view);
        }
    }

    pub(super) fn reconcile_all(&mut self) {
        let pods: Vec<_> = self.pods.waiting.keys().cloned().collect();
        pods.iter().for_each(|pod| self.reconcile_pod(pod));
    }

    pub(super) fn on_pod_gone(&mut self, pod: &PodRef) {
        self.pods.container_records.remove_pod(pod);
        self.stop_waiting(pod, false);
    }

    fn stop_waiting(&mut self, pod: &PodRef, has_started: bool) {
        if let Some(waiting) = self.pods.waiting.remove(pod).filter(|_| has_started) {
            if let Some(imported) = waiting.imported_at {
                let after = self.context.now.saturating_duration_since(imported);
                self.observe(Observation::PodStarted { after });
            }
            self.record_started_pod(pod, waiting.needed.iter());
        }
        self.pods.undecided.remove(pod);
        self.set_needed_images(pod, BTreeSet::new());
    }

    /// Records that the pod no longer waits for these images, before the end of a recovery becomes
    /// an input.
    fn record_started_pod<'a>(&mut self, pod: &PodRef, images: impl Iterator<Item = &'a Reference>) {
        for reference in images {
            // Only an image that this recovery has recorded can have started the pod.
            if let Some(running) = self.pods.running.get_mut(reference)
                && self.context.facts.is_recording(reference)
            {
                running.started_pods.insert(pod.clone());
            }
        }
    }

    fn set_needed_images(&mut self, pod: &PodRef, needed: BTreeSet<Reference>) {
        // A container may have started while others of the pod wait.
        let before = self.pods.waiting.get(pod).map(|waiting| waiting.needed.clone()).unwrap_or_default();
        self.record_started_pod(pod, before.difference(&needed));
        for reference in self.pods.queue.retain_wanted(pod, &needed) {
            self.pods.unprovided_blobs.remove(&reference);
            self.pods.requested_since.remove(&reference);
            if let Some(running) = self.pods.running.get_mut(&reference)
                && !std::mem::replace(&mut running.is_canceled, true)
            {
                self.actions.push(Action::Cancel(reference));
            }
        }
        if let Some(waiting) = self.pods.waiting.get_mut(pod) {
            waiting.needed = needed;
        }
    }
}

fn report_kind(reason: &NotRecoverable) -> PodReportKind {
    match reason {
        NotRecoverable::NotUnderstood(_) => PodReportKind::Unclassified,
        NotRecoverable::Stalled => PodReportKind::Stalled,
        _ => PodReportKind::NotRecoverable,
    }
}
