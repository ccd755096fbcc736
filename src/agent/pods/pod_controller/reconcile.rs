//! Reconciles a pod: whether the pod opted in, and which images the pod lacks.
//!
//! Each decision takes two steps, because the second step reads from the API server and must not
//! block other pods. The pod itself, the policy and this node's image records decide at once. A
//! task beside the controller reads namespace and owners, and the result completes the decision.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::waiting_pod::{PodOptIn, WaitingPod};
use super::{PodController, now};
use crate::agent::pods::notifications::PendingNotification;
use crate::agent::pods::registry_health::RegistryHealth;
use crate::decide::cause::{Cause, classify, failing_image, is_pending, names_another_host, waits_for_image};
use crate::decide::container_records::{Subject, Topic};
use crate::decide::opt_in::OptOutReason;
use crate::decide::pull_failure::{Consent, FailedPull, IgnoreReason, NotRecoverable, PullVerdict, STALLED, decide};
use crate::decide::recovery_queue::JoinOutcome;
use crate::model::{ContainerView, PodRef, PodReportKind, PodView, PullPolicy};
use crate::oci::Reference;

impl PodController {
    pub(super) fn reconcile(&mut self, pod: PodView) {
        for container in pod.containers.iter().filter(|container| container.waiting.is_none()) {
            self.container_records.remove_container(&pod.pod, &container.name);
        }
        let failing = pod.containers.iter().any(waits_for_image);
        if pod.is_ending || !(failing || pod.containers.iter().any(is_pending)) {
            // Resets the Events already sent for the pod as a whole.
            self.container_records.retain_containers(&pod.pod);
            self.stop_waiting(&pod.pod, !pod.is_ending);
            return;
        }
        let waiting = self.waiting.entry(pod.pod.clone()).or_insert_with(|| WaitingPod::new(pod.clone(), now()));
        waiting.update(pod.clone(), now());
        let is_of_interest = failing || waiting.sandbox_suspected || !self.absent_images(&pod).is_empty();
        let opt_out = self.policy.borrow().opt_in.opt_out_reason(&pod);
        match opt_out {
            _ if !is_of_interest => self.set_needed_images(&pod.pod, BTreeSet::new()),
            // Needs no API server: the kill switch works during the API server's outage.
            Some(reason) => self.reconcile_opted_out(&pod, reason),
            None => self.read_opt_in(&pod),
        }
    }

    pub(super) fn reconcile_opted_out(&mut self, pod: &PodView, reason: OptOutReason) {
        if let Some(waiting) = self.waiting.get_mut(&pod.pod) {
            waiting.clear_opt_in();
        }
        if self.record_outages(pod, RegistryHealth::has_answered) {
            self.reconcile_pods_in_outages();
        }
        for container in pod.containers.iter().filter(|container| waits_for_image(container)) {
            let (image, _) = failing_image(pod, container);
            self.record_ignored(pod, &Subject::container(&container.name, image), IgnoreReason::OptedOut(reason));
        }
        self.set_needed_images(&pod.pod, BTreeSet::new());
    }

    pub(super) fn reconcile_opted_in(&mut self, pod: &PodView, opt_in: &PodOptIn) {
        if let Some(waiting) = self.waiting.get_mut(&pod.pod) {
            waiting.opt_in = Some(opt_in.clone());
        }
        if self.record_outages(pod, |_, _| true) {
            self.reconcile_pods_in_outages();
        }
        let failing = pod.containers.iter().filter(|container| waits_for_image(container));
        let mut needed: BTreeSet<_> =
            failing.filter_map(|container| self.on_pull_failure(pod, container, opt_in)).collect();
        for (image, policy) in self.absent_images(pod) {
            needed.extend(self.on_absent_image(pod, &image, policy, opt_in));
        }
        let sandbox = self.waiting.get(&pod.pod).and_then(|waiting| waiting.missing_sandbox_image.clone());
        if let Some((reference, cause)) = sandbox {
            let image = reference.to_string();
            let subject = Subject::Sandbox(image.clone());
            let cause = self.container_records.record_cause(&pod.pod, &subject, Some(cause));
            let failure = self.failure(&image, PullPolicy::IfNotPresent, cause, "");
            needed.extend(self.on_verdict(pod, &subject, failure, opt_in));
        }
        self.set_needed_images(&pod.pod, needed);
    }

