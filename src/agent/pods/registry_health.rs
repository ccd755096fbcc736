//! What this node knows of registries: who cannot be reached, told to peers, heard from peers, and asked about.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use tokio::sync::watch;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::decide::outage::RegistryOutages;
use crate::metrics::Metrics;
use crate::model::{Outage, OutageKind};
use crate::oci::Reference;
use crate::ports::{Registry, RegistryError};

/// The registries as this node sees them.
pub struct RegistryHealth {
    outages: RegistryOutages,
    inventory: PeerInventory,
    registry: Arc<dyn Registry>,
    /// Whether registries are asked at all.
    is_probing: bool,
    observed_outages: watch::Sender<Vec<Outage>>,
    healthy: watch::Sender<Arc<BTreeSet<String>>>,
    metrics: Metrics,
}

/// A registry's answer to the question whether it is there.
pub(in crate::agent) struct RegistryProbe {
    pub(in crate::agent) registry: String,
    pub(in crate::agent) result: Result<(), OutageKind>,
}

impl RegistryHealth {
    /// Nothing is known yet. What this node finds out itself goes to `first_hand`, for its peers.
    pub fn new(
        inventory: PeerInventory,
        registry: Arc<dyn Registry>,
        is_probing: bool,
        observed_outages: watch::Sender<Vec<Outage>>,
        metrics: Metrics,
    ) -> Self {
        Self {
            outages: RegistryOutages::default(),
            inventory,
            registry,
            is_probing,
            observed_outages,
            healthy: watch::Sender::default(),
            metrics,
        }
    }

    /// The registries that have answered this agent and that neither this node nor a peer found down. A single peer is
    /// believed here, because background fetches alone go by this.
    pub fn healthy(&self) -> watch::Receiver<Arc<BTreeSet<String>>> {
        self.healthy.subscribe()
    }

    /// Whether the registry counts as down: this node found the registry unreachable; or it did not just have an answer, and
    /// two peers found it so, or one did and it does not answer here either. One peer alone is not believed: it would have every node
    /// take its word for what a tag means.
    pub(in crate::agent) fn is_down(&self, registry: &str, now: Instant) -> bool {
        if self.outages.is_down(registry, now) {
            return true;
        }
        let witnesses: BTreeSet<_> =
            self.inventory.registry_outages(registry).into_iter().flat_map(|(_, peers)| peers).collect();
        let enough = if self.outages.did_last_probe_fail(registry) { 1 } else { 2 };
        witnesses.len() >= enough && !self.outages.is_answering(registry, now)
    }

    /// Whether an image may be recovered before the pod's own pull has failed. For a digest, what peers say is enough. A tag may have
    /// moved, and its registry decides while it can be reached: only what this node saw, and within seconds, counts.
    pub(in crate::agent) fn may_recover_early(&self, reference: &Reference, now: Instant) -> bool {
        let registry = &reference.repository().registry;
        match reference {
            Reference::Digest(..) => self.is_down(registry, now),
            Reference::Tag(..) => self.outages.has_fresh_evidence(registry, now),
        }
    }

    /// Since when this node knows that the registry is down, in seconds since 1970.
    pub(in crate::agent) fn down_since(&self, registry: &str, now: Instant) -> Option<u64> {
        self.outages.down_since(registry, now)
    }

    /// A pull through containerd failed for a fault of the registry; `has_mirror` where its message names another host.
    pub(in crate::agent) fn record_pull_failure(
        &mut self,
        registry: &str,
        kind: OutageKind,
        has_mirror: bool,
        now: Instant,
    ) {
        self.outages.record_failed_pull(registry, kind, has_mirror, now, SystemTime::now());
        self.publish(now);
    }

    /// A pull through containerd failed with an answer of the registry, or of a mirror.
    pub(in crate::agent) fn pull_answered(&mut self, registry: &str) {
        self.outages.record_answered_pull(registry);
    }

    /// A pull through containerd succeeded: the registry, or a mirror of it, can be reached from here.
    pub(in crate::agent) fn record_pull_success(&mut self, registry: &str, now: Instant) {
        if self.outages.record_successful_pull(registry, now) {
            tracing::info!(registry, "a pull succeeded, so the registry can be reached again");
            self.publish(now);
        }
    }

    /// What was asked, answered; whether that changed what is to be thought of the registry.
    pub(in crate::agent) fn record_probe(&mut self, probe: RegistryProbe, now: Instant) -> bool {
        let RegistryProbe { registry, result } = probe;
        let before = self.is_down(&registry, now);
        if self.outages.record_probe(&registry, result, now, SystemTime::now()) {
            match result {
                Ok(()) => tracing::info!(registry, "the registry answers again"),
                Err(kind) => tracing::warn!(registry, how = %kind, "the registry does not answer any more"),
            }
        }
        self.publish(now);
        self.is_down(&registry, now) != before
    }

    /// Whether the registry answered this agent at least once.
    pub(in crate::agent) fn has_answered(&self, registry: &str) -> bool {
        self.outages.has_answered(registry)
    }

    /// A question to the registry, if one is worth asking now.
    pub(in crate::agent) fn probe_if_due(
        &mut self,
        registry: &str,
        now: Instant,
    ) -> Option<impl Future<Output = RegistryProbe> + Send + use<>> {
        let suspected = !self.inventory.registry_outages(registry).is_empty();
        if !self.is_probing || !self.outages.begin_probe_if_due(registry, suspected, now) {
            return None;
        }
        self.probe(registry)
    }

    /// A question to the registry now, unless registries are not to be asked. For what is decided seldom.
    pub(in crate::agent) fn probe(&self, registry: &str) -> Option<impl Future<Output = RegistryProbe> + Send + use<>> {
        if !self.is_probing {
            return None;
        }
        let (port, registry) = (Arc::clone(&self.registry), registry.to_owned());
        Some(async move {
            let result = match port.ping(&registry).await {
                // It is there, whatever it says; also where somebody else answers in its place, which a pull will find out.
                Ok(()) | Err(RegistryError::RateLimited(_) | RegistryError::Denied(_) | RegistryError::NotFound(_)) => {
                    Ok(())
                }
                Err(RegistryError::InvalidResponse { .. }) => Ok(()),
                Err(RegistryError::Down { kind, .. }) => Err(kind),
            };
            RegistryProbe { registry, result }
        })
    }

    /// The registries to ask again although no pod came: those that this node itself found down. What peers only say is looked into when
    /// a pod here wants an image from there.
    pub(in crate::agent) fn down_registries(&self, now: Instant) -> Vec<String> {
        self.outages.down_registries(now)
    }

    /// Tells the peers what changed, also by time alone.
    pub(in crate::agent) fn publish(&self, now: Instant) {
        let observed = self.outages.local_outages(now);
        let healthy = self.outages.healthy(now).filter(|registry| self.inventory.registry_outages(registry).is_empty());
        let healthy: BTreeSet<_> = healthy.map(str::to_owned).collect();
        self.healthy.send_if_modified(|before| {
            let changed = **before != healthy;
            if changed {
                *before = Arc::new(healthy);
            }
            changed
        });
        self.metrics.registries_down(observed.len());
        self.observed_outages.send_if_modified(|published| {
            let changed = *published != observed;
            if changed {
                *published = observed;
            }
            changed
        });
    }
}
