//! The image records of this node: the images that a pod lacks, and registries that containerd or
//! this agent reaches.

use std::collections::{BTreeMap, BTreeSet};

use super::{PodController, now};
use crate::decide::cause::is_pending;
use crate::model::{PodView, PullPolicy};
use crate::oci::{Digest, Reference};

/// Registries probed at a time because images of this node name them. A cluster uses a handful.
const MAX_PROBED_REGISTRIES: usize = 16;

impl PodController {
    /// Finds records that are new, or have a new target, without a recovery: containerd pulled the
    /// image, so containerd reaches the registry.
    pub(super) fn on_image_records(&mut self) {
        let records = self.image_records.borrow_and_update().clone();
        if let (Some(previous), Some(current)) = (&self.previous_image_records, &records) {
            for (name, target) in current.iter().filter(|(name, target)| previous.get(*name) != Some(*target)) {
                let Ok(name) = name.parse::<Reference>() else { continue };
                if !self.tracker.has_recorded(&name, *target) {
                    self.registries.record_pull_success(&name.repository().registry, now());
                }
            }
        }
        self.probe_registries_of(records.as_deref());
        self.previous_image_records = records;
    }

    /// Probes each registry of this node's images until the registry answers once. A later silence
    /// is then evidence of an outage.
    pub(super) fn probe_registries_of(&mut self, records: Option<&BTreeMap<String, Digest>>) {
        let references = records.into_iter().flat_map(BTreeMap::keys).filter_map(|name| name.parse::<Reference>().ok());
        let registries: BTreeSet<_> = references.map(|reference| reference.repository().registry.clone()).collect();
        let unanswered = registries.into_iter().filter(|registry| !self.registries.has_answered(registry));
        for registry in unanswered.take(MAX_PROBED_REGISTRIES).collect::<Vec<_>>() {
            self.probe_registry(&registry);
        }
    }

    /// Images of pending containers and of volumes that are not on this node and have the pull
    /// policy `IfNotPresent`.
    pub(super) fn absent_images(&self, pod: &PodView) -> Vec<(String, PullPolicy)> {
        let image_records = self.image_records.borrow();
        // Right after the start, no list of image records exists yet.
        let Some(image_records) = image_records.as_ref().filter(|_| pod.containers.iter().any(is_pending)) else {
            return Vec::new();
        };
        let containers = pod.containers.iter().filter(|container| is_pending(container));
        let of_containers = containers.map(|container| (&container.image, container.pull_policy));
        let of_volumes = pod.image_volumes.iter().map(|volume| (&volume.image, volume.pull_policy));
        let is_absent = |image: &str| {
            image.parse::<Reference>().is_ok_and(|reference| !image_records.contains_key(&reference.to_string()))
        };
        let absent: BTreeSet<_> = of_containers
            .chain(of_volumes)
            .filter(|(image, policy)| *policy == PullPolicy::IfNotPresent && is_absent(image))
            .map(|(image, _)| image.clone())
            .collect();
        absent.into_iter().map(|image| (image, PullPolicy::IfNotPresent)).collect()
    }
}
