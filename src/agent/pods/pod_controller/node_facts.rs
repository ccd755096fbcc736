//! The facts about peers and running recoveries that decisions read.

use std::collections::HashMap;

use super::recoveries::RunningRecovery;
use crate::agent::pods::pod_notifier::PodNotifier;
use crate::agent::recovery::progress::RecoveryTracker;
use crate::agent::recovery::recover::Recoverer;
use crate::decide::pods::Facts;
use crate::oci::{Digest, Reference};

pub(super) struct NodeFacts<'a> {
    pub(super) recoverer: &'a Recoverer,
    pub(super) tracker: &'a RecoveryTracker,
    pub(super) running: &'a HashMap<Reference, RunningRecovery>,
    pub(super) pod_notifier: &'a PodNotifier,
}

impl Facts for NodeFacts<'_> {
    fn count_outage_reports(&self, registry: &str) -> usize {
        self.recoverer.resolver.inventory.count_outage_reports(registry)
    }

    fn has_provider(&self, reference: &Reference) -> bool {
        self.recoverer.resolver.has_provider(reference)
    }

    fn has_blob_provider(&self, digest: Digest) -> bool {
        !self.recoverer.resolver.inventory.blob_providers(digest).is_empty()
    }

    fn is_recording(&self, reference: &Reference) -> bool {
        self.running.get(reference).is_some_and(|running| running.progress.is_recorded())
    }

    fn has_recorded(&self, name: &Reference, target: Digest) -> bool {
        self.tracker.has_recorded(name, target)
    }

    fn has_rejected_reservation(&self) -> bool {
        self.recoverer.reservations.has_rejected()
    }

    fn is_nudge_denied(&self) -> bool {
        self.pod_notifier.is_nudge_denied()
    }
}
