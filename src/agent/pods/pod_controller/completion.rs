//! The end of a recovery: nudges, Events and webhook messages, and deletions of pods where the
//! options permit them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::waiting_pod::{Deletion, WaitingPod};
use super::{PodController, WorkResult, now};
use crate::agent::pods::notifications::PendingNotification;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::cause::{failing_image, waits_for_image};
use crate::decide::container_records::{Subject, Topic};
use crate::decide::pull_failure::{NotRecoverable, is_verifying_credentials};
use crate::decide::recovery_queue::RecoveryEnd;
use crate::model::{PodRef, PodReportKind, PodView, RecoveredImage, RecoveryOutcome, ResolvedImage};
use crate::oci::Reference;

/// Delay between a nudge and the deletion of a pod that still waits. A nudged kubelet needs less
/// than a second, and some more for unpacking. A kubelet with a stuck queue of pulls needs minutes.
const DELETE_AFTER: Duration = Duration::from_secs(30);

impl PodController {
    pub(super) fn on_recovery_ended(&mut self, reference: &Reference, result: Result<RecoveredImage, RecoverError>) {
        let (end, outcome) = match &result {
            Ok(recovered) if recovered.fetched == 0 => (RecoveryEnd::Done, RecoveryOutcome::AlreadyHere),
            Ok(_) => (RecoveryEnd::Done, RecoveryOutcome::Recovered),
            Err(error) => (error.queue_end(), error.outcome()),
        };
        let started_pods = self.record_end(reference, outcome);
        self.spawn_claim_release(reference.clone());
        self.tracker.end(reference, result.as_ref().map(RecoveredImage::clone).map_err(RecoverError::to_string));
        let pods = self.queue.finish(reference, end, now(), rand::random());
        let unprovided = result.as_ref().err().map(RecoverError::unprovided_blobs).unwrap_or_default();
        match unprovided.is_empty() || pods.is_empty() {
            true => drop(self.unprovided_blobs.remove(reference)),
            false => drop(self.unprovided_blobs.insert(reference.clone(), unprovided)),
        }
        // Catches a provider that was announced while the recovery still ran.
        self.on_providers_changed();
        match result {
            Ok(recovered) => self.on_recovered(reference, &recovered, pods, started_pods),
            Err(RecoverError::Abandoned) => tracing::info!(%reference, "no pod waits for the image any more"),
            Err(error) => self.on_not_recovered(reference, &error, pods),
        }
    }

    /// Reports the result of a dry run.
    pub(super) fn on_dry_run_ended(&mut self, reference: &Reference, result: Result<ResolvedImage, RecoverError>) {
        let ResolvedImage { digest, providers, tag_note: _ } = match result {
            Ok(found) => found,
            Err(error) => {
                self.record_end(reference, error.outcome());
                self.tracker.end(reference, Err(error.to_string()));
                let pods = self.queue.finish(reference, error.queue_end(), now(), rand::random());
                return self.on_not_recovered(reference, &error, pods);
            }
        };
        self.record_end(reference, RecoveryOutcome::DryRun);
        self.tracker.end(reference, Err("dry run".to_owned()));
        let note = self.pod_notifier.dry_run_note(reference, digest, &providers);
        tracing::info!(%reference, %digest, note, "dry run");
        let subject = Subject::Image(reference.to_string());
        for pod in self.queue.finish(reference, RecoveryEnd::Done, now(), rand::random()) {
            if self.container_records.mark_reported(&pod, &subject, Topic::Event(PodReportKind::DryRun)) {
                self.spawn_report(pod, PodReportKind::DryRun, note.clone());
            }
        }
    }

    fn record_end(&mut self, reference: &Reference, outcome: RecoveryOutcome) -> BTreeSet<PodRef> {
        let running = self.running.remove(reference);
        let took = running.as_ref().map(|running| running.began.elapsed()).unwrap_or_default();
        self.metrics.recovery_ended(outcome, took);
        let first_byte =
            running.as_ref().and_then(|running| Some((running.requested?, running.progress.first_byte()?)));
        if let Some((since, first)) = first_byte {
            self.metrics.first_byte_received(first.saturating_duration_since(since));
        }
        running.map(|running| running.started_pods).unwrap_or_default()
    }