    /// Reconciles one container that waits for an image. Returns the image if a recovery is due.
    fn on_pull_failure(&mut self, pod: &PodView, container: &ContainerView, opt_in: &PodOptIn) -> Option<Reference> {
        let (image, policy) = failing_image(pod, container);
        let waiting = container.waiting.as_ref();
        let subject = Subject::container(&container.name, image);
        let cause = self.container_records.record_cause(&pod.pod, &subject, waiting.and_then(classify));
        let message = waiting.map_or("", |waiting| waiting.message.as_str());
        let failure = self.failure(image, policy, cause, message);
        let reference = self.on_verdict(pod, &subject, failure, opt_in)?;
        // The image arrived during the kubelet's own attempt. Without a nudge, the kubelet retries
        // only after its back-off.
        if self.queue.is_settling(&reference) && self.container_records.mark_reported(&pod.pod, &subject, Topic::Nudge)
        {
            self.spawn_nudge(pod.pod.clone());
        }
        Some(reference)
    }

    /// Reconciles an image that is absent and that the kubelet has not tried to pull yet, or whose
    /// pull has stalled.
    fn on_absent_image(
        &mut self,
        pod: &PodView,
        image: &str,
        policy: PullPolicy,
        opt_in: &PodOptIn,
    ) -> Option<Reference> {
        let is_stalled = self.waiting.get(&pod.pod).is_some_and(|waiting| waiting.stalled_images.contains(image));
        let cause = if is_stalled { Cause::Stalled } else { Cause::KnownOutage };
        let failure = self.failure(image, policy, Some(cause), "");
        if !failure.may_be_early && !is_stalled {
            self.probe_registry(&image.parse::<Reference>().ok()?.repository().registry);
            return None;
        }
        if self.container_records.is_denied(&pod.pod, image) && !opt_in.on_denied {
            return None;
        }
        let container = pod.containers.iter().find(|container| container.image == image);
        let subject = container
            .map_or_else(|| Subject::Image(image.to_owned()), |container| Subject::container(&container.name, image));
        let needed = self.on_verdict(pod, &subject, failure, opt_in)?;
        let topic = Topic::Event(PodReportKind::Stalled);
        if is_stalled && self.container_records.mark_reported(&pod.pod, &subject, topic) {
            let note = format!(
                "{STALLED} The agent recovers {image} from peers meanwhile: new pods of this node find the image at \
                 once."
            );
            self.spawn_report(pod.pod.clone(), PodReportKind::Stalled, note);
        }
        Some(needed)
    }

