//! Two agents, as in production where an image passes through: the real recovery, from one
//! containerd to another. The benchmark fills the inventory, which gossip does in production.

use std::path::PathBuf;
use std::sync::Arc;

use lighterman::admission::StaticAdmission;
use lighterman::agent::peers::inventory_view::PeerInventory;
use lighterman::agent::recovery::builder::RecoveryDependencies;
use lighterman::agent::recovery::progress::Progress;
use lighterman::agent::recovery::recover::Recoverer;
use lighterman::cli::runtime;
use lighterman::containerd::{Config, ContainerdStore};
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::{InventoryItem, MeshEvent, PeerId};
use lighterman::oci::Reference;
use lighterman::ports::{Blobs, Dialer, ImageRecords, NoPartialBlobs, Unpacker};
use lighterman::testing::policy_without_disk_limits;
use lighterman::transfer::{self, Transfer, TransferDependencies};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::daemon::Containerd;
use crate::report::BenchError;

/// A serving agent and a recovering agent, each on a runtime configured like that of a real agent.
pub(crate) struct AgentPair {
    recoverer: Recoverer,
    stop: CancellationToken,
    recovering: Runtime,
    /// Runs the serving agent.
    _serving: Runtime,
}

/// Access to containerd's content folder.
#[derive(Clone, Copy)]
pub(crate) enum ContentAccess {
    /// The agent reads blobs from files.
    Files,
    /// The agent reads blobs through the content API.
    ApiOnly,
}

/// The program that unpacks the fetched layers.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum UnpackMode {
    /// The recovery unpacks layers during the transfer.
    DuringRecovery,
    /// The first container's runtime unpacks the layers.
    AfterRecovery,
}

impl AgentPair {
    pub(crate) fn start(
        source: &Containerd,
        destination: &Containerd,
        content_access: ContentAccess,
        unpack_mode: UnpackMode,
    ) -> Result<Self, BenchError> {
        let stop = CancellationToken::new();
        let (serving, recovering) = (runtime()?, runtime()?);
        let (server, me) = (Identity::generate(), Identity::generate());
        let metrics = Metrics::new();
        let (server_transfer, items) = serving.block_on(async {
            let store = store(source, content_access, &stop)?;
            let items = announced_items(&store).await?;
            Ok::<_, BenchError>((bind(&server, me.peer_id(), store, &metrics, &stop)?, items))
        })?;
        let address = server_transfer.local_addr();
        let recoverer = recovering.block_on(async {
            let store = store(destination, content_access, &stop)?;
            let transfer = bind(&me, server.peer_id(), store.clone(), &metrics, &stop)?;
            let inventory = PeerInventory::default();
            let peer = transfer.dial(address, Some(server.peer_id())).await?;
            inventory.apply(MeshEvent::Up(peer));
            inventory.apply(MeshEvent::Snapshot(server.peer_id(), items));
            recoverer(me.peer_id(), Arc::new(store), transfer, inventory, metrics, unpack_mode)
        })?;
        Ok(Self { recoverer, stop, recovering, _serving: serving })
    }

    /// Recovers the image, from the decision to the image record.
    pub(crate) fn recover(&self, reference: &Reference) -> Result<(), BenchError> {
        let progress = Progress::default();
        let wanted = reference.clone().into();
        let recovery = self.recoverer.recover(&wanted, &progress, &self.stop);
        let recovered = self.recovering.block_on(recovery)?;
        // A blob that was present already would have cost nothing.
        if recovered.present == 0 {
            Ok(())
        } else {
            Err(format!("{} blobs were present before the recovery", recovered.present).into())
        }
    }
}

impl Drop for AgentPair {
    fn drop(&mut self) {
        // The runtimes are dropped next, with all of their tasks.
        self.stop.cancel();
    }
}

fn store(
    containerd: &Containerd,
    content_access: ContentAccess,
    stop: &CancellationToken,
) -> Result<ContainerdStore, BenchError> {
    let content_root = match content_access {
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
        // No gossip runs here.
        gossip_port: 1,
        node: "bench".parse()?,
        concurrent_uploads: 16,
    };
    let admission = Arc::new(StaticAdmission::new([other]));
    let admitted_peers = mpsc::channel(4).0;
    let (store, partials) = (Arc::new(store), Arc::new(NoPartialBlobs));
    let dependencies = TransferDependencies { admission, store, partials, metrics: metrics.clone(), admitted_peers };
    let transfer = Transfer::bind(config, identity, dependencies)?;
    tokio::spawn(transfer.clone().run(stop.clone()));
    Ok(transfer)
}

/// The items that the serving agent would announce.
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
    inventory: PeerInventory,
    metrics: Metrics,
    unpack_mode: UnpackMode,
) -> Result<Recoverer, BenchError> {
    let unpacker: Option<Arc<dyn Unpacker>> = match unpack_mode {
        UnpackMode::DuringRecovery => Some(Arc::clone(&store) as _),
        UnpackMode::AfterRecovery => None,
    };
    let dependencies = RecoveryDependencies::on_fakes(me, "bench".parse()?, store, Arc::new(transfer), inventory);
    let policy = watch::channel(Arc::new(policy_without_disk_limits())).1;
    Ok(RecoveryDependencies { unpacker, policy, metrics, ..dependencies }.build())
}
