//! Probes of registries, and the publication of their health.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Instant;

use tokio::sync::watch;

use crate::agent::peers::inventory_view::PeerInventory;
use crate::decide::outage::RegistryOutages;
use crate::decide::pods::RegistryProbe;
use crate::metrics::Metrics;
use crate::model::Outage;
use crate::ports::{Registry, RegistryError};

/// Probes registries, and publishes their outages and their health.
pub struct RegistryHealth {
    inventory: PeerInventory,
    registry: Arc<dyn Registry>,
    /// Whether registries are probed at all.
    is_probing: bool,
    observed_outages: watch::Sender<Vec<Outage>>,
    healthy: watch::Sender<Arc<BTreeSet<String>>>,
    metrics: Metrics,
}

impl RegistryHealth {
    /// Publishes nothing yet. Outages that this node observes go to `observed_outages`, for the
    /// announcer.
    pub fn new(
        inventory: PeerInventory,
        registry: Arc<dyn Registry>,
        is_probing: bool,
        observed_outages: watch::Sender<Vec<Outage>>,
        metrics: Metrics,
    ) -> Self {
        Self { inventory, registry, is_probing, observed_outages, healthy: watch::Sender::default(), metrics }
    }

    /// Registries that have answered this agent, and that neither this node nor a peer found down.
    /// One peer suffices here, because only background fetches use this list.
    pub fn healthy(&self) -> watch::Receiver<Arc<BTreeSet<String>>> {
        self.healthy.subscribe()
    }

    pub(in crate::agent) fn is_probing(&self) -> bool {
        self.is_probing
    }

    /// A probe of the registry now.
    pub(in crate::agent) fn probe(&self, registry: &str) -> impl Future<Output = RegistryProbe> + Send + use<> {
        let (client, registry) = (Arc::clone(&self.registry), registry.to_owned());
        async move {
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
        }
    }

    /// Publishes the outages and the healthy registries, which also change by time alone.
    pub(in crate::agent) fn publish(&self, outages: &RegistryOutages, now: Instant) {
        let observed = outages.local_outages(now);
        let healthy = outages.healthy(now).filter(|registry| self.inventory.registry_outages(registry).is_empty());
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
