//! Two agents as they are in production, as far as an image passes through them: the real recovery, from one containerd to the other.
//! What gossip would tell is told by hand.

use std::path::PathBuf;
use std::sync::Arc;

use lighterman::admission::StaticAdmission;
use lighterman::agent::bring::Bring;
use lighterman::agent::holders::Holders;
use lighterman::agent::lead::Lead;
use lighterman::agent::progress::Progress;
use lighterman::agent::recover::Recoverer;
use lighterman::agent::resolve::Resolver;
use lighterman::agent::swarm::Underway;
use lighterman::agent::unpack::Unpacking;
use lighterman::cli::runtime;
use lighterman::containerd::{Config, ContainerdStore};
use lighterman::decide::reserve::Reservations;
use lighterman::decide::rules::{ResolveSettings, Rules};
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::{Item, MeshEvent, NodeName, PeerId};
use lighterman::oci::{Platform, Reference};
use lighterman::ports::{ContentStore, Imports, NoPartials};
use lighterman::testing::{MemoryCluster, MemoryRegistry};
use lighterman::transfer::{self, Surroundings, Transfer};
use tokio::runtime::Runtime;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use crate::daemon::Containerd;
use crate::report::Failure;

/// The agent that serves and the one that recovers, each on a runtime of its own like the agent's.
pub(crate) struct Agents {
    recoverer: Recoverer,
    stop: CancellationToken,
    recovering: Runtime,
    /// Drives the other agent.
    _serving: Runtime,
}

/// What the agent sees of containerd's content folder.
#[derive(Clone, Copy)]
pub(crate) enum Sight {
    /// It reads blobs from their files.
    Files,
    /// It reads them through the content API.
    Nothing,
}

/// Who unpacks the layers that come.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Unpacks {
    /// The recovery, as they come.
    Early,
    /// Whoever makes a container.
    Later,
}

impl Agents {
    pub(crate) fn start(
        source: &Containerd,
        destination: &Containerd,
        sight: Sight,
        unpacks: Unpacks,
    ) -> Result<Self, Failure> {
        let stop = CancellationToken::new();
        let (serving, recovering) = (runtime()?, runtime()?);
        let (server, me) = (Identity::generate(), Identity::generate());
        let metrics = Metrics::new();
        let (served, items) = serving.block_on(async {
            let store = store(source, sight, &stop)?;
            let items = everything_in(&store).await?;
            Ok::<_, Failure>((bind(&server, me.peer_id(), store, &metrics, &stop)?, items))
        })?;
        let address = served.local_addr();
        let recoverer = recovering.block_on(async {
            let store = store(destination, sight, &stop)?;
            let transfer = bind(&me, server.peer_id(), store.clone(), &metrics, &stop)?;
            let holders = Holders::default();
            let peer = transfer.greet(address, Some(server.peer_id())).await?;
            holders.apply(MeshEvent::Up(peer));
            holders.apply(MeshEvent::Snapshot(server.peer_id(), items));
            recoverer(me.peer_id(), Arc::new(store), transfer, holders, metrics, unpacks)
        })?;
        Ok(Self { recoverer, stop, recovering, _serving: serving })
    }

    /// From the decision to recover to the image's record.
    pub(crate) fn recover(&self, reference: &Reference) -> Result<(), Failure> {
        let progress = Progress::default();
        let wanted = reference.clone().into();
        let recovery = self.recoverer.recover(&wanted, &progress, &self.stop);
        let recovered = self.recovering.block_on(recovery)?;
        // Blobs that had been there would have cost nothing.
        if recovered.there == 0 { Ok(()) } else { Err(format!("{} blobs were there", recovered.there).into()) }
    }
}

impl Drop for Agents {
    fn drop(&mut self) {
        // The runtimes are dropped next, and every task with them.
        self.stop.cancel();
    }
}

fn store(containerd: &Containerd, sight: Sight, stop: &CancellationToken) -> Result<ContainerdStore, Failure> {
    let content_root = match sight {
        Sight::Files => None,
        Sight::Nothing => Some(PathBuf::from("/nothing/is/here")),
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
) -> Result<Transfer, Failure> {
    let config = transfer::Config {
        listen: "127.0.0.1:0".parse()?,
        // Nobody gossips here.
        gossip_port: 1,
        node: "bench".parse()?,
        max_serving: 16,
    };
    let admission = Arc::new(StaticAdmission::new([other]));
    let joined = mpsc::channel(4).0;
    let (store, partials) = (Arc::new(store), Arc::new(NoPartials));
    let surroundings = Surroundings { admission, store, partials, metrics: metrics.clone(), joined };
    let transfer = Transfer::bind(config, identity, surroundings)?;
    tokio::spawn(transfer.clone().run(stop.clone()));
    Ok(transfer)
}

/// What the serving agent would announce.
async fn everything_in(store: &ContainerdStore) -> Result<Vec<Item>, Failure> {
    let mut items: Vec<_> = store.blobs().await?.into_iter().map(|blob| Item::Blob(blob.digest)).collect();
    for record in store.images().await? {
        if let Reference::Tag(repository, tag) = record.name.parse()? {
            items.push(Item::Image(repository, Some(tag), record.target.digest));
        }
    }
    Ok(items)
}

fn recoverer(
    me: PeerId,
    store: Arc<ContainerdStore>,
    transfer: Transfer,
    holders: Holders,
    metrics: Metrics,
    unpacks: Unpacks,
) -> Result<Recoverer, Failure> {
    let node: NodeName = "bench".parse()?;
    let mut rules = Rules::default();
    rules.budgets.min_free_bytes = 0;
    rules.budgets.collection_percent = 100;
    rules.budgets.eviction_percent = 0;
    let unpacking = match unpacks {
        Unpacks::Early => Some(Unpacking::new(Arc::clone(&store) as _, Arc::clone(&store) as _, metrics.clone())),
        Unpacks::Later => None,
    };
    let claims = Arc::new(MemoryCluster::default().claims_of(node.clone()));
    Ok(Recoverer {
        store: Arc::clone(&store) as _,
        resolver: Resolver {
            holders: holders.clone(),
            registry: Arc::new(MemoryRegistry::default()),
            cluster: Arc::new(MemoryCluster::default()),
            platform: Platform::of_this_node(),
            settings: ResolveSettings::default(),
        },
        bring: Arc::new(Bring::new(
            me,
            store,
            Arc::new(transfer),
            holders.clone(),
            Underway::default(),
            watch::channel(None).1,
            metrics.clone(),
        )),
        lead: Arc::new(Lead::new(claims, holders, metrics, node, me)),
        rules: watch::channel(Arc::new(rules)).1,
        platform: Platform::of_this_node(),
        room: Reservations::default(),
        imports: watch::channel(Imports::Allowed).1,
        unpacking,
    })
}
