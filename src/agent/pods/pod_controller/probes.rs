//! What is asked beside the pods' own events: registries whether they are there, the kubelet's
//! Events what ails a pod.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::{PodController, WorkResult, now};
use crate::decide::cause::{classify_event, failing_image, is_pending, is_pulling, missing_sandbox_image, names_image};
use crate::model::{PodRef, PodView};
use crate::oci::Reference;
use crate::ports::{ClusterError, KubeletEvent};

impl PodController {
    /// Asks whether the registry is there, unless it was asked a moment ago.
    pub(super) fn probe_registry(&mut self, registry: &str) {
        if let Some(question) = self.registries.probe_if_due(registry, now()) {
            let stopping = self.stopping.clone();
            self.work.spawn(async move {
                stopping.run_until_cancelled(question).await.map_or(WorkResult::Nothing, WorkResult::RegistryProbed)
            });
        }
    }

    /// Looks again at the pods that are helped, or may be, and lack an image whose registry is
    /// known to be down now.
    pub(super) fn reconcile_pods_in_outages(&mut self) {
        let may_be_early = |image: &str| {
            let reference = image.parse::<Reference>();
            reference.is_ok_and(|reference| self.registries.may_recover_early(&reference, now()))
        };
        let mut affected = Vec::new();
        for (pod, waiting) in self.waiting.iter().filter(|(_, waiting)| waiting.opt_in.is_some()) {
            let is_needed = |image: &str| waiting.needed.iter().any(|needed| image.parse().as_ref() == Ok(needed));
            let absent = self.absent_images(&waiting.view);
            if absent.iter().any(|(image, _)| !is_needed(image) && may_be_early(image)) {
                affected.push(pod.clone());
            }
        }
        affected.iter().for_each(|pod| self.reconcile_pod(pod));
    }

    /// A pod none of whose containers has begun for a while may lack its sandbox's image, which
    /// shows only in its Events.
    pub(super) fn suspect_sandboxes(&mut self, now: Instant) {
        let suspected: Vec<_> = self
            .waiting
            .iter_mut()
            .filter_map(|(pod, waiting)| waiting.mark_sandbox_suspected(now).then(|| pod.clone()))
            .collect();
        suspected.iter().for_each(|pod| self.reconcile_pod(pod));
    }

    /// A pod that waits for long without a failure may wait for a pull that does not end, which
    /// shows in its Events.
    pub(super) fn suspect_stalls(&mut self, now: Instant) {
        let Some(stalled_after) = self.options.stalled_after else { return };
        self.waiting.values_mut().for_each(|waiting| waiting.mark_stall_suspected(stalled_after, now));
    }

    pub(super) fn read_due_kubelet_events(&mut self, now: Instant) {
        for (pod, waiting) in &mut self.waiting {
            if waiting.opt_in.is_some() && waiting.sandbox_suspected && waiting.missing_sandbox_image.is_none() {
                waiting.schedule_event_read(now);
            }
            if !waiting.take_due_event_read(now) {
                continue;
            }
            let (cluster, permits) = (Arc::clone(&self.cluster), Arc::clone(&self.api_permits));
            let (pod, stopping) = (pod.clone(), self.stopping.clone());
            self.work.spawn(async move {
                let question = async {
                    let _permit = permits.acquire().await;
                    cluster.kubelet_events(&pod).await
                };
                let result = stopping.run_until_cancelled(question).await;
                result.map_or(WorkResult::Nothing, |said| WorkResult::KubeletEventsRead { pod, result: said })
            });
        }
    }

    pub(super) fn on_kubelet_events(&mut self, pod: &PodRef, result: Result<Vec<KubeletEvent>, ClusterError>) {
        let Some(waiting) = self.waiting.get_mut(pod) else { return };
        let events = match result {
            Ok(events) => events,
            Err(error) => return tracing::warn!(%pod, %error, "cannot read what the kubelet said about the pod"),
        };
        let mut stalled = BTreeSet::new();
        // The oldest first: the latest message counts.
        for event in &events {
            if let Some((reference, cause)) = missing_sandbox_image(&event.message)
                && waiting.view.containers.iter().all(is_pending)
            {
                self.ledger.record_cause(pod, "", &reference.to_string(), Some(cause));
                waiting.missing_sandbox_image = Some((reference, cause));
            }
            for image in pending_images(&waiting.view).filter(|image| names_image(&event.message, image)) {
                // The latest Event counts: a pull that ended is no stalled one.
                match waiting.is_late(self.options.stalled_after, now()) && is_pulling(&event.message, image) {
                    true => drop(stalled.insert(image.to_owned())),
                    false => drop(stalled.remove(image)),
                }
            }
            let about = event.container.as_deref();
            for container in waiting.view.containers.iter().filter(|container| about == Some(container.name.as_str())) {
                let (image, _) = failing_image(&waiting.view, container);
                if names_image(&event.message, image) {
                    self.ledger.record_cause(pod, &container.name, image, classify_event(&event.message));
                }
            }
        }
        waiting.stalled_images = stalled;
        self.reconcile_pod(pod);
    }
}

/// The images of containers that the kubelet has not come to.
fn pending_images(pod: &PodView) -> impl Iterator<Item = &str> {
    pod.containers.iter().filter(|container| is_pending(container)).map(|container| container.image.as_str())
}
