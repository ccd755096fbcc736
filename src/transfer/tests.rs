//! Real endpoints on loopback. Peers that misbehave are written here, on the same TLS.

mod certificates;
mod content;
mod door;
mod faults;
mod following;
mod lists;
mod pieces;
mod pieces_faults;
mod rates;
mod rogue;
mod stopping;
mod uploads;
mod versions;

use std::collections::{HashMap, HashSet};
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use quinn::{Connection, Endpoint, VarInt};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use self::rogue::{Rogue, promise};
use super::peers::Standing;
use super::tuning::Limits;
use super::{Bounds, Config, Surroundings, Transfer, tls, tuning};
use crate::decide::disk::Disks;
use crate::decide::rules::Rules;
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{Credential, NodeName, Peer, PeerId};
use crate::oci::{Chain, Cut, Digest, Verified};
use crate::ports::{
    Admission, Admitted, BlobInfo, BlobReader, BlobSink, BlobWriter, ContentStore, FetchError, Fetcher, ImageRecord,
    LEEWAY, NoPartials, Partials, PieceFetcher, Pin, Refusal, Remembered, Snapshots, Staged, StoreError,
};
use crate::wire::{self, Answer, Hello, Request, Versions, Welcome};

/// Waits that are expected to run out in a test; the others keep [`Limits::DEFAULT`], so that a slow machine fails
/// nothing.
const BRIEF: Duration = Duration::from_millis(400);

/// Far more than any test needs, far less than an endless wait.
async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), test).await.expect("the test is stuck")
}

/// A store that only reads, and can lie or fail.
#[derive(Default)]
struct Shelf {
    blobs: HashMap<Digest, Bytes>,
    /// Reads at or after this offset fail.
    fails_at: Option<u64>,
    /// Reads wait until this is true.
    open: Option<watch::Receiver<bool>>,
    /// Nothing can be looked up or opened.
    broken: bool,
    /// Counts the bytes that were read.
    reads: Arc<AtomicUsize>,
}

impl Shelf {
    fn with(blob: &Bytes) -> Self {
        Self { blobs: HashMap::from([(Digest::of(blob), blob.clone())]), ..Self::default() }
    }

    fn works(&self) -> Result<(), StoreError> {
        if self.broken { Err(StoreError::Other("the disk is gone".into())) } else { Ok(()) }
    }
}

struct Reading {
    blob: Bytes,
    digest: Digest,
    fails_at: Option<u64>,
    open: Option<watch::Receiver<bool>>,
    reads: Arc<AtomicUsize>,
}

#[async_trait]
impl BlobReader for Reading {
    fn size(&self) -> u64 {
        self.blob.len() as u64
    }

    async fn read_at(&mut self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        if let Some(open) = &mut self.open {
            open.wait_for(|open| *open).await.map_err(|_| StoreError::Absent(self.digest))?;
        }
        if self.fails_at.is_some_and(|at| offset >= at) {
            return Err(StoreError::Other("the disk is on fire".into()));
        }
        let from = usize::try_from(offset).unwrap().min(self.blob.len());
        let bytes = self.blob.slice(from..self.blob.len().min(from + most));
        self.reads.fetch_add(bytes.len(), Ordering::Relaxed);
        Ok(bytes)
    }
}

fn unused<T>() -> Result<T, StoreError> {
    Err(StoreError::Other("serving does not need this".into()))
}

