//! Real endpoints on loopback. Peers that misbehave are written here, on the same TLS.

mod acceptor;
mod certificates;
mod content;
mod dial;
mod faults;
mod hash_chain;
mod peers;
mod piece_faults;
mod piece_map;
mod pieces;
mod rates;
mod rogue;
mod stopping;
mod store;
mod upload_queue;
mod versions;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::Mutex;
use quinn::{Connection, ConnectionError, Endpoint, VarInt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::rogue::{Rogue, answer_blob};
use self::store::TestStore;
use super::binding::TransferOptions;
use super::peers::PeerAdmission;
use super::tuning::Timeouts;
use super::{Config, Transfer, TransferDependencies, tls, tuning};
use crate::decide::policy::Policy;
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{Credential, NodeName, Peer, PeerId};
use crate::oci::{BlobProof, Digest, HashChain, PieceLayout};
use crate::ports::{
    Admission, AdmittedPeer, BlobSink, Blobs, Dialer, FetchError, Fetcher, LEEWAY, NoPartialBlobs, PartialBlobs,
    Rejection, StoreError,
};
use crate::wire::{self, Answer, Hello, Request, Versions, Welcome};

/// For timeouts that run out in a test. Other timeouts keep [`Timeouts::DEFAULT`], so that a slow
/// machine fails no test.
const BRIEF: Duration = Duration::from_millis(400);

/// Far more than any test needs, far less than an endless wait.
async fn with_deadline<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test ends before its deadline")
}

/// Admits every peer, or the peers on a list.
#[derive(Clone)]
struct TestAdmission {
    allowed: Option<HashSet<PeerId>>,
    /// Validity of a verdict from now on.
    lifetime: Arc<Mutex<Duration>>,
    /// The pods of the keys.
    pods: HashMap<PeerId, String>,
    /// The result of [`Admission::admit_relayed`].
    recheck: Arc<Mutex<Result<(), Rejection>>>,
    renewals: watch::Sender<u64>,
}

impl Default for TestAdmission {
    fn default() -> Self {
        let lifetime = Arc::new(Mutex::new(Duration::from_secs(3600)));
        Self {
            allowed: None,
            lifetime,
            pods: HashMap::new(),
            recheck: Arc::new(Mutex::new(Ok(()))),
            renewals: watch::Sender::default(),
        }
    }
}

impl TestAdmission {
    fn only(peers: impl IntoIterator<Item = PeerId>) -> Self {
        Self { allowed: Some(peers.into_iter().collect()), ..Self::default() }
    }

    fn verdict(&self, peer: PeerId) -> AdmittedPeer {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        AdmittedPeer {
            node: None,
            pod: self.pods.get(&peer).cloned(),
            valid_until: now + *self.lifetime.lock(),
            is_in_grace: false,
        }
    }
}

#[async_trait]
impl Admission for TestAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        Ok(Credential::default())
    }
    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }
    async fn admit(&self, peer: PeerId, _: &Credential) -> Result<AdmittedPeer, Rejection> {
        let admitted = self.allowed.as_ref().is_none_or(|peers| peers.contains(&peer));
        if admitted { Ok(self.verdict(peer)) } else { Err(Rejection::Denied("not on the list".into())) }
    }
    fn admit_relayed(&self, peer: PeerId, _: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.recheck.lock().clone().map(|()| self.verdict(peer))
    }
}

/// The running transfer of a node.
struct TransferTestNode {
    transfer: Transfer,
    id: PeerId,
    metrics: Metrics,
    admitted_peers: mpsc::Receiver<Peer>,
    stop: CancellationToken,
    run: JoinHandle<()>,
}

impl TransferTestNode {
    fn start(store: TestStore) -> Self {
        Self::start_with(&Identity::generate(), store, TestAdmission::default(), Timeouts::DEFAULT)
    }

    fn start_with(
        identity: &Identity,
        store: TestStore,
        admission: impl Admission + 'static,
        timeouts: Timeouts,
    ) -> Self {
        Self::start_at("127.0.0.1:0", identity, store, admission, timeouts)
    }

    fn start_at(
        listen: &str,
        identity: &Identity,
        store: TestStore,
        admission: impl Admission + 'static,
        timeouts: Timeouts,
    ) -> Self {
        Self::start_with_options(
            listen,
            identity,
            store,
            admission,
            TransferOptions { timeouts, policy: None, versions: Versions::TRANSFER },
        )
    }

    fn start_with_options(
        listen: &str,
        identity: &Identity,
        store: TestStore,
        admission: impl Admission + 'static,
        options: TransferOptions,
    ) -> Self {
        Self::start_with_partials(listen, identity, store, admission, Arc::new(NoPartialBlobs), options)
    }

