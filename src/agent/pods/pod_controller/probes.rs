//! Requests beside the pods' own events: probes of registries, and reads of the kubelet's Events
//! about a pod.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::{PodController, WorkResult, now};
use crate::decide::cause::{classify_event, failing_image, is_pending, is_pulling, missing_sandbox_image, names_image};
use crate::decide::container_records::Subject;
use crate::model::{KubeletEvent, PodRef, PodView};
use crate::oci::Reference;
use crate::ports::ClusterError;

impl PodController {
    /// Probes the registry, unless a recent probe suffices.
    pub(super) fn probe_registry(&mut self, registry: &str) {
        if let Some(probe) = self.registries.probe_if_due(registry, now()) {
            let stopping = self.stopping.clone();
            self.work.spawn(async move {
                stopping.run_until_cancelled(probe).await.map_or(WorkResult::Nothing, WorkResult::RegistryProbed)
            });
        }
    }

    /// Reconciles the opted-in pods that lack an image which may be recovered early now.
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

    /// Suspects a missing sandbox image for pods that wait long without a started container. Only a
    /// pod's Events show a missing sandbox image.
    pub(super) fn suspect_sandboxes(&mut self, now: Instant) {
        let suspected: Vec<_> = self
            .waiting
            .iter_mut()
            .filter_map(|(pod, waiting)| waiting.mark_sandbox_suspected(now).then(|| pod.clone()))
            .collect();
        suspected.iter().for_each(|pod| self.reconcile_pod(pod));
    }

    /// Suspects a stalled pull for pods that wait long without a failure. Only a pod's Events show
    /// a pull in progress.
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
                let request = async {
                    let _permit = permits.acquire().await;
                    cluster.kubelet_events(&pod).await
                };
                let result = stopping.run_until_cancelled(request).await;
                result.map_or(WorkResult::Nothing, |events| WorkResult::KubeletEventsRead { pod, result: events })
            });
        }
    }

    pub(super) fn on_kubelet_events(&mut self, pod: &PodRef, result: Result<Vec<KubeletEvent>, ClusterError>) {
        let Some(waiting) = self.waiting.get_mut(pod) else { return };
        let events = match result {
            Ok(events) => events,
            Err(error) => return tracing::warn!(%pod, %error, "cannot read the kubelet's Events about the pod"),
        };
        let mut stalled = BTreeSet::new();
        // Oldest first: the latest message counts.
        for event in &events {
            if let Some((reference, cause)) = missing_sandbox_image(&event.message)
                && waiting.view.containers.iter().all(is_pending)
            {
                self.container_records.record_cause(pod, &Subject::Sandbox(reference.to_string()), Some(cause));
                waiting.missing_sandbox_image = Some((reference, cause));
            }
            for image in pending_images(&waiting.view).filter(|image| names_image(&event.message, image)) {
                // The latest Event counts: a pull that ended has not stalled.
                match waiting.is_late(self.options.stalled_after, now()) && is_pulling(&event.message, image) {
                    true => drop(stalled.insert(image.to_owned())),
                    false => drop(stalled.remove(image)),
                }
            }
            let container_name = event.container.as_deref();
            for container in
                waiting.view.containers.iter().filter(|container| container_name == Some(container.name.as_str()))
            {
                let (image, _) = failing_image(&waiting.view, container);
                if names_image(&event.message, image) {
                    let subject = Subject::container(&container.name, image);
                    self.container_records.record_cause(pod, &subject, classify_event(&event.message));
                }
            }
        }
        waiting.stalled_images = stalled;
        self.reconcile_pod(pod);
    }
}

/// Images of containers that the kubelet has not tried to start.
fn pending_images(pod: &PodView) -> impl Iterator<Item = &str> {
    pod.containers.iter().filter(|container| is_pending(container)).map(|container| container.image.as_str())
}
