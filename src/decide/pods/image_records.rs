//! The image records of this node: the images that a pod lacks, and registries that containerd or
//! this agent reaches.

use std::collections::BTreeSet;

use super::{Action, ImageRecords, Observation, Step};
use crate::decide::cause::is_pending;
use crate::model::{PodView, PullPolicy};
use crate::oci::Reference;

/// Registries probed at a time because images of this node name them. A cluster uses a handful.
const MAX_PROBED_REGISTRIES: usize = 16;

impl Step<'_> {
    /// Finds records that are new, or have a new target, without a recovery: containerd pulled the
    /// image, so containerd reaches the registry.
    pub(super) fn on_image_records(&mut self) {
        let records = self.context.image_records.clone();
        if let (Some(previous), Some(current)) = (self.pods.previous_image_records.take(), &records) {
            for (name, target) in current.iter().filter(|(name, target)| previous.get(*name) != Some(*target)) {
                let Ok(name) = name.parse::<Reference>() else { continue };
                if !self.context.facts.has_recorded(&name, *target) {
                    self.record_successful_pull(&name.repository().registry);
                }
            }
        }
        self.probe_registries_of(records.as_deref());
        self.pods.previous_image_records = records;
    }

    fn record_successful_pull(&mut self, registry: &str) {
        if self.pods.registries.record_successful_pull(registry, self.context.now) {
            self.observe(Observation::RegistryReached { registry: registry.to_owned() });
            self.actions.push(Action::PublishOutages);
        }
    }

    /// Probes each registry of this node's images until the registry answers once. A later silence
    /// is then evidence of an outage.
    pub(super) fn probe_registries_of(&mut self, records: Option<&ImageRecords>) {
        let references =
            records.into_iter().flat_map(ImageRecords::keys).filter_map(|name| name.parse::<Reference>().ok());
        let registries: BTreeSet<_> = references.map(|reference| reference.repository().registry.clone()).collect();
        let unanswered = registries.into_iter().filter(|registry| !self.pods.registries.has_answered(registry));
        for registry in unanswered.take(MAX_PROBED_REGISTRIES).collect::<Vec<_>>() {
            self.probe_registry(&registry);
        }
    }

    /// Images of pending containers and of volumes that are not on this node and have the pull
    /// policy `IfNotPresent`.
    pub(super) fn absent_images(&self, pod: &PodView) -> BTreeSet<String> {
        // Right after the start, no list of image records exists yet.
        let Some(image_records) = self.context.image_records.as_ref().filter(|_| pod.containers.iter().any(is_pending))
        else {
            return BTreeSet::new();
        };
        let containers = pod.containers.iter().filter(|container| is_pending(container));
        let of_containers = containers.map(|container| (&container.image, container.pull_policy));
        let of_volumes = pod.image_volumes.iter().map(|volume| (&volume.image, volume.pull_policy));
        let is_absent = |image: &str| {
            image.parse::<Reference>().is_ok_and(|reference| !image_records.contains_key(&reference.to_string()))
        };
        of_containers
            .chain(of_volumes)
            .filter(|(image, policy)| *policy == PullPolicy::IfNotPresent && is_absent(image))
            .map(|(image, _)| image.clone())
            .collect()
    }
}