    fn failure<'a>(
        &self,
        image: &'a str,
        policy: PullPolicy,
        cause: Option<Cause>,
        message: &'a str,
    ) -> FailedPull<'a> {
        let reference = image.parse::<Reference>();
        let may_be_early = reference.is_ok_and(|reference| self.registries.may_recover_early(&reference, now()));
        FailedPull { image, pull_policy: policy, cause, message, may_be_early }
    }

    fn on_verdict(
        &mut self,
        pod: &PodView,
        subject: &Subject,
        failure: FailedPull<'_>,
        opt_in: &PodOptIn,
    ) -> Option<Reference> {
        let policy = Arc::clone(&self.policy.borrow());
        let PodOptIn { on_denied, ref repositories, priority } = *opt_in;
        let image = failure.image;
        match decide(failure, Consent { recover_on: &policy.opt_in.recover_on, on_denied, repositories }) {
            PullVerdict::Recover(reference, cause) => {
                if self.container_records.mark_reported(&pod.pod, subject, Topic::Recovery) {
                    self.metrics.pod_failure_seen("recover");
                    tracing::info!(pod = %pod.pod, container = subject.container_name(), %reference, ?cause, "a pod cannot get its image");
                }
                self.request_recovery(&reference, pod, subject, priority);
                return Some(reference);
            }
            PullVerdict::Report(reason) => {
                let topic = Topic::from(&reason);
                if self.container_records.mark_reported(&pod.pod, subject, topic) {
                    self.metrics.pod_failure_seen(reason.label());
                    let note = reason.event_text(image);
                    tracing::info!(pod = %pod.pod, container = subject.container_name(), note, "the image cannot be recovered");
                    let pods = std::slice::from_ref(&pod.pod);
                    let kind = match reason {
                        NotRecoverable::NotUnderstood(_) => PodReportKind::Unclassified,
                        NotRecoverable::Stalled => PodReportKind::Stalled,
                        _ => PodReportKind::NotRecoverable,
                    };
                    self.notifications.send(PendingNotification::not_recovered(image, kind, pods, &note));
                    self.spawn_report(pod.pod.clone(), kind, note);
                }
            }
            PullVerdict::Ignore(reason) => self.record_ignored(pod, subject, reason),
        }
        None
    }

    fn request_recovery(&mut self, reference: &Reference, pod: &PodView, subject: &Subject, priority: i64) {
        match self.queue.join(reference, &pod.pod, priority) {
            JoinOutcome::First => {
                let seen_at = self.waiting.get(&pod.pod).map_or_else(now, |waiting| waiting.seen_at);
                self.requested_since.insert(reference.clone(), seen_at);
            }
            JoinOutcome::Recovered => {
                self.container_records.mark_reported(&pod.pod, subject, Topic::Nudge);
                self.spawn_nudge(pod.pod.clone());
            }
            JoinOutcome::JoinedOthers | JoinOutcome::AlreadyWaiting => {}
        }
    }

    fn record_ignored(&mut self, pod: &PodView, subject: &Subject, reason: IgnoreReason) {
        if reason == IgnoreReason::CauseUnknown {
            // A later message decides on the failure and counts it. Earlier Events of the kubelet
            // may name the cause.
            if let Some(waiting) = self.waiting.get_mut(&pod.pod) {
                waiting.schedule_event_read(now());
            }
        } else if self.container_records.mark_reported(&pod.pod, subject, Topic::Ignored(reason)) {
            self.metrics.pod_failure_seen(reason.label());
            tracing::debug!(pod = %pod.pod, container = subject.container_name(), ?reason, "no recovery for this container");
        }
    }

    /// Records the kubelet's fresh messages about failed pulls as evidence. Returns whether a
    /// message reported a fault of a registry.
    ///
    /// Any pod's failed pull is evidence. A pod without opt-in may name any registry, so such a pod
    /// counts only for registries that `counts` accepts: those that have answered this agent.
    fn record_outages(&mut self, pod: &PodView, is_counted: impl Fn(&RegistryHealth, &str) -> bool) -> bool {
        let Some(waiting) = self.waiting.get_mut(&pod.pod) else { return false };
        let mut has_recorded = false;
        let fresh = std::mem::take(&mut waiting.fresh_failures);
        // A read of the opt-in may take seconds, and evidence is as old as the pod's status.
        let seen_at = waiting.seen_at;
        for container in pod.containers.iter().filter(|container| fresh.contains(&container.name)) {
            let (image, _) = failing_image(pod, container);
            let cause = container.waiting.as_ref().and_then(classify);
            let Ok(reference) = image.parse::<Reference>() else { continue };
            let registry = &reference.repository().registry;
            match cause {
                Some(Cause::Unavailable(kind)) if is_counted(&self.registries, registry) => {
                    let message = container.waiting.as_ref().map_or("", |waiting| waiting.message.as_str());
                    self.registries.record_pull_failure(registry, kind, names_another_host(message, registry), seen_at);
                    has_recorded = true;
                }
                Some(Cause::NotFound | Cause::Denied) => self.registries.record_answered_pull(registry),
                _ => {}
            }
        }
        has_recorded
    }

    /// Reconciles the pod as last seen.
    pub(super) fn reconcile_pod(&mut self, pod: &PodRef) {
        if let Some(view) = self.waiting.get(pod).map(|waiting| waiting.view.clone()) {
            self.reconcile(view);
        }
    }

    pub(super) fn reconcile_all(&mut self) {
        let pods: Vec<_> = self.waiting.keys().cloned().collect();
        for pod in pods {
            self.reconcile_pod(&pod);
        }
    }

    pub(super) fn on_pod_gone(&mut self, pod: &PodRef) {
        self.container_records.remove_pod(pod);
        self.stop_waiting(pod, false);
    }

    fn stop_waiting(&mut self, pod: &PodRef, has_started: bool) {
        if let Some(waiting) = self.waiting.remove(pod).filter(|_| has_started) {
            if let Some(imported) = waiting.imported_at {
                self.metrics.pod_started(now().saturating_duration_since(imported));
            }
            self.record_started_pod(pod, waiting.needed.iter());
        }
        self.undecided.remove(pod);
        self.set_needed_images(pod, BTreeSet::new());
    }

    /// Records that the pod no longer waits for these images, before the end of a recovery reaches
    /// this task.
    fn record_started_pod<'a>(&mut self, pod: &PodRef, images: impl Iterator<Item = &'a Reference>) {
        for reference in images {
            // Only an image that this recovery has recorded can have started the pod.
            if let Some(running) = self.running.get_mut(reference).filter(|running| running.progress.is_recorded()) {
                running.started_pods.insert(pod.clone());
            }
        }
    }

    fn set_needed_images(&mut self, pod: &PodRef, needed: BTreeSet<Reference>) {
        // A container may have started while others of the pod wait.
        let before = self.waiting.get(pod).map(|waiting| waiting.needed.clone()).unwrap_or_default();
        self.record_started_pod(pod, before.difference(&needed));
        for reference in self.queue.retain_wanted(pod, &needed) {
            self.unprovided_blobs.remove(&reference);
            self.requested_since.remove(&reference);
            if let Some(running) = self.running.get(&reference) {
                running.stop.cancel();
            }
        }
        if let Some(waiting) = self.waiting.get_mut(pod) {
            waiting.needed = needed;
        }
    }
}
