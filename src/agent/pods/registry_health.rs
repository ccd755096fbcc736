//! Health of registries on this node, from failed pulls, probes and the outages that peers
//! announce.

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

/// Outages of registries, with this node's evidence and the peers'.
pub struct RegistryHealth {
    outages: RegistryOutages,
    inventory: PeerInventory,
    registry: Arc<dyn Registry>,
    /// Whether registries are probed at all.
    is_probing: bool,
    observed_outages: watch::Sender<Vec<Outage>>,
    healthy: watch::Sender<Arc<BTreeSet<String>>>,
    metrics: Metrics,
}

/// A registry's answer to a probe.
pub(in crate::agent) struct RegistryProbe {
    pub(in crate::agent) registry: String,
    pub(in crate::agent) result: Result<(), OutageKind>,
}

impl RegistryHealth {
    /// Starts without evidence. Outages that this node observes go to `observed_outages`, for the
    /// announcer.
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

    /// Registries that have answered this agent, and that neither this node nor a peer found down.
    /// One peer suffices here, because only background fetches use this list.
    pub fn healthy(&self) -> watch::Receiver<Arc<BTreeSet<String>>> {
        self.healthy.subscribe()
    }

    /// Whether the registry counts as down. This node's own evidence suffices. Otherwise two peers
    /// must announce the outage, or one peer if the last probe from here failed too; a recent
    /// answer to this node outweighs both. One peer alone does not suffice: a lying peer could then
    /// decide for every node which content a tag has.
    pub(in crate::agent) fn is_down(&self, registry: &str, now: Instant) -> bool {
        if self.outages.is_down(registry, now) {
            return true;
        }
        let reporting_peers: BTreeSet<_> =
            self.inventory.registry_outages(registry).into_iter().flat_map(|(_, peers)| peers).collect();
        let required_peers = if self.outages.did_last_probe_fail(registry) { 1 } else { 2 };
        reporting_peers.len() >= required_peers && !self.outages.is_answering(registry, now)
    }

    /// Whether an image may be recovered before the pod's own pull has failed. For a digest, the
    /// peers' announcements suffice. A tag may have moved, and the registry decides while it is
    /// reachable: only fresh evidence of this node counts.
    pub(in crate::agent) fn may_recover_early(&self, reference: &Reference, now: Instant) -> bool {
        let registry = &reference.repository().registry;
        match reference {
            Reference::Digest(..) => self.is_down(registry, now),
            Reference::Tag(..) => self.outages.has_fresh_evidence(registry, now),
        }
    }

    /// Start of the outage on this node, in seconds since 1970.
    pub(in crate::agent) fn down_since(&self, registry: &str, now: Instant) -> Option<u64> {
        self.outages.down_since(registry, now)
    }

    /// Records a pull through containerd that failed for a fault of the registry. `has_mirror` if
    /// the message names another host.
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

    /// Records a pull through containerd that failed with an answer of the registry or of a mirror.
    pub(in crate::agent) fn record_answered_pull(&mut self, registry: &str) {
        self.outages.record_answered_pull(registry);
    }

    /// Records a successful pull through containerd: this node reaches the registry, or a mirror of
    /// it.
    pub(in crate::agent) fn record_pull_success(&mut self, registry: &str, now: Instant) {
        if self.outages.record_successful_pull(registry, now) {
            tracing::info!(registry, "a pull succeeded, so the registry can be reached again");
            self.publish(now);
        }
    }

    /// Records a probe's result. Returns whether the registry is newly down or up.
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

    pub(in crate::agent) fn has_answered(&self, registry: &str) -> bool {
        self.outages.has_answered(registry)
    }

    /// A probe of the registry, if one is due.
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

    /// A probe of the registry now, for rare decisions; `None` where probes are off.
    pub(in crate::agent) fn probe(&self, registry: &str) -> Option<impl Future<Output = RegistryProbe> + Send + use<>> {
        if !self.is_probing {
            return None;
        }
        let (client, registry) = (Arc::clone(&self.registry), registry.to_owned());
        Some(async move {
            let result = match client.ping(&registry).await {
                // Any answer counts, also one from another server in the registry's place: a pull
                // finds that out.
                Ok(()) | Err(RegistryError::RateLimited(_) | RegistryError::Denied(_) | RegistryError::NotFound(_)) => {
                    Ok(())
                }
                Err(RegistryError::InvalidResponse { .. }) => Ok(()),
                Err(RegistryError::Down { kind, .. }) => Err(kind),
            };
            RegistryProbe { registry, result }
        })
    }

    /// Registries to probe again without a new pod: those that this node itself found down. A
    /// peer's outage is probed only when a pod of this node needs an image from there.
    pub(in crate::agent) fn down_registries(&self, now: Instant) -> Vec<String> {
        self.outages.down_registries(now)
    }

    /// Publishes the outages and the healthy registries, which also change by time alone.
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