    fn on_recovered(
        &mut self,
        reference: &Reference,
        recovered: &RecoveredImage,
        pods: Vec<PodRef>,
        started_pods: BTreeSet<PodRef>,
    ) {
        let down_since = self.registries.down_since(&reference.repository().registry, now());
        let note = self.pod_notifier.recovered_note(reference, recovered, down_since);
        tracing::info!(
            %reference, digest = %recovered.digest, bytes = recovered.bytes, fetched = recovered.fetched,
            there = recovered.present, took = ?recovered.took, pods = pods.len(), "recovered"
        );
        if recovered.fetched > 0 {
            let notified_pods: BTreeSet<_> = pods.iter().chain(&started_pods).cloned().collect();
            let notified_pods: Vec<_> = notified_pods.into_iter().collect();
            self.notifications.send(PendingNotification::recovered(reference, recovered, &notified_pods, &note));
            for pod in started_pods.into_iter().filter(|pod| !pods.contains(pod)) {
                self.spawn_report(pod, PodReportKind::Recovered, note.clone());
            }
        }
        for pod in pods {
            if recovered.fetched == 0 && self.verifies_credentials(&pod, reference) {
                self.report_verification(&pod, reference);
                continue;
            }
            self.spawn_nudge(pod.clone());
            self.record_nudge(&pod, reference);
            self.record_import(&pod);
            if recovered.fetched > 0 {
                self.spawn_report(pod, PodReportKind::Recovered, note.clone());
            }
        }
    }

    /// Whether the pod's kubelet still pulls an image that arrived some time ago.
    fn verifies_credentials(&self, pod: &PodRef, reference: &Reference) -> bool {
        let Some(waiting) = self.waiting.get(pod) else { return false };
        // The pod has changed since the import. Without a change, a lost nudge explains the wait.
        let Some(imported) = waiting.imported_at.filter(|imported| waiting.seen_at > *imported) else { return false };
        let since = now().saturating_duration_since(imported);
        let view = &waiting.view;
        view.containers.iter().filter(|container| waits_for_image(container)).any(|container| {
            let (image, policy) = failing_image(view, container);
            image.parse::<Reference>().is_ok_and(|named| named == *reference)
                && is_verifying_credentials(policy, since, self.pod_notifier.is_nudge_denied())
        })
    }

    /// Reports the verification. No nudge and no deletion follows: a new pod would wait as well.
    fn report_verification(&mut self, pod: &PodRef, reference: &Reference) {
        let (image, reason) = (reference.to_string(), NotRecoverable::VerifiesCredentials);
        if self.container_records.mark_reported(pod, &Subject::Image(image.clone()), Topic::from(&reason)) {
            let note = reason.event_text(&image);
            tracing::warn!(%pod, %reference, "the image is here and the kubelet asks its registry all the same");
            self.spawn_report(pod.clone(), PodReportKind::NotRecoverable, note);
        }
        if let Some(waiting) = self.waiting.get_mut(pod) {
            waiting.deletion = Deletion::Tried;
        }
    }

    /// Marks the containers that wait for this image as nudged. The agent's own patch is the next
    /// change of the pod, and must not cause another nudge.
    fn record_nudge(&mut self, pod: &PodRef, reference: &Reference) {
        let Some(waiting) = self.waiting.get(pod) else { return };
        let view = &waiting.view;
        for container in view.containers.iter().filter(|container| waits_for_image(container)) {
            let (image, _) = failing_image(view, container);
            if image.parse::<Reference>().is_ok_and(|named| named == *reference) {
                self.container_records.mark_reported(pod, &Subject::container(&container.name, image), Topic::Nudge);
            }
        }
    }

    fn record_import(&mut self, pod: &PodRef) {
        let now = now();
        let delete = self.options.delete_pods;
        if let Some(waiting) = self.waiting.get_mut(pod) {
            waiting.imported_at.get_or_insert(now);
            if delete && is_recreated(&waiting.view) {
                waiting.deletion = match waiting.deletion {
                    Deletion::NotPlanned => Deletion::At(now + DELETE_AFTER),
                    planned => planned,
                };
            }
        }
    }

    fn on_not_recovered(&mut self, reference: &Reference, error: &RecoverError, pods: Vec<PodRef>) {
        if error.queue_end() == RecoveryEnd::NoProvider {
            self.remove_record_if_broken(reference, &pods);
        }
        let kind = error.report_kind();
        let note = self.pod_notifier.failed_note(error);
        let image = reference.to_string();
        self.notifications.send(PendingNotification::not_recovered(&image, kind, &pods, &note));
        let (subject, topic) = (Subject::Image(image), Topic::Outcome(error.outcome()));
        let first_reports: Vec<_> =
            pods.iter().map(|pod| self.container_records.mark_reported(pod, &subject, topic)).collect();
        // A warning for each outcome that is new to a pod; repeated outcomes are logged at debug
        // level.
        match first_reports.contains(&true) {
            true => tracing::warn!(%reference, %error, pods = pods.len(), "not recovered"),
            false => tracing::debug!(%reference, %error, "not recovered again"),
        }
        for (pod, is_first_report) in pods.into_iter().zip(first_reports) {
            // One Event for each pod and outcome. A failure that is retried, after a growing
            // back-off, gets an Event at each retry.
            if kind == PodReportKind::Failed || is_first_report {
                self.spawn_report(pod, kind, note.clone());
            }
        }
    }

