//! Probes of registries, early recoveries during outages, and reads of the kubelet's Events.

use std::collections::BTreeSet;

use super::{Action, Observation, RegistryProbe, Step};
use crate::decide::cause::{classify_event, failing_image, is_pending, is_pulling, missing_sandbox_image, names_image};
use crate::decide::container_records::Subject;
use crate::model::{KubeletEvent, PodRef, PodView};
use crate::oci::Reference;

impl Step<'_> {
    /// Probes the registry, unless a recent probe suffices.
    pub(super) fn probe_registry(&mut self, registry: &str) {
        let is_suspected = self.context.facts.count_outage_reports(registry) > 0;
        if self.pods.options.is_probing
            && self.pods.registries.begin_probe_if_due(registry, is_suspected, self.context.now)
        {
            self.actions.push(Action::ProbeRegistry(registry.to_owned()));
        }
    }

    pub(super) fn on_registry_probed(&mut self, probe: &RegistryProbe) {
        let RegistryProbe { registry, result } = probe;
        let was_down = self.is_down(registry);
        if self.pods.registries.record_probe(registry, *result, self.context.now, self.context.clock) {
            self.observe(Observation::RegistryProbed { registry: registry.clone(), result: *result });
        }
        self.actions.push(Action::PublishOutages);
        match self.is_down(registry) != was_down {
            true => self.reconcile_all(),
            // Another failed probe is fresh evidence for tags.
            false => self.reconcile_pods_in_outages(),
        }
    }

    fn is_down(&self, registry: &str) -> bool {
        let reports = self.context.facts.count_outage_reports(registry);
        self.pods.registries.counts_as_down(registry, reports, self.context.now)
    }

    /// Whether an image may be recovered before the pod's own pull has failed. For a digest, the
    /// peers' announcements suffice. A tag may have moved, and the registry decides while it is
    /// reachable: only fresh evidence of this node counts.
    pub(super) fn may_recover_early(&self, image: &str) -> bool {
        match image.parse::<Reference>() {
            Ok(Reference::Digest(repository, _)) => self.is_down(&repository.registry),
            Ok(Reference::Tag(repository, _)) => {
                self.pods.registries.has_fresh_evidence(&repository.registry, self.context.now)
            }
            Err(_) => false,
        }
    }

    /// Reconciles the opted-in pods that lack an image which may be recovered early now.
    pub(super) fn reconcile_pods_in_outages(&mut self) {
        let mut affected = Vec::new();
        for (pod, waiting) in self.pods.waiting.iter().filter(|(_, waiting)| waiting.opt_in.is_some()) {
            let is_needed = |image: &str| waiting.needed.iter().any(|needed| image.parse().as_ref() == Ok(needed));
            let absent = self.absent_images(&waiting.view);
            if absent.iter().any(|image| !is_needed(image) && self.may_recover_early(image)) {
                affected.push(pod.clone());
            }
        }
        affected.iter().for_each(|pod| self.reconcile_pod(pod));
    }

    /// Suspects a missing sandbox image for pods that wait long without a started container. Only a
    /// pod's Events show a missing sandbox image.
    pub(super) fn suspect_sandboxes(&mut self) {
        let now = self.context.now;
        let waiting = self.pods.waiting.iter_mut();
        let suspected: Vec<_> =
            waiting.filter_map(|(pod, waiting)| waiting.mark_sandbox_suspected(now).then(|| pod.clone())).collect();
        suspected.iter().for_each(|pod| self.reconcile_pod(pod));
    }

    /// Suspects a stalled pull for pods that wait long without a failure. Only a pod's Events show
    /// a pull in progress.
    pub(super) fn suspect_stalls(&mut self) {
        let Some(stalled_after) = self.pods.options.recovery.stalled_after else { return };
        let now = self.context.now;
        self.pods.waiting.values_mut().for_each(|waiting| waiting.mark_stall_suspected(stalled_after, now));
    }

    pub(super) fn read_due_kubelet_events(&mut self) {
        for (pod, waiting) in &mut self.pods.waiting {
            if waiting.opt_in.is_some() && waiting.sandbox_suspected && waiting.missing_sandbox_image.is_none() {
                waiting.schedule_event_read(self.context.now);
            }
            if waiting.take_due_event_read(self.context.now) {
                self.actions.push(Action::ReadKubeletEvents(pod.clone()));
            }
        }
    }

    pub(super) fn on_kubelet_events(&mut self, pod: &PodRef, events: &[KubeletEvent]) {
        let Some(waiting) = self.pods.waiting.get_mut(pod) else { return };
        let is_late = waiting.is_late(self.pods.options.recovery.stalled_after, self.context.now);
        let mut stalled = BTreeSet::new();
        // Oldest first: the latest message counts.
        for event in events {
            if let Some((reference, cause)) = missing_sandbox_image(&event.message)
                && waiting.view.containers.iter().all(is_pending)
            {
                let subject = Subject::Sandbox(reference.to_string());
                self.pods.container_records.record_cause(pod, &subject, Some(cause));
                waiting.missing_sandbox_image = Some((reference, cause));
            }
            for image in pending_images(&waiting.view).filter(|image| names_image(&event.message, image)) {
                // The latest Event counts: a pull that ended has not stalled.
                match is_late && is_pulling(&event.message, image) {
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
                    self.pods.container_records.record_cause(pod, &subject, classify_event(&event.message));
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
