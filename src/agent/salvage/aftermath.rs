//! What follows a recovery: pods are nudged and told, people elsewhere are told, and where that is allowed a pod is deleted.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::waiting::{Deletion, WaitingPod};
use super::{Done, Salvager, now};
use crate::agent::notices::Notice;
use crate::agent::recover::{Found, RecoverError, Recovered};
use crate::decide::cause::{image_in_question, waits_for_image};
use crate::decide::pull_failure::{NotActionable, verifies_credentials};
use crate::decide::queue::End;
use crate::metrics::Outcome;
use crate::model::{PodRef, PodView};
use crate::oci::Reference;
use crate::ports::ReportKind;

/// How long a nudged pod may still wait before it is deleted, where that is allowed. A nudged kubelet needs under a second and some for
/// unpacking; one that is stuck in its queue of pulls needs minutes.
const DELETE_AFTER: Duration = Duration::from_secs(30);

impl Salvager {
    pub(super) fn on_recovery_ended(&mut self, reference: &Reference, result: Result<Recovered, RecoverError>) {
        let (end, outcome) = match &result {
            Ok(recovered) if recovered.fetched == 0 => (End::Done, Outcome::AlreadyHere),
            Ok(_) => (End::Done, Outcome::Recovered),
            Err(error) => (error.end(), error.outcome()),
        };
        let went_on = self.note_end(reference, outcome);
        self.spawn_retire(reference.clone());
        self.board.end(reference, result.as_ref().map(Recovered::clone).map_err(RecoverError::to_string));
        let pods = self.queue.ended(reference, end, now(), rand::random());
        let lacking = result.as_ref().err().map(RecoverError::lacking).unwrap_or_default();
        match lacking.is_empty() || pods.is_empty() {
            true => drop(self.lacking.remove(reference)),
            false => drop(self.lacking.insert(reference.clone(), lacking)),
        }
        // One that came while the recovery ended would go unnoticed: its change may have been seen before.
        self.look_for_providers();
        match result {
            Ok(recovered) => self.on_recovered(reference, &recovered, pods, went_on),
            Err(RecoverError::Abandoned) => tracing::info!(%reference, "nobody waits for the image any more"),
            Err(error) => self.on_not_recovered(reference, &error, pods),
        }
    }

    /// A dry run ended: it is told, and nothing else is done.
    pub(super) fn on_found(&mut self, reference: &Reference, result: Result<Found, RecoverError>) {
        let Found { root, providers, settled: _ } = match result {
            Ok(found) => found,
            Err(error) => {
                self.note_end(reference, error.outcome());
                self.board.end(reference, Err(error.to_string()));
                let pods = self.queue.ended(reference, error.end(), now(), rand::random());
                return self.on_not_recovered(reference, &error, pods);
            }
        };
        self.note_end(reference, Outcome::DryRun);
        self.board.end(reference, Err("dry run".to_owned()));
        let note = self.tell.dry_run_note(reference, root, &providers);
        tracing::info!(%reference, %root, note, "dry run");
        for pod in self.queue.ended(reference, End::Done, now(), rand::random()) {
            if self.ledger.is_news(&pod, "", &reference.to_string(), ReportKind::DryRun.reason()) {
                self.spawn_report(pod, ReportKind::DryRun, note.clone());
            }
        }
    }

    fn note_end(&mut self, reference: &Reference, outcome: Outcome) -> BTreeSet<PodRef> {
        let running = self.running.remove(reference);
        let took = running.as_ref().map(|running| running.began.elapsed()).unwrap_or_default();
        self.metrics.recovery_ended(outcome, took);
        let first_byte = running.as_ref().and_then(|running| Some((running.since?, running.progress.first_byte()?)));
        if let Some((since, first)) = first_byte {
            self.metrics.first_byte_came(first.saturating_duration_since(since));
        }
        running.map(|running| running.went_on).unwrap_or_default()
    }

