//! Builds the recoverer. The agent, its tests and the benchmark use this one builder.

use std::sync::Arc;

use tokio::sync::watch;

use super::blob_fetcher::BlobFetcher;
use super::claim_coordinator::ClaimCoordinator;
use super::downloads::Downloads;
use super::layer_unpacker::LayerUnpacker;
use super::recover::Recoverer;
use super::reference_resolver::ReferenceResolver;
use crate::agent::peers::inventory_view::PeerInventory;
use crate::decide::disk_reservations::Reservations;
use crate::decide::policy::{Policy, ResolveOptions};
use crate::metrics::Metrics;
use crate::model::{NodeName, PeerId, Zone};
use crate::oci::Platform;
use crate::ports::{Claims, ContentStore, Fetcher, ImportPermission, PodReader, Registry, Unpacker};

/// The parts and ports that recoveries use.
pub struct RecoveryDependencies {
    /// This agent.
    pub peer: PeerId,
    /// The name in this agent's claims.
    pub node: NodeName,
    /// Receives the content.
    pub store: Arc<dyn ContentStore>,
    /// Unpacks layers of the store; `None` leaves that to the runtime.
    pub unpacker: Option<Arc<dyn Unpacker>>,
    /// Fetches from peers.
    pub fetcher: Arc<dyn Fetcher>,
    /// Names the providers.
    pub inventory: PeerInventory,
    /// Blobs in flight, which peers may request.
    pub downloads: Downloads,
    /// This node's zone, once known.
    pub zone: watch::Receiver<Option<Zone>>,
    /// Resolves tags where the options say so.
    pub registry: Arc<dyn Registry>,
    /// Reads pull secrets.
    pub cluster: Arc<dyn PodReader>,
    /// Kubernetes Leases.
    pub claims: Arc<dyn Claims>,
    /// Budgets and opt-in, as of now.
    pub policy: watch::Receiver<Arc<Policy>>,
    /// How references become digests.
    pub resolve: ResolveOptions,
    /// Whether the runtime permits imports.
    pub imports: watch::Receiver<ImportPermission>,
    /// Counters of recoveries.
    pub metrics: Metrics,
}

impl RecoveryDependencies {
    /// Builds the recoverer. A recoverer has no task of its own.
    pub fn build(self) -> Recoverer {
        let Self {
            peer,
            node,
            store,
            unpacker,
            fetcher,
            inventory,
            downloads,
            zone,
            registry,
            cluster,
            claims,
            policy,
            resolve,
            imports,
            metrics,
        } = self;
        let platform = Platform::of_this_node();
        let resolver = ReferenceResolver {
            inventory: inventory.clone(),
            registry,
            cluster,
            platform: platform.clone(),
            options: resolve,
        };
        let layer_unpacker =
            unpacker.map(|unpacker| LayerUnpacker::new(unpacker, Arc::clone(&store) as _, metrics.clone()));
        let blob_fetcher = BlobFetcher::new(
            peer,
            Arc::clone(&store) as _,
            fetcher,
            inventory.clone(),
            downloads,
            zone,
            metrics.clone(),
        );
        let claims = ClaimCoordinator::new(claims, inventory, metrics, node, peer);
        Recoverer {
            store,
            resolver,
            blob_fetcher: Arc::new(blob_fetcher),
            claims: Arc::new(claims),
            policy,
            platform,
            reservations: Reservations::default(),
            imports,
            layer_unpacker,
        }
    }
}

#[cfg(feature = "testing")]
impl RecoveryDependencies {
    /// Dependencies on fakes, with the default policy and without a zone, for tests that replace
    /// some of them.
    pub fn on_fakes(
        peer: PeerId,
        node: NodeName,
        store: Arc<dyn ContentStore>,
        fetcher: Arc<dyn Fetcher>,
        inventory: PeerInventory,
    ) -> Self {
        use crate::testing::{MemoryCluster, MemoryRegistry};
        let cluster = MemoryCluster::default();
        Self {
            claims: Arc::new(cluster.claims_of(node.clone())),
            cluster: Arc::new(cluster),
            peer,
            node,
            store,
            unpacker: None,
            fetcher,
            inventory,
            downloads: Downloads::default(),
            zone: watch::channel(None).1,
            registry: Arc::new(MemoryRegistry::default()),
            policy: watch::channel(Arc::new(Policy::default())).1,
            resolve: ResolveOptions::default(),
            imports: watch::channel(ImportPermission::Allowed).1,
            metrics: Metrics::new(),
        }
    }
}