#[async_trait]
impl ContentStore for Shelf {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        self.works()?;
        Ok(self.blobs.get(&digest).map(|blob| BlobInfo {
            digest,
            size: blob.len() as u64,
            sources: Vec::new(),
            has_children: false,
        }))
    }
    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        self.works()?;
        let blob = self.blobs.get(&digest).ok_or(StoreError::Absent(digest))?.clone();
        let (open, reads) = (self.open.clone(), self.reads.clone());
        Ok(Box::new(Reading { blob, digest, fails_at: self.fails_at, open, reads }))
    }
    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        unused()
    }
    async fn create(&self, _: Digest, _: u64, _: &Pin) -> Result<Box<dyn BlobWriter>, StoreError> {
        unused()
    }
    async fn stage(&self, _: Digest, _: u64, _: &Pin) -> Result<Arc<dyn Staged>, StoreError> {
        unused()
    }
    async fn remember(&self, _: Digest, _: &Remembered) -> Result<(), StoreError> {
        unused()
    }
    async fn discard(&self, _: Digest, _: &Pin) -> Result<(), StoreError> {
        unused()
    }
    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        unused()
    }
    async fn put_image(&self, _: &ImageRecord) -> Result<(), StoreError> {
        unused()
    }
    async fn remove_image(&self, _: &str, _: Digest) -> Result<(), StoreError> {
        unused()
    }
    async fn snapshots(&self, _: Digest) -> Result<Snapshots, StoreError> {
        unused()
    }
    async fn pin(&self, _: Duration) -> Result<Pin, StoreError> {
        unused()
    }
    async fn renew(&self, _: &Pin, _: Duration) -> Result<(), StoreError> {
        unused()
    }
    async fn release(&self, _: Pin) -> Result<(), StoreError> {
        unused()
    }
    fn changes(&self) -> watch::Receiver<u64> {
        watch::channel(0).1
    }
    async fn disks(&self) -> Result<Disks, StoreError> {
        unused()
    }
}

/// Admits everybody, or those on a list.
#[derive(Clone)]
struct Guests {
    list: Option<HashSet<PeerId>>,
    /// For so long from now on.
    life: Arc<Mutex<Duration>>,
    /// The pods that keys belong to.
    pods: HashMap<PeerId, String>,
    /// What is said of a peer whose verdict is over.
    again: Arc<Mutex<Result<(), Refusal>>>,
    renewals: watch::Sender<u64>,
}

impl Default for Guests {
    fn default() -> Self {
        let life = Arc::new(Mutex::new(Duration::from_secs(3600)));
        Self {
            list: None,
            life,
            pods: HashMap::new(),
            again: Arc::new(Mutex::new(Ok(()))),
            renewals: watch::Sender::default(),
        }
    }
}

impl Guests {
    fn only(peers: impl IntoIterator<Item = PeerId>) -> Self {
        Self { list: Some(peers.into_iter().collect()), ..Self::default() }
    }

    fn verdict(&self, peer: PeerId) -> Admitted {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
        Admitted {
            node: None,
            pod: self.pods.get(&peer).cloned(),
            until: now + *self.life.lock().unwrap(),
            on_grace: false,
        }
    }
}

#[async_trait]
impl Admission for Guests {
    async fn credential(&self) -> Result<Credential, Refusal> {
        Ok(Credential::default())
    }
    fn renewed(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }
    async fn admit(&self, peer: PeerId, _: &Credential) -> Result<Admitted, Refusal> {
        let admitted = self.list.as_ref().is_none_or(|list| list.contains(&peer));
        if admitted { Ok(self.verdict(peer)) } else { Err(Refusal::Denied("not on the list".into())) }
    }
    fn vouch(&self, peer: PeerId, _: &Credential) -> Result<Admitted, Refusal> {
        self.again.lock().unwrap().clone().map(|()| self.verdict(peer))
    }
}

/// A running agent's transfer.
struct Node {
    transfer: Transfer,
    id: PeerId,
    metrics: Metrics,
    joined: mpsc::Receiver<Peer>,
    stop: CancellationToken,
    run: JoinHandle<()>,
}

impl Node {
    fn start(shelf: Shelf) -> Self {
        Self::start_with(&Identity::generate(), shelf, Guests::default(), Limits::DEFAULT)
    }

    fn start_with(identity: &Identity, shelf: Shelf, admission: impl Admission + 'static, limits: Limits) -> Self {
        Self::start_at("127.0.0.1:0", identity, shelf, admission, limits)
    }

    fn start_at(
        listen: &str,
        identity: &Identity,
        shelf: Shelf,
        admission: impl Admission + 'static,
        limits: Limits,
    ) -> Self {
        Self::start_within(
            listen,
            identity,
            shelf,
            admission,
            Bounds { limits, rules: None, versions: Versions::TRANSFER },
        )
    }

