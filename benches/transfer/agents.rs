//! Two agents as they are in production, as far as an image passes through them: the real recovery, from one containerd to the other.
//! What gossip would tell is told by hand.

use std::path::PathBuf;
use std::sync::Arc;

use lighterman::admission::StaticAdmission;
use lighterman::agent::blob_fetcher::BlobFetcher;
use lighterman::agent::claim_coordinator::ClaimCoordinator;
use lighterman::agent::inventory_view::PeerInventory;
use lighterman::agent::layer_unpacker::LayerUnpacker;
use lighterman::agent::progress::Progress;
use lighterman::agent::recover::Recoverer;
use lighterman::agent::reference_resolver::ReferenceResolver;
use lighterman::agent::swarm::Downloads;
use lighterman::cli::runtime;
use lighterman::containerd::{Config, ContainerdStore};
use lighterman::decide::disk_reservations::Reservations;
use lighterman::decide::policy::{Policy, ResolveOptions};
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::{InventoryItem, MeshEvent, NodeName, PeerId};
use lighterman::oci::{Platform, Reference};
use lighterman::ports::{ContentStore, ImportPermission, NoPartialBlobs};
use lighterman::testing::{MemoryCluster, MemoryRegistry};
use lighterman::transfer::{self, Transfer, TransferDependencies};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::daemon::Containerd;
use crate::report::BenchError;

/// The agent that serves and the one that recovers, each on a runtime of its own like the agent's.
pub(crate) struct AgentPair {
    recoverer: Recoverer,
    stop: CancellationToken,
    recovering: Runtime,
    /// Drives the other agent.
    _serving: Runtime,
}

/// What the agent sees of containerd's content folder.
#[derive(Clone, Copy)]
pub(crate) enum ContentAccess {
    /// It reads blobs from their files.
    Files,
    /// It reads them through the content API.
    ApiOnly,
}

/// Who unpacks the layers that come.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum UnpackMode {
    /// The recovery, as they come.
    DuringRecovery,
    /// Whoever makes a container.
    AfterRecovery,
}

impl AgentPair {
    pub(crate) fn start(
        source: &Containerd,
        destination: &Containerd,
        sight: ContentAccess,
        unpacks: UnpackMode,
    ) -> Result<Self, BenchError> {
        let stop = CancellationToken::new();
        let (serving, recovering) = (runtime()?, runtime()?);
        let (server, me) = (Identity::generate(), Identity::generate());
        let metrics = Metrics::new();
        let (served, items) = serving.block_on(async {
            let store = store(source, sight, &stop)?;
            let items = announced_items(&store).await?;
            Ok::<_, BenchError>((bind(&server, me.peer_id(), store, &metrics, &stop)?, items))
        })?;
        let address = served.local_addr();
        let recoverer = recovering.block_on(async {
            let store = store(destination, sight, &stop)?;
            let transfer = bind(&me, server.peer_id(), store.clone(), &metrics, &stop)?;
            let holders = PeerInventory::default();
            let peer = transfer.dial(address, Some(server.peer_id())).await?;
            holders.apply(MeshEvent::Up(peer));
            holders.apply(MeshEvent::Snapshot(server.peer_id(), items));
            recoverer(me.peer_id(), Arc::new(store), transfer, holders, metrics, unpacks)
        })?;
        Ok(Self { recoverer, stop, recovering, _serving: serving })
    }

    /// From the decision to recover to the image's record.
    pub(crate) fn recover(&self, reference: &Reference) -> Result<(), BenchError> {
        let progress = Progress::default();
        let wanted = reference.clone().into();
        let recovery = self.recoverer.recover(&wanted, &progress, &self.stop);
        let recovered = self.recovering.block_on(recovery)?;
        // Blobs that had been there would have cost nothing.
        if recovered.present == 0 { Ok(()) } else { Err(format!("{} blobs were there", recovered.present).into()) }
    }
}

impl Drop for AgentPair {
    fn drop(&mut self) {
        // The runtimes are dropped next, and every task with them.
        self.stop.cancel();
    }
}

fn store(
    containerd: &Containerd,
    sight: ContentAccess,
    stop: &CancellationToken,
) -> Result<ContainerdStore, BenchError> {
    let content_root = match sight {
        ContentAccess::Files => None,
        ContentAccess::ApiOnly => Some(PathBuf::from("/nothing/is/here")),
    };
    let config = Config { content_root, ..containerd.config() };
    let store = ContainerdStore::new(config)?;
    tokio::spawn(store.clone().run(stop.clone()));
    Ok(store)
}

fn bind(
    identity: &Identity,
    other: PeerId,
    store: ContainerdStore,
    metrics: &Metrics,
    stop: &CancellationToken,
) -> Result<Transfer, BenchError> {
    let config = transfer::Config {
        listen: "127.0.0.1:0".parse()?,
        // Nobody gossips here.
        gossip_port: 1,
        node: "bench".parse()?,
        concurrent_uploads: 16,
    };
    let admission = Arc::new(StaticAdmission::new([other]));
    let joined = mpsc::channel(4).0;
    let (store, partials) = (Arc::new(store), Arc::new(NoPartialBlobs));
    let surroundings =
        TransferDependencies { admission, store, partials, metrics: metrics.clone(), admitted_peers: joined };
    let transfer = Transfer::bind(config, identity, surroundings)?;
    tokio::spawn(transfer.clone().run(stop.clone()));
    Ok(transfer)
}

/// What the serving agent would announce.
async fn announced_items(store: &ContainerdStore) -> Result<Vec<InventoryItem>, BenchError> {
    let mut items: Vec<_> = store.blobs().await?.into_iter().map(|blob| InventoryItem::Blob(blob.digest)).collect();
    for record in store.images().await? {
        if let Reference::Tag(repository, tag) = record.name.parse()? {
            items.push(InventoryItem::Image(repository, Some(tag), record.target.digest));
        }
    }
    Ok(items)
}

fn recoverer(
    me: PeerId,
    store: Arc<ContainerdStore>,
    transfer: Transfer,
    holders: PeerInventory,
    metrics: Metrics,
    unpacks: UnpackMode,
) -> Result<Recoverer, BenchError> {
    let node: NodeName = "bench".parse()?;
    let mut rules = Policy::default();
    rules.budgets.min_free_bytes = 0;
    rules.budgets.image_gc_percent = 100;
    rules.budgets.eviction_percent = 0;
    let unpacking = match unpacks {
        UnpackMode::DuringRecovery => {
            Some(LayerUnpacker::new(Arc::clone(&store) as _, Arc::clone(&store) as _, metrics.clone()))
        }
        UnpackMode::AfterRecovery => None,
    };
    let claims = Arc::new(MemoryCluster::default().claims_of(node.clone()));
    Ok(Recoverer {
        store: Arc::clone(&store) as _,
        resolver: ReferenceResolver {
            inventory: holders.clone(),
            registry: Arc::new(MemoryRegistry::default()),
            cluster: Arc::new(MemoryCluster::default()),
            platform: Platform::of_this_node(),
            options: ResolveOptions::default(),
        },
        blob_fetcher: Arc::new(BlobFetcher::new(
            me,
            store,
            Arc::new(transfer),
            holders.clone(),
            Downloads::default(),
            watch::channel(None).1,
            metrics.clone(),
        )),
        claims: Arc::new(ClaimCoordinator::new(claims, holders, metrics, node, me)),
        policy: watch::channel(Arc::new(rules)).1,
        platform: Platform::of_this_node(),
        reservations: Reservations::default(),
        imports: watch::channel(ImportPermission::Allowed).1,
        layer_unpacker: unpacking,
    })
}