    fn on_recovered(
        &mut self,
        reference: &Reference,
        recovered: &Recovered,
        pods: Vec<PodRef>,
        went_on: BTreeSet<PodRef>,
    ) {
        let down_since = self.registries.down_since(&reference.repository().registry, now());
        let note = self.tell.recovered_note(reference, recovered, down_since);
        tracing::info!(
            %reference, digest = %recovered.root, bytes = recovered.bytes, fetched = recovered.fetched,
            there = recovered.there, took = ?recovered.took, pods = pods.len(), "recovered"
        );
        if recovered.fetched > 0 {
            let told: BTreeSet<_> = pods.iter().chain(&went_on).cloned().collect();
            let told: Vec<_> = told.into_iter().collect();
            self.notices.send(Notice::recovered(reference, recovered, &told, &note));
            for pod in went_on.into_iter().filter(|pod| !pods.contains(pod)) {
                self.spawn_report(pod, ReportKind::Salvaged, note.clone());
            }
        }
        for pod in pods {
            if recovered.fetched == 0 && self.verifies_credentials(&pod, reference) {
                self.tell_of_verification(&pod, reference);
                continue;
            }
            self.spawn_nudge(pod.clone());
            self.note_nudge(&pod, reference);
            self.note_import(&pod);
            if recovered.fetched > 0 {
                self.spawn_report(pod, ReportKind::Salvaged, note.clone());
            }
        }
    }

    /// Whether the pod's kubelet pulls an image that has been here for a while.
    fn verifies_credentials(&self, pod: &PodRef, reference: &Reference) -> bool {
        let Some(waiting) = self.waiting.get(pod) else { return false };
        // The kubelet has to have said something since: a nudge that was lost explains the rest.
        let Some(imported) = waiting.imported.filter(|imported| waiting.came > *imported) else { return false };
        let since = now().saturating_duration_since(imported);
        let view = &waiting.view;
        view.containers.iter().filter(|container| waits_for_image(container)).any(|container| {
            let (image, policy) = image_in_question(view, container);
            image.parse::<Reference>().is_ok_and(|named| named == *reference)
                && verifies_credentials(policy, since, self.tell.nudges_are_denied())
        })
    }

    /// Another nudge would not help, and nothing is deleted: a new pod would wait as well.
    fn tell_of_verification(&mut self, pod: &PodRef, reference: &Reference) {
        let (image, reason) = (reference.to_string(), NotActionable::VerifiesCredentials);
        if self.ledger.is_news(pod, "", &image, reason.label()) {
            let note = reason.note(&image);
            tracing::warn!(%pod, %reference, "the image is here and the kubelet asks its registry all the same");
            self.spawn_report(pod.clone(), ReportKind::NotActionable, note);
        }
        if let Some(waiting) = self.waiting.get_mut(pod) {
            waiting.deletion = Deletion::Tried;
        }
    }

    /// The containers that wait for this image now need no other nudge when the pod is next seen to wait: that may be our own patch.
    fn note_nudge(&mut self, pod: &PodRef, reference: &Reference) {
        let Some(waiting) = self.waiting.get(pod) else { return };
        let view = &waiting.view;
        for container in view.containers.iter().filter(|container| waits_for_image(container)) {
            let (image, _) = image_in_question(view, container);
            if image.parse::<Reference>().is_ok_and(|named| named == *reference) {
                self.ledger.is_news(pod, &container.name, image, "nudged");
            }
        }
    }

    fn note_import(&mut self, pod: &PodRef) {
        let now = now();
        let delete = self.manner.delete_pods;
        if let Some(waiting) = self.waiting.get_mut(pod) {
            waiting.imported.get_or_insert(now);
            if delete && is_made_again(&waiting.view) {
                waiting.deletion = match waiting.deletion {
                    Deletion::NotPlanned => Deletion::At(now + DELETE_AFTER),
                    planned => planned,
                };
            }
        }
    }

    fn on_not_recovered(&mut self, reference: &Reference, error: &RecoverError, pods: Vec<PodRef>) {
        if error.end() == End::NoProvider {
            self.give_up_if_hopeless(reference, &pods);
        }
        let kind = error.report_kind();
        let note = self.tell.failed_note(error);
        let image = reference.to_string();
        self.notices.send(Notice::not_recovered(&image, kind, &pods, &note));
        let news: Vec<_> =
            pods.iter().map(|pod| self.ledger.is_news(pod, "", &image, error.outcome().label())).collect();
        // The log has a line for each outcome of an image that is new to a pod; each further attempt is one for those who look closer.
        match news.contains(&true) {
            true => tracing::warn!(%reference, %error, pods = pods.len(), "not recovered"),
            false => tracing::debug!(%reference, %error, "not recovered again"),
        }
        for (pod, is_news) in pods.into_iter().zip(news) {
            // Told once per pod and image, unless it is a failure that we try again after a longer and longer wait.
            if kind == ReportKind::Failed || is_news {
                self.spawn_report(pod, kind, note.clone());
            }
        }
    }