    fn start_within(
        listen: &str,
        identity: &Identity,
        shelf: Shelf,
        admission: impl Admission + 'static,
        bounds: Bounds,
    ) -> Self {
        Self::start_among(listen, identity, shelf, admission, Arc::new(NoPartials), bounds)
    }

    /// With blobs that are being fetched.
    fn start_sharing(shelf: Shelf, partials: impl Partials) -> Self {
        let bounds = Bounds { limits: Limits::DEFAULT, rules: None, versions: Versions::TRANSFER };
        let partials = Arc::new(partials);
        Self::start_among("127.0.0.1:0", &Identity::generate(), shelf, Guests::default(), partials, bounds)
    }

    fn start_among(
        listen: &str,
        identity: &Identity,
        shelf: Shelf,
        admission: impl Admission + 'static,
        partials: Arc<dyn Partials>,
        bounds: Bounds,
    ) -> Self {
        Self::start_named("node-a", listen, identity, shelf, admission, partials, bounds)
    }

    fn start_named(
        node: &str,
        listen: &str,
        identity: &Identity,
        shelf: Shelf,
        admission: impl Admission + 'static,
        partials: Arc<dyn Partials>,
        bounds: Bounds,
    ) -> Self {
        let (listen, node) = (listen.parse().unwrap(), node.parse().unwrap());
        let config = Config { listen, gossip_port: 4001, node, max_serving: 4 };
        let (sender, joined) = mpsc::channel(16);
        let metrics = Metrics::new();
        let surroundings = Surroundings {
            admission: Arc::new(admission),
            store: Arc::new(shelf),
            partials,
            metrics: metrics.clone(),
            joined: sender,
        };
        let bound = Transfer::bind_with(config, identity, surroundings, bounds);
        let (transfer, stop) = (bound.unwrap(), CancellationToken::new());
        let run = tokio::spawn(transfer.clone().run(stop.clone()));
        Self { transfer, id: identity.peer_id(), metrics, joined, stop, run }
    }

    fn address(&self) -> SocketAddr {
        self.transfer.local_addr()
    }

    async fn meet(&self, other: SocketAddr) -> Peer {
        self.transfer.greet(other, None).await.unwrap()
    }

    /// Fetches into memory; what arrived of a failed fetch is not looked at.
    /// A peer's list, whose states were all heard before.
    async fn list(&self, peer: PeerId, digest: Digest, cut: Cut) -> Result<Chain, FetchError> {
        let mut heard = Vec::new();
        let list = self.transfer.chain(peer, digest, cut, &mut |states| heard.extend_from_slice(states)).await?;
        assert_eq!(heard, list.states());
        Ok(list)
    }

    async fn fetch(&self, peer: PeerId, digest: Digest, size: u64) -> Result<(Verified, Vec<u8>), FetchError> {
        let mut basket = Basket::default();
        let verified = self.transfer.fetch(peer, digest, size, &mut basket).await?;
        Ok((verified, basket.0))
    }

    fn metric(&self, line: &str) -> bool {
        String::from_utf8(self.metrics.render()).unwrap().lines().any(|have| have == format!("lighterman_{line}"))
    }
}

#[derive(Default)]
struct Basket(Vec<u8>);

#[async_trait]
impl BlobSink for Basket {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.0.extend_from_slice(chunk));
        Ok(())
    }
}

/// Rules that set nothing but these rates, in bytes per second.
pub(super) fn rules(max_download_rate: u64, max_upload_rate: u64) -> Arc<Rules> {
    let mut rules = Rules::default();
    rules.budgets.max_download_rate = max_download_rate;
    rules.budgets.max_upload_rate = max_upload_rate;
    Arc::new(rules)
}

/// Bytes that repeat nowhere near a batch's or a packet's length.
fn blob(size: usize) -> Bytes {
    (0..size).map(|i| (i.wrapping_mul(2_654_435_761) >> 7) as u8).collect()
}

/// An endpoint with an agent's certificate and none of its manners.
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
        seen: std::net::Ipv4Addr::LOCALHOST.into(),
    }
}

/// Of a peer that was not met.
fn standing() -> Standing {
    Standing { credential: Credential::default(), until: Duration::MAX, pod: None }
}
