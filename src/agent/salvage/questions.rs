//! What is asked beside the pods' own events: registries whether they are there, the kubelet's
//! Events what ails a pod.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use super::{Done, Salvager, now};
use crate::decide::cause::{
    cause_in_event, image_in_question, is_pending, is_pulling, missing_sandbox_image, names_image,
};
use crate::model::{PodRef, PodView};
use crate::oci::Reference;
use crate::ports::{ClusterError, KubeletEvent};

impl Salvager {
    /// Asks whether the registry is there, unless it was asked a moment ago.
    pub(super) fn ask_registry(&mut self, registry: &str) {
        if let Some(question) = self.registries.question(registry, now()) {
            let stopping = self.stopping.clone();
            self.work
                .spawn(async move { stopping.run_until_cancelled(question).await.map_or(Done::Told, Done::Answered) });
        }
    }

    /// Looks again at the pods that are helped, or may be, and lack an image whose registry is
    /// known to be down now.
    pub(super) fn look_at_outages(&mut self) {
        let may_be_early = |image: &str| {
            let reference = image.parse::<Reference>();
            reference.is_ok_and(|reference| self.registries.may_recover_early(&reference, now()))
        };
        let mut concerned = Vec::new();
        for (pod, waiting) in self.waiting.iter().filter(|(_, waiting)| waiting.helped.is_some()) {
            let is_needed = |image: &str| waiting.needed.iter().any(|needed| image.parse().as_ref() == Ok(needed));
            let absent = self.absent_images(&waiting.view);
            if absent.iter().any(|(image, _)| !is_needed(image) && may_be_early(image)) {
                concerned.push(pod.clone());
            }
        }
        concerned.iter().for_each(|pod| self.look_at(pod));
    }

    /// A pod none of whose containers has begun for a while may lack its sandbox's image, which
    /// shows only in its Events.
    pub(super) fn suspect_sandboxes(&mut self, now: Instant) {
        let suspected: Vec<_> = self
            .waiting
            .iter_mut()
            .filter_map(|(pod, waiting)| waiting.suspect_sandbox(now).then(|| pod.clone()))
            .collect();
        suspected.iter().for_each(|pod| self.look_at(pod));
    }

    /// A pod that waits for long without a failure may wait for a pull that does not end, which
    /// shows in its Events.
    pub(super) fn suspect_stalls(&mut self, now: Instant) {
        let Some(stalled_after) = self.manner.stalled_after else { return };
        self.waiting.values_mut().for_each(|waiting| waiting.suspect_stall(stalled_after, now));
    }

    pub(super) fn ask_kubelet_where_due(&mut self, now: Instant) {
        for (pod, waiting) in &mut self.waiting {
            if waiting.helped.is_some() && waiting.sandbox_suspected && waiting.sandbox.is_none() {
                waiting.ask_for_a_cause(now);
            }
            if !waiting.takes_question(now) {
                continue;
            }
            let (cluster, asking) = (Arc::clone(&self.cluster), Arc::clone(&self.asking));
            let (pod, stopping) = (pod.clone(), self.stopping.clone());
            self.work.spawn(async move {
                let question = async {
                    let _turn = asking.acquire().await;
                    cluster.kubelet_events(&pod).await
                };
                let said = stopping.run_until_cancelled(question).await;
                said.map_or(Done::Told, |said| Done::KubeletSaid { pod, said })
            });
        }
    }

    pub(super) fn on_kubelet_said(&mut self, pod: &PodRef, said: Result<Vec<KubeletEvent>, ClusterError>) {
        let Some(waiting) = self.waiting.get_mut(pod) else { return };
        let events = match said {
            Ok(events) => events,
            Err(error) => return tracing::warn!(%pod, %error, "cannot read what the kubelet said about the pod"),
        };
        let mut stalled = BTreeSet::new();
        // The oldest first: the latest message counts.
        for event in &events {
            if let Some((reference, cause)) = missing_sandbox_image(&event.message)
                && waiting.view.containers.iter().all(is_pending)
            {
                self.ledger.learn(pod, "", &reference.to_string(), Some(cause));
                waiting.sandbox = Some((reference, cause));
            }
            for image in pending_images(&waiting.view).filter(|image| names_image(&event.message, image)) {
                // The latest Event counts: a pull that ended is no stalled one.
                match waiting.is_late(self.manner.stalled_after, now()) && is_pulling(&event.message, image) {
                    true => drop(stalled.insert(image.to_owned())),
                    false => drop(stalled.remove(image)),
                }
            }
            let about = event.container.as_deref();
            for container in waiting.view.containers.iter().filter(|container| about == Some(container.name.as_str())) {
                let (image, _) = image_in_question(&waiting.view, container);
                if names_image(&event.message, image) {
                    self.ledger.learn(pod, &container.name, image, cause_in_event(&event.message));
                }
            }
        }
        waiting.stalled = stalled;
        self.look_at(pod);
    }
}

/// The images of containers that the kubelet has not come to.
fn pending_images(pod: &PodView) -> impl Iterator<Item = &str> {
    pod.containers.iter().filter(|container| is_pending(container)).map(|container| container.image.as_str())
}
