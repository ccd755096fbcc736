//! Starts and ends of recoveries: nudges, Events and webhook messages, and deletions of pods where
//! the options permit them.

use std::collections::BTreeSet;
use std::time::Duration;

use super::waiting_pod::{Deletion, WaitingPod};
use super::{Action, FailedRecovery, Observation, RecoveryOrder, RecoveryResult, RunningRecovery, Step, notes};
use crate::decide::cause::{failing_image, waits_for_image};
use crate::decide::container_records::{Subject, Topic};
use crate::decide::pull_failure::{NotRecoverable, is_verifying_credentials};
use crate::decide::recovery_queue::RecoveryEnd;
use crate::model::{PodRef, PodReportKind, PodView, RecoveredImage};
use crate::oci::{Digest, Reference};

/// Delay between a nudge and the deletion of a pod that still waits. A nudged kubelet needs less
/// than a second, and some more for unpacking. A kubelet with a stuck queue of pulls needs minutes.
const DELETE_AFTER: Duration = Duration::from_secs(30);

impl Step<'_> {
    pub(super) fn start_due_recoveries(&mut self) {
        while let Some(reference) = self.pods.queue.start_next(self.context.now) {
            self.pods.running.insert(reference.clone(), RunningRecovery::default());
            let order = self.order_of(reference);
            self.actions.push(Action::Recover(order));
        }
    }

    /// The image, with the pull secrets of all pods that wait for it.
    fn order_of(&mut self, reference: Reference) -> RecoveryOrder {
        let requested = self.pods.requested_since.remove(&reference);
        let pods = self.pods.waiting.iter().filter(|(_, pod)| pod.needed.contains(&reference));
        let secrets: BTreeSet<_> = pods
            .flat_map(|(pod, waiting)| {
                waiting.view.pull_secrets.iter().map(|name| (pod.k8s_namespace.clone(), name.clone()))
            })
            .collect();
        let verify_layers = self.pods.waiting.values().any(|waiting| waiting.is_content_missing(&reference));
        RecoveryOrder { reference, pull_secrets: secrets.into_iter().collect(), verify_layers, requested }
    }

    /// Readies only recoveries that have a provider now: in a large cluster some peer announces an
    /// item all the time.
    pub(super) fn on_providers_changed(&mut self) {
        let (facts, unprovided) = (self.context.facts, &self.pods.unprovided_blobs);
        let has_provider = |digest: &Digest| facts.has_blob_provider(*digest);
        self.pods.queue.providers_changed(|reference| {
            facts.has_provider(reference)
                && unprovided.get(reference).is_none_or(|blobs| blobs.iter().all(has_provider))
        });
    }

    pub(super) fn on_recovery_ended(&mut self, reference: &Reference, result: RecoveryResult) {
        let Some(RunningRecovery { started_pods, is_canceled: _ }) = self.pods.running.remove(reference) else {
            return;
        };
        let (end, unprovided) = match &result {
            RecoveryResult::Recovered { .. } | RecoveryResult::DryRun { .. } => (RecoveryEnd::Done, Vec::new()),
            RecoveryResult::NotRecovered(failed) => (failed.end, failed.unprovided_blobs.clone()),
        };
        let pods = self.pods.queue.finish(reference, end, self.context.now, self.context.jitter);
        match unprovided.is_empty() || pods.is_empty() {
            true => drop(self.pods.unprovided_blobs.remove(reference)),
            false => drop(self.pods.unprovided_blobs.insert(reference.clone(), unprovided)),
        }
        // Catches a provider that was announced while the recovery still ran.
        self.on_providers_changed();
        match result {
            RecoveryResult::Recovered { image, note } => self.on_recovered(reference, image, &note, pods, started_pods),
            RecoveryResult::DryRun { note } => self.on_found(reference, &note, pods),
            RecoveryResult::NotRecovered(failed) if failed.end == RecoveryEnd::Abandoned => {}
            RecoveryResult::NotRecovered(failed) => self.on_not_recovered(reference, failed, pods),
        }
    }

    /// Reports the result of a dry run.
    fn on_found(&mut self, reference: &Reference, note: &str, pods: Vec<PodRef>) {
        let subject = Subject::Image(reference.to_string());
        for pod in pods {
            if self.mark_reported(&pod, &subject, Topic::Event(PodReportKind::DryRun)) {
                self.report(pod, PodReportKind::DryRun, note.to_owned());
            }
        }
    }

    fn on_recovered(
        &mut self,
        reference: &Reference,
        image: RecoveredImage,
        note: &str,
        pods: Vec<PodRef>,
        started_pods: BTreeSet<PodRef>,
    ) {
        let has_fetched = image.fetched > 0;
        self.observe(Observation::Recovered { reference: reference.clone(), image: image.clone(), pods: pods.len() });
        if has_fetched {
            let notified_pods: BTreeSet<_> = pods.iter().chain(&started_pods).cloned().collect();
            let (notified_pods, note) = (notified_pods.into_iter().collect(), note.to_owned());
            self.actions.push(Action::NotifyRecovered {
                reference: reference.clone(),
                image,
                pods: notified_pods,
                note: note.clone(),
            });
            for pod in started_pods.into_iter().filter(|pod| !pods.contains(pod)) {
                self.report(pod, PodReportKind::Recovered, note.clone());
            }
        }
        for pod in pods {
            if !has_fetched && self.verifies_credentials(&pod, reference) {
                self.report_verification(&pod, reference);
                continue;
            }
            self.nudge(pod.clone());
            self.record_nudge(&pod, reference);
            self.record_import(&pod);
            if has_fetched {
                self.report(pod, PodReportKind::Recovered, note.to_owned());
            }
        }
    }

    /// Whether the pod's kubelet still pulls an image that arrived some time ago.
    fn verifies_credentials(&self, pod: &PodRef, reference: &Reference) -> bool {
        let Some(waiting) = self.pods.waiting.get(pod) else { return false };
        // The pod has changed since the import. Without a change, a lost nudge explains the wait.
        let Some(imported) = waiting.imported_at.filter(|imported| waiting.seen_at > *imported) else { return false };
        let since = self.context.now.saturating_duration_since(imported);
        let view = &waiting.view;
        view.containers.iter().filter(|container| waits_for_image(container)).any(|container| {
            let (image, policy) = failing_image(view, container);
            image.parse::<Reference>().is_ok_and(|named| named == *reference)
                && is_verifying_credentials(policy, since, self.context.facts.is_nudge_denied())
        })
    }

    /// Reports the verification. No nudge and no deletion follows: a new pod would wait as well.
    fn report_verification(&mut self, pod: &PodRef, reference: &Reference) {
        let (image, reason) = (reference.to_string(), NotRecoverable::VerifiesCredentials);
        let note = reason.event_text(&image);
        if self.mark_reported(pod, &Subject::Image(image), Topic::from(&reason)) {
            self.observe(Observation::CredentialsVerified { pod: pod.clone(), reference: reference.clone() });
            self.report(pod.clone(), PodReportKind::NotRecoverable, note);
        }
        if let Some(waiting) = self.pods.waiting.get_mut(pod) {
            waiting.deletion = Deletion::Tried;
        }
    }

    /// Marks the containers that wait for this image as nudged. The agent's own patch is the next
    /// change of the pod, and must not cause another nudge.
    fn record_nudge(&mut self, pod: &PodRef, reference: &Reference) {
        let Some(waiting) = self.pods.waiting.get(pod) else { return };
        let view = &waiting.view;
        for container in view.containers.iter().filter(|container| waits_for_image(container)) {
            let (image, _) = failing_image(view, container);
            if image.parse::<Reference>().is_ok_and(|named| named == *reference) {
                let subject = Subject::container(&container.name, image);
                self.pods.container_records.mark_reported(pod, &subject, Topic::Nudge);
            }
        }
    }

    fn record_import(&mut self, pod: &PodRef) {
        let now = self.context.now;
        let Some(waiting) = self.pods.waiting.get_mut(pod) else { return };
        waiting.imported_at.get_or_insert(now);
        let may_delete = self.pods.options.recovery.delete_pods && is_recreated(&waiting.view);
        if may_delete && waiting.deletion == Deletion::NotPlanned {
            waiting.deletion = Deletion::At(now + DELETE_AFTER);
        }
    }

    fn on_not_recovered(&mut self, reference: &Reference, failed: FailedRecovery, pods: Vec<PodRef>) {
        let FailedRecovery { end, outcome, kind, unprovided_blobs: _, error, note } = failed;
        if end == RecoveryEnd::NoProvider {
            self.remove_record_if_broken(reference, &pods);
        }
        let (image, reported_pods) = (reference.to_string(), pods.clone());
        let notification =
            Action::NotifyNotRecovered { image: image.clone(), kind, pods: reported_pods, note: note.clone() };
        self.actions.push(notification);
        let (subject, topic) = (Subject::Image(image), Topic::Outcome(outcome));
        let first_reports: Vec<_> = pods.iter().map(|pod| self.mark_reported(pod, &subject, topic)).collect();
        let (reference, is_new) = (reference.clone(), first_reports.contains(&true));
        self.observe(Observation::NotRecovered { reference, error, pods: pods.len(), is_new });
        for (pod, is_first_report) in pods.into_iter().zip(first_reports) {
            // One Event for each pod and outcome. A failure that is retried, after a growing
            // back-off, gets an Event at each retry.
            if kind == PodReportKind::Failed || is_first_report {
                self.report(pod, kind, note.clone());
            }
        }
    }

    /// Removes the record of an image that the kubelet finds broken and that no node can repair.
    /// Such a record blocks the image's registry: the kubelet does not pull an image that has a
    /// record. The record stays while the registry does not answer, because the content may come
    /// back.
    fn remove_record_if_broken(&mut self, reference: &Reference, pods: &[PodRef]) {
        let now = self.context.now;
        let is_broken =
            |pod: &PodRef| self.pods.waiting.get(pod).is_some_and(|waiting| waiting.is_image_broken(reference, now));
        let pods: Vec<_> = pods.iter().filter(|pod| is_broken(pod)).cloned().collect();
        if !pods.is_empty() && !self.pods.options.recovery.dry_run && self.pods.options.is_probing {
            self.actions.push(Action::RemoveRecord { reference: reference.clone(), pods });
        }
    }

    pub(super) fn on_record_removed(&mut self, reference: &Reference, pods: Vec<PodRef>) {
        for pod in pods {
            self.nudge(pod.clone());
            self.report(pod, PodReportKind::RecordRemoved, notes::record_removed(reference));
        }
    }

    /// Deletes pods that still wait although their images are here.
    pub(super) fn delete_due_pods(&mut self) {
        let now = self.context.now;
        let is_due = |waiting: &WaitingPod| matches!(waiting.deletion, Deletion::At(at) if at <= now);
        for (pod, waiting) in self.pods.waiting.iter_mut().filter(|(_, waiting)| is_due(waiting)) {
            // Another image of the pod may be missing. The end of that image's recovery plans the
            // deletion again.
            if !waiting.is_stuck(|reference| self.pods.queue.is_settling(reference)) {
                waiting.deletion = Deletion::NotPlanned;
                continue;
            }
            waiting.deletion = Deletion::Tried;
            self.actions.push(Action::Delete(pod.clone()));
        }
    }
}

/// Whether a controller recreates the pod after a deletion. A static pod's mirror belongs to its
/// node, and the kubelet only shows the mirror again.
fn is_recreated(pod: &PodView) -> bool {
    !pod.is_static && pod.owner.as_ref().is_some_and(|owner| owner.kind != "Node")
}