    /// An image that the kubelet finds broken, and that nobody can mend, is in the way of its own registry: the kubelet does not pull what it
    /// takes for present. Where the registry answers, the record is removed; where it does not, the content may yet come back.
    fn give_up_if_hopeless(&mut self, reference: &Reference, pods: &[PodRef]) {
        let now = now();
        let is_broken =
            |pod: &PodRef| self.waiting.get(pod).is_some_and(|waiting| waiting.finds_broken(reference, now));
        let pods: Vec<_> = pods.iter().filter(|pod| is_broken(pod)).cloned().collect();
        if pods.is_empty() || self.manner.dry_run {
            return;
        }
        let Some(question) = self.registries.ask(&reference.repository().registry) else { return };
        let stopping = self.stopping.clone();
        let (recoverer, reference) = (Arc::clone(&self.recoverer), reference.clone());
        self.work.spawn(async move {
            let answered = stopping.run_until_cancelled(question).await.is_some_and(|answer| answer.answer.is_ok());
            let result = if answered { recoverer.give_up(&reference).await } else { Ok(false) };
            Done::GaveUp { reference, pods, result }
        });
    }

    pub(super) fn on_given_up(&mut self, reference: &Reference, pods: Vec<PodRef>, result: Result<bool, RecoverError>) {
        match result {
            Ok(true) => {
                self.metrics.record_removed();
                let note = format!(
                    "{reference} is broken on this node and nobody has what is missing; its record was removed, so that the kubelet pulls it                      from its registry, which answers."
                );
                tracing::warn!(%reference, "the record of a broken image was removed: no node has what it lacks");
                for pod in pods {
                    self.spawn_nudge(pod.clone());
                    self.spawn_report(pod, ReportKind::Removed, note.clone());
                }
            }
            Ok(false) => {}
            Err(error) => tracing::warn!(%reference, %error, "the record of a broken image cannot be removed"),
        }
    }

    /// Deletes the pods whose image is here and that wait all the same.
    pub(super) fn delete_where_due(&mut self, now: Instant) {
        let is_due = |waiting: &WaitingPod| matches!(waiting.deletion, Deletion::At(at) if at <= now);
        for (pod, waiting) in self.waiting.iter_mut().filter(|(_, waiting)| is_due(waiting)) {
            // Another of its images may still be on its way; its own end sets the moment again.
            if !waiting.is_stuck(|reference| self.queue.is_here(reference)) {
                waiting.deletion = Deletion::NotPlanned;
                continue;
            }
            waiting.deletion = Deletion::Tried;
            let (tell, pod) = (Arc::clone(&self.tell), pod.clone());
            self.work.spawn(async move {
                tell.delete(&pod).await;
                Done::Told
            });
        }
    }

    pub(super) fn spawn_retire(&mut self, reference: Reference) {
        let recoverer = Arc::clone(&self.recoverer);
        self.work.spawn(async move {
            recoverer.lead.retire(&reference).await;
            Done::Told
        });
    }

    pub(super) fn spawn_nudge(&mut self, pod: PodRef) {
        if self.manner.dry_run {
            return;
        }
        let (tell, stopping) = (Arc::clone(&self.tell), self.stopping.clone());
        self.work.spawn(async move {
            stopping.run_until_cancelled(tell.nudge(&pod)).await;
            Done::Told
        });
    }

    pub(super) fn spawn_report(&mut self, pod: PodRef, kind: ReportKind, note: String) {
        let (tell, stopping) = (Arc::clone(&self.tell), self.stopping.clone());
        self.work.spawn(async move {
            stopping.run_until_cancelled(tell.report(&pod, kind, note)).await;
            Done::Told
        });
    }
}

/// Whether something will make the pod again when it is deleted. A static pod's mirror is owned by its node, which only shows it again.
fn is_made_again(pod: &PodView) -> bool {
    !pod.is_static && pod.owner.as_ref().is_some_and(|owner| owner.kind != "Node")
}
