//! One agent's mesh with what the rest of an agent does for it, and the doors between them.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::Mutex;

use async_trait::async_trait;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::super::*;
use crate::decide::inventory::Inventory;
use crate::model::Item;
use crate::oci::Digest;
use crate::ports::{Admitted, Refusal};

/// Far more than any step here takes on a busy machine; what never happens ends a test anyway.
pub(super) const DEADLINE: Duration = Duration::from_secs(60);

/// For how long the door of these tests admits: longer than any of them.
pub(super) const LIFE: Duration = Duration::from_secs(3600);

pub(super) async fn soon<T>(what: &str, future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.unwrap_or_else(|_| panic!("in time: {what}"))
}

/// Vouches for everybody but some.
#[derive(Default)]
pub(in crate::mesh) struct AllBut(pub(in crate::mesh) BTreeSet<PeerId>);

impl AllBut {
    /// When its verdicts end: in some thousand years.
    pub(in crate::mesh) const UNTIL: Duration = Duration::from_secs(1 << 37);
}

#[async_trait]
impl Admission for AllBut {
    async fn credential(&self) -> Result<Credential, Refusal> {
        Ok(Credential::default())
    }

    fn renewed(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<Admitted, Refusal> {
        self.vouch(peer, credential)
    }

    fn vouch(&self, peer: PeerId, _: &Credential) -> Result<Admitted, Refusal> {
        if self.0.contains(&peer) {
            return Err(Refusal::Denied("one of those".into()));
        }
        Ok(Admitted { node: None, pod: None, until: Self::UNTIL, on_grace: false })
    }
}

/// Stands for everybody's QUIC door: who may meet whom, and is admitted by both sides then.
#[derive(Clone, Default)]
pub(super) struct Doors(Arc<Mutex<BTreeMap<PeerId, Door>>>);

#[derive(Clone)]
struct Door {
    mesh: Mesh,
    peer: Peer,
    /// Whom it can never meet.
    never: BTreeSet<PeerId>,
}

impl Doors {
    pub(super) fn open(&self, mesh: &Mesh, peer: Peer) {
        self.0.lock().unwrap().insert(peer.id, Door { mesh: mesh.clone(), peer, never: BTreeSet::new() });
    }

    /// These two can never meet.
    pub(super) fn part(&self, a: PeerId, b: PeerId) {
        let mut doors = self.0.lock().unwrap();
        for (one, other) in [(a, b), (b, a)] {
            doors.get_mut(&one).unwrap().never.insert(other);
        }
    }

    pub(super) fn close(&self, peer: PeerId) {
        self.0.lock().unwrap().remove(&peer);
    }

    pub(super) async fn greet(&self, from: PeerId, to: PeerId) {
        let (ours, theirs) = {
            let doors = self.0.lock().unwrap();
            (doors.get(&from).cloned(), doors.get(&to).cloned())
        };
        let Some(ours) = ours else { return };
        match theirs.filter(|_| !ours.never.contains(&to)) {
            Some(theirs) => {
                theirs.mesh.admit(ours.peer, LIFE).await;
                ours.mesh.admit(theirs.peer, LIFE).await;
            }
            None => ours.mesh.unreachable(to).await,
        }
    }
}

/// One agent's mesh, with what the rest of an agent does for it.
pub(super) struct Node {
    pub(super) name: NodeName,
    pub(super) identity: Identity,
    pub(super) mesh: Mesh,
    pub(super) address: SocketAddr,
    pub(super) metrics: Metrics,
    pub(super) table: Table,
    pub(super) doors: Doors,
    /// Who came up, in order.
    pub(super) ups: Arc<Mutex<Vec<PeerId>>>,
    /// The node whose agent has the same key.
    pub(super) shared_key: watch::Receiver<Option<NodeName>>,
    pub(super) stop: CancellationToken,
    pub(super) task: JoinHandle<()>,
}

/// How a node is started.
pub(super) struct Setting {
    pub(super) name: NodeName,
    pub(super) identity: Identity,
    pub(super) listen: SocketAddr,
    pub(super) admission: AllBut,
    pub(super) limits: Limits,
    pub(super) versions: Versions,
    pub(super) doors: Doors,
}

impl Default for Setting {
    fn default() -> Self {
        Self {
            name: "node".parse().unwrap(),
            identity: Identity::generate(),
            listen: ([127, 0, 0, 1], 0).into(),
            admission: AllBut::default(),
            limits: Limits::DEFAULT,
            versions: Versions::GOSSIP,
            doors: Doors::default(),
        }
    }
}

impl Node {
    pub(super) async fn start(doors: &Doors) -> Self {
        Self::start_as(Setting { doors: doors.clone(), ..Setting::default() }).await
    }