    /// With partial blobs.
    fn start_partial(store: TestStore, partials: impl PartialBlobs) -> Self {
        let options = TransferOptions { timeouts: Timeouts::DEFAULT, policy: None, versions: Versions::TRANSFER };
        let partials = Arc::new(partials);
        Self::start_with_partials(
            "127.0.0.1:0",
            &Identity::generate(),
            store,
            TestAdmission::default(),
            partials,
            options,
        )
    }

    fn start_with_partials(
        listen: &str,
        identity: &Identity,
        store: TestStore,
        admission: impl Admission + 'static,
        partials: Arc<dyn PartialBlobs>,
        options: TransferOptions,
    ) -> Self {
        Self::start_named("node-a", listen, identity, store, admission, partials, options)
    }

    fn start_named(
        node: &str,
        listen: &str,
        identity: &Identity,
        store: TestStore,
        admission: impl Admission + 'static,
        partials: Arc<dyn PartialBlobs>,
        options: TransferOptions,
    ) -> Self {
        let (listen, node) = (listen.parse().unwrap(), node.parse().unwrap());
        let config = Config { listen, gossip_port: 4001, node, concurrent_uploads: 4 };
        let (sender, admitted_peers) = mpsc::channel(16);
        let metrics = Metrics::new();
        let dependencies = TransferDependencies {
            admission: Arc::new(admission),
            store: Arc::new(store),
            partials,
            metrics: metrics.clone(),
            admitted_peers: sender,
        };
        let bound = Transfer::bind_with_options(config, identity, dependencies, options);
        let (transfer, stop) = (bound.unwrap(), CancellationToken::new());
        let run = tokio::spawn(transfer.clone().run(stop.clone()));
        Self { transfer, id: identity.peer_id(), metrics, admitted_peers, stop, run }
    }

    fn address(&self) -> SocketAddr {
        self.transfer.local_addr()
    }

    async fn dial(&self, other: SocketAddr) -> Peer {
        self.transfer.dial(other, None).await.unwrap()
    }

    /// Fetches a peer's hash chain, and checks that the sink gets every state.
    async fn hash_chain(&self, peer: PeerId, digest: Digest, layout: PieceLayout) -> Result<HashChain, FetchError> {
        let mut reported = Vec::new();
        let chain = self
            .transfer
            .fetch_hash_chain(peer, digest, layout, &mut |states| reported.extend_from_slice(states))
            .await?;
        assert_eq!(reported, chain.states());
        Ok(chain)
    }

    /// Fetches into memory; the bytes of a failed fetch are dropped.
    async fn fetch(&self, peer: PeerId, digest: Digest, size: u64) -> Result<(BlobProof, Vec<u8>), FetchError> {
        let mut sink = VecSink::default();
        let verified = self.transfer.fetch(peer, digest, size, &mut sink).await?;
        Ok((verified, sink.0))
    }

    fn metric(&self, line: &str) -> bool {
        String::from_utf8(self.metrics.render()).unwrap().lines().any(|have| have == format!("lighterman_{line}"))
    }
}

#[derive(Default)]
struct VecSink(Vec<u8>);

#[async_trait]
impl BlobSink for VecSink {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.0.extend_from_slice(chunk));
        Ok(())
    }
}

/// A policy that sets only these rates, in bytes per second.
pub(super) fn rates_policy(max_download_rate: u64, max_upload_rate: u64) -> Arc<Policy> {
    let mut policy = Policy::default();
    policy.budgets.max_download_rate = max_download_rate;
    policy.budgets.max_upload_rate = max_upload_rate;
    Arc::new(policy)
}

/// Bytes without repetition near the length of a batch or a packet.
fn blob(size: usize) -> Bytes {
    (0..size).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

/// An endpoint with an agent's certificate, and without an agent's protocol.
fn bare_endpoint(identity: &Identity) -> Endpoint {
    let tls = tls::Tls::new(identity, Versions::TRANSFER).unwrap();
    let mut endpoint = Endpoint::server(tuning::server(&tls), "127.0.0.1:0".parse().unwrap()).unwrap();
    endpoint.set_default_client_config(tuning::client(&tls));
    endpoint
}

fn hello() -> Hello {
    Hello {
        credential: Credential::default(),
        node: "rogue".into(),
        gossip_port: 1,
        observed_address: std::net::Ipv4Addr::LOCALHOST.into(),
    }
}

/// The admission of a peer that was never dialed.
fn unbounded_admission() -> PeerAdmission {
    PeerAdmission { credential: Credential::default(), valid_until: Duration::MAX, pod: None }
}

async fn assert_closed_with(connection: &Connection, code: VarInt, what: &str) {
    let ended = connection.closed().await;
    assert!(matches!(&ended, ConnectionError::ApplicationClosed(close) if close.error_code == code), "{what}: {ended}");
}