    /// Removes the record of an image that the kubelet finds broken and that no node can repair.
    /// Such a record blocks the image's registry: the kubelet does not pull an image that has a
    /// record. The record stays while the registry does not answer, because the content may come
    /// back.
    fn remove_record_if_broken(&mut self, reference: &Reference, pods: &[PodRef]) {
        let now = now();
        let is_broken =
            |pod: &PodRef| self.waiting.get(pod).is_some_and(|waiting| waiting.is_image_broken(reference, now));
        let pods: Vec<_> = pods.iter().filter(|pod| is_broken(pod)).cloned().collect();
        if pods.is_empty() || self.options.dry_run {
            return;
        }
        let Some(probe) = self.registries.probe(&reference.repository().registry) else { return };
        let stopping = self.stopping.clone();
        let (recoverer, reference) = (Arc::clone(&self.recoverer), reference.clone());
        self.work.spawn(async move {
            let answered = stopping.run_until_cancelled(probe).await.is_some_and(|answer| answer.result.is_ok());
            let result = if answered { recoverer.remove_broken_record(&reference).await } else { Ok(false) };
            WorkResult::RecordRemoved { reference, pods, result }
        });
    }

    pub(super) fn on_record_removed(
        &mut self,
        reference: &Reference,
        pods: Vec<PodRef>,
        result: Result<bool, RecoverError>,
    ) {
        match result {
            Ok(true) => {
                self.metrics.record_removed();
                let note = format!(
                    "{reference} is broken on this node, and no node has the missing content. The agent removed the \
                     image record, so the kubelet pulls the image from its registry, which answers."
                );
                tracing::warn!(%reference, "the record of a broken image was removed: no node has the missing content");
                for pod in pods {
                    self.spawn_nudge(pod.clone());
                    self.spawn_report(pod, PodReportKind::RecordRemoved, note.clone());
                }
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%reference, %error, "the record of a broken image cannot be removed"),
        }
    }

    /// Deletes pods that still wait although their images are here.
    pub(super) fn delete_due_pods(&mut self, now: Instant) {
        let is_due = |waiting: &WaitingPod| matches!(waiting.deletion, Deletion::At(at) if at <= now);
        for (pod, waiting) in self.waiting.iter_mut().filter(|(_, waiting)| is_due(waiting)) {
            // Another image of the pod may be missing. The end of that image's recovery plans the
            // deletion again.
            if !waiting.is_stuck(|reference| self.queue.is_settling(reference)) {
                waiting.deletion = Deletion::NotPlanned;
                continue;
            }
            waiting.deletion = Deletion::Tried;
            let (notifier, pod) = (Arc::clone(&self.pod_notifier), pod.clone());
            self.work.spawn(async move {
                notifier.delete(&pod).await;
                WorkResult::Nothing
            });
        }
    }

    pub(super) fn spawn_claim_release(&mut self, reference: Reference) {
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move {
            recoverer.claims.release_all(&reference).await;
            WorkResult::Nothing
        });
    }

    pub(super) fn spawn_nudge(&mut self, pod: PodRef) {
        if self.options.dry_run {
            return;
        }
        let (notifier, stopping) = (Arc::clone(&self.pod_notifier), self.stopping.clone());
        self.work.spawn(async move {
            stopping.run_until_cancelled(notifier.nudge(&pod)).await;
            WorkResult::Nothing
        });
    }

    pub(super) fn spawn_report(&mut self, pod: PodRef, kind: PodReportKind, note: String) {
        let (notifier, stopping) = (Arc::clone(&self.pod_notifier), self.stopping.clone());
        self.work.spawn(async move {
            stopping.run_until_cancelled(notifier.report(&pod, kind, note)).await;
            WorkResult::Nothing
        });
    }
}

/// Whether a controller recreates the pod after a deletion. A static pod's mirror belongs to its
/// node, and the kubelet only shows the mirror again.
fn is_recreated(pod: &PodView) -> bool {
    !pod.is_static && pod.owner.as_ref().is_some_and(|owner| owner.kind != "Node")
}