    pub(super) async fn start_as(setting: Setting) -> Self {
        let node = Self::start_silent(setting).await;
        node.introduce(node.address).await;
        node
    }

    /// One that does not introduce itself yet.
    pub(super) async fn start_silent(setting: Setting) -> Self {
        Self::start_serving(setting, None).await
    }

    /// The same with a server of ranges.
    pub(super) async fn start_serving(setting: Setting, server: Option<Arc<dyn RangeServer>>) -> Self {
        let Setting { name, identity, listen, admission, limits, versions, doors } = setting;
        let (shared_in, shared_key) = watch::channel(None);
        let (metrics, table) = (Metrics::new(), Table::default());
        let (mesh, task, address) = start_within(
            Config { listen },
            name.clone(),
            &identity,
            table.clone(),
            Arc::new(admission),
            metrics.clone(),
            Terms { limits, versions },
        )
        .await
        .unwrap();
        let task = server.into_iter().fold(task, MeshTask::serving);
        let (sender, mut news) = mpsc::channel(4);
        let stop = CancellationToken::new();
        let ups = Arc::new(Mutex::new(Vec::new()));
        let (me, told, known) = (identity.peer_id(), Arc::clone(&ups), doors.clone());
        tokio::spawn(async move {
            while let Some(news) = news.recv().await {
                match news {
                    MeshNews::Up(peer) => told.lock().unwrap().push(peer.id),
                    MeshNews::Down(_) => {}
                    MeshNews::Greet(peer) => known.greet(me, peer.id).await,
                    MeshNews::SharedKey(node) => drop(shared_in.send_replace(Some(node))),
                }
            }
        });
        let task = tokio::spawn(task.run(sender, stop.clone()));
        Self { name, identity, mesh, address, metrics, table, doors, ups, shared_key, stop, task }
    }

    /// Joins, with the address where it says that it can be dialled.
    pub(super) async fn introduce(&self, gossip: SocketAddr) {
        self.doors.open(&self.mesh, Peer { gossip, ..self.peer() });
        self.mesh.introduce(Credential::default(), self.address, gossip, None).await;
    }

    pub(super) fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    pub(super) fn peer(&self) -> Peer {
        Peer { id: self.id(), node: self.name.clone(), zone: None, transfer: self.address, gossip: self.address }
    }

    /// Waits until the table says something.
    pub(super) async fn until(&self, what: &str, so: impl Fn(&Inventory) -> bool) {
        let mut changes = self.table.changes();
        soon(what, changes.wait_for(|_| self.table.read(&so))).await.unwrap();
    }

    pub(super) async fn until_up(&self, peer: PeerId) {
        self.until("the peer is up", |table| table.peers().iter().any(|one| one.id == peer)).await;
    }

    pub(super) async fn until_alone(&self) {
        self.until("everybody is down", |table| table.peers().is_empty()).await;
    }

    pub(super) async fn until_holds(&self, peer: PeerId, digest: Digest) {
        self.until("the blob is announced", |table| table.holders(digest).contains(&peer)).await;
    }

    pub(super) fn items_of(&self, peer: PeerId) -> usize {
        self.table.read(|table| table.items_of(peer))
    }

    pub(super) fn holders(&self, digest: Digest) -> Vec<PeerId> {
        self.table.read(|table| table.holders(digest))
    }

    pub(super) async fn announce(&self, digest: Digest) {
        self.mesh.announce(vec![ContentChange::Added(Item::Blob(digest))]).await;
    }

    pub(super) async fn stop(self) -> (Identity, SocketAddr) {
        self.doors.close(self.id());
        self.stop.cancel();
        soon("the mesh stops", self.task).await.unwrap();
        (self.identity, self.address)
    }

    pub(super) fn has_counted(&self, line: &str) -> bool {
        String::from_utf8(self.metrics.render()).unwrap().contains(line)
    }

    pub(super) fn has_refused(&self, reason: &str) -> bool {
        self.has_counted(&format!("gossip_rejected_total{{reason=\"{reason}\"}}"))
    }

    pub(super) fn has_blamed(&self, fault: &str) -> bool {
        self.has_counted(&format!("peer_faults_total{{fault=\"{fault}\"}}"))
    }

    /// Nothing is told of a count, so it is looked at again and again.
    pub(super) async fn until_counted(&self, what: &str, has: impl Fn(&Self) -> bool) {
        soon(what, async {
            while !has(self) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    }
}
