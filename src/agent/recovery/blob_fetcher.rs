//! Fetches documents whole, and stages all other blobs in the store.
//!
//! The providers of a document are tried one after the other until a provider sends the right
//! bytes. Configs and layers come in pieces ([`crate::agent::recovery::swarm`]) and are only staged
//! here. A blob that is here already is pinned.

mod local_blob;

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

pub(in crate::agent) use self::local_blob::LocalBlob;
use crate::agent::peers::inventory_view::{BlobProvider, PeerInventory};
use crate::agent::recovery::downloads::Downloads;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::peer_faults::{PeerFault, PeerFaults};
use crate::decide::plan::order_providers;
use crate::metrics::Metrics;
use crate::model::{PeerId, Zone};
use crate::oci::{BlobProof, Descriptor, Digest, Document, DocumentError, MAX_DOCUMENT_BYTES, Reference};
use crate::ports::{BlobMetadata, BlobSink, Blobs, Child, ChildKind, FetchError, Fetcher, Pin, StagedBlob, StoreError};
use crate::util::clock::{now, sleep_until};

/// Most rounds over the providers of one document. Only busy peers and new peers get another round.
/// With the waits between rounds this is half a minute; then the recovery's own back-off takes
/// over.
const MAX_ROUNDS: u32 = 20;

/// Longest wait before the next try to open a blob that another writer of this node has open.
const BUSY_RETRY_DELAY: Duration = Duration::from_millis(1500);

/// Tries to open a blob that another writer has open: an hour. Two images of this node share the
/// layer, and the other recovery may have a slow link. The blob is free when that recovery ends,
/// with whichever result.
const MAX_BUSY_RETRIES: u32 = 2400;

/// Fetches single blobs into the store of this node.
pub struct BlobFetcher {
    own_peer: PeerId,
    store: Arc<dyn Blobs>,
    pub(in crate::agent) fetcher: Arc<dyn Fetcher>,
    pub(in crate::agent) inventory: PeerInventory,
    /// Downloads in flight, whose pieces peers may request.
    pub(in crate::agent) downloads: Downloads,
    zone: watch::Receiver<Option<Zone>>,
    pub(in crate::agent) metrics: Metrics,
    /// Recent faults of peers.
    peer_faults: Mutex<PeerFaults>,
}

/// A blob of an image, in the store of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedBlob {
    /// Digest, size and media type.
    pub descriptor: Descriptor,
    /// Bytes by sending peer; `None` when the blob was here before.
    pub from: Option<BTreeMap<PeerId, u64>>,
}

/// A config or a layer, ready for its pieces.
pub(in crate::agent) enum PreparedBlob {
    /// The whole blob is here and pinned.
    Present(FetchedBlob),
    /// The pieces are written here.
    Staged(Arc<dyn StagedBlob>),
}

impl BlobFetcher {
    /// Fetches into `store` from the providers in `inventory`. `me` spreads the requests of several
    /// agents over the providers. `downloads` lists the blobs in flight, and `zone` is this node's
    /// zone.
    pub fn new(
        own_peer: PeerId,
        store: Arc<dyn Blobs>,
        fetcher: Arc<dyn Fetcher>,
        inventory: PeerInventory,
        downloads: Downloads,
        zone: watch::Receiver<Option<Zone>>,
        metrics: Metrics,
    ) -> Self {
        Self { own_peer, store, fetcher, inventory, downloads, zone, metrics, peer_faults: Mutex::default() }
    }

    /// Stages a config or a layer, unless the blob is here. A small blob with wrong bytes is
    /// fetched whole and replaced.
    pub(in crate::agent) async fn prepare(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        pin: &Pin,
    ) -> Result<PreparedBlob, RecoverError> {
        let metadata = BlobMetadata { source: Some(reference.repository().clone()), children: Vec::new() };
        let present = |from| Ok(PreparedBlob::Present(FetchedBlob { descriptor: blob.clone(), from }));
        if self.is_damaged(blob).await? {
            let (bytes, proof, peer) = self.fetch_document(blob.digest, &[]).await?;
            self.write_whole(bytes, proof, pin, &metadata).await?;
            return present(Some([(peer, blob.size)].into()));
        }
        let stage = || self.store.stage(blob.digest, blob.size, pin);
        match self.retry_while_busy(blob.digest, stage).await {
            Ok(staged) => Ok(PreparedBlob::Staged(staged)),
            Err(StoreError::AlreadyExists(digest)) => {
                self.store.add_metadata(digest, &metadata).await.map_err(RecoverError::store("labeling a blob"))?;
                present(None)
            }
            Err(error) => Err(RecoverError::store("opening a blob for writing")(error)),
        }
    }

    /// Providers and partial providers of the blob, without the excluded peers.
    pub(in crate::agent) fn providers(&self, attempts: &Attempts) -> Vec<BlobProvider> {
        let mut providers = self.inventory.all_providers(attempts.digest);
        providers.retain(|provider| !attempts.excluded.contains(&provider.peer));
        providers
    }

    /// Changes whenever a recovery waits for a blob that another writer has open.
    pub(in crate::agent) fn awaited(&self) -> watch::Receiver<Option<Digest>> {
        self.downloads.awaited()
    }

    /// This node's zone; `None` until the zone is known.
    pub(in crate::agent) fn zone(&self) -> Option<Zone> {
        self.zone.borrow().clone()
    }

    /// Reads a manifest or an index from the store, or fetches the document from a provider. The
    /// document is parsed in memory before it is written.
    pub(in crate::agent) async fn document(
        &self,
        reference: &Reference,
        digest: Digest,
        providers: &[PeerId],
        pin: &Pin,
    ) -> Result<(Document, FetchedBlob), RecoverError> {
        let stored = LocalBlob::read(&*self.store, digest).await.map_err(RecoverError::store("reading a manifest"))?;
        let (bytes, proof, from) = match stored {
            LocalBlob::Whole(bytes, proof) => (bytes, proof, None),
            LocalBlob::TooLarge(size) => {
                return Err(RecoverError::Document { digest, source: DocumentError::TooLarge(size) });
            }
            // A damaged document is fetched again.
            LocalBlob::Absent | LocalBlob::Damaged => {
                let (bytes, proof, peer) = self.fetch_document(digest, providers).await?;
                (bytes, proof, Some(peer))
            }
        };
        let unusable = |source| RecoverError::Document { digest, source };
        let document = Document::parse(&bytes).map_err(unusable)?;
        document.check_runnable().map_err(unusable)?;
        let children = document.children().enumerate();
        let metadata = BlobMetadata {
            source: Some(reference.repository().clone()),
            children: children
                .map(|(position, child)| Child { digest: child.digest, kind: ChildKind::of(&document, position) })
                .collect(),
        };
        let descriptor = Descriptor {
            media_type: document.media_type().to_owned(),
            digest,
            size: proof.size(),
            platform: None,
            attestation: false,
        };
        self.write_whole(bytes, proof, pin, &metadata).await?;
        let from = from.map(|peer| [(peer, descriptor.size)].into());
        Ok((document, FetchedBlob { descriptor, from }))
    }

    async fn fetch_document(
        &self,
        digest: Digest,
        providers: &[PeerId],
    ) -> Result<(Bytes, BlobProof, PeerId), RecoverError> {
        let mut attempts = Attempts::new(digest);
        for _ in 0..MAX_ROUNDS {
            // A child manifest may be on other peers than the image's providers.
            let mut candidates = providers.to_vec();
            candidates
                .extend(self.inventory.blob_providers(digest).into_iter().filter(|peer| !providers.contains(peer)));
            for peer in self.rank_providers(&attempts, candidates) {
                match self.fetch_document_from(peer, digest).await {
                    Ok((bytes, proof)) => {
                        self.peer_faults().record_success(peer);
                        return Ok((bytes, proof, peer));
                    }
                    Err(error) => drop(self.record_failure(&mut attempts, peer, error)?),
                }
            }
            if !self.wait_for_another_round(&attempts, self.inventory.blob_providers(digest)).await {
                break;
            }
        }
        Err(attempts.into_error())
    }

    /// Reads a small blob once, from the store or from a provider. Nothing is written.
    pub(in crate::agent) async fn peek(&self, digest: Digest, providers: &[PeerId]) -> Result<Bytes, RecoverError> {
        match LocalBlob::read(&*self.store, digest).await.map_err(RecoverError::store("reading a manifest"))? {
            LocalBlob::Whole(bytes, _) => Ok(bytes),
            LocalBlob::TooLarge(size) => Err(RecoverError::Document { digest, source: DocumentError::TooLarge(size) }),
            LocalBlob::Absent | LocalBlob::Damaged => {
                self.fetch_document(digest, providers).await.map(|(bytes, _, _)| bytes)
            }
        }
    }

    async fn fetch_document_from(&self, peer: PeerId, digest: Digest) -> Result<(Bytes, BlobProof), FetchError> {
        let size = self.fetcher.size_of(peer, digest).await?.ok_or(FetchError::Absent { peer, digest })?;
        if size > MAX_DOCUMENT_BYTES {
            // The size is an unverified claim of this peer, so the other providers stay.
            let reason =
                format!("reports {size} bytes for the manifest {digest}, over the limit of {MAX_DOCUMENT_BYTES}");
            return Err(FetchError::Protocol { peer, reason });
        }
        let mut sink = MemorySink::default();
        let proof = self.fetcher.fetch(peer, digest, size, &mut sink).await?;
        Ok((sink.0.into(), proof))
    }

    /// Writes or stages a blob when no other writer has the blob.
    async fn retry_while_busy<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        digest: Digest,
        attempt: impl Fn() -> F,
    ) -> Result<T, StoreError> {
        let mut retries = 0;
        let mut ended = self.downloads.ended();
        loop {
            ended.mark_unchanged();
            match attempt().await {
                // Another recovery of this node writes the same blob, and this recovery uses the
                // result.
                Err(StoreError::Busy(_)) if retries < MAX_BUSY_RETRIES => {
                    retries += 1;
                    self.downloads.mark_awaited(digest);
                    let _ = tokio::time::timeout(BUSY_RETRY_DELAY, ended.changed()).await;
                }
                settled => return settled,
            }
        }
    }

    /// The providers to ask now, the best first. Busy peers are left out until their back-off ends.
    fn rank_providers(&self, attempts: &Attempts, mut providers: Vec<PeerId>) -> Vec<PeerId> {
        let (faults, now) = (self.peer_faults(), now());
        providers.retain(|peer| !attempts.excluded.contains(peer) && faults.busy_until(*peer, now).is_none());
        order_providers(self.own_peer, attempts.digest, providers, |peer| faults.standing(peer, now))
    }

    /// Waits until a remaining provider is not busy. False when no provider remains.
    async fn wait_for_another_round(&self, attempts: &Attempts, providers: Vec<PeerId>) -> bool {
        let remaining = providers.into_iter().filter(|peer| !attempts.excluded.contains(peer));
        let retry_at = {
            let (faults, now) = (self.peer_faults(), now());
            // A provider that is not busy has announced the blob just now.
            remaining.map(|peer| faults.busy_until(peer, now).unwrap_or(now)).min()
        };
        let Some(retry_at) = retry_at else { return false };
        sleep_until(Some(retry_at)).await;
        true
    }

    /// Records a failed attempt. Returns until when the fault counts against the peer. An error of
    /// this node's own store ends the recovery, because no other peer can help.
    pub(in crate::agent) fn record_failure(
        &self,
        attempts: &mut Attempts,
        peer: PeerId,
        error: FetchError,
    ) -> Result<Option<Instant>, RecoverError> {
        let digest = attempts.digest;
        if let FetchError::Sink(source) = error {
            return Err(RecoverError::Store { doing: "writing a blob", source });
        }
        tracing::warn!(%peer, node = %self.inventory.node_of(peer), %digest, %error, "a provider failed");
        let until = fault_of(&error).map(|fault| {
            self.metrics.peer_at_fault(fault.label());
            self.peer_faults().record_fault(peer, fault, now(), rand::random())
        });
        attempts.record(peer, error);
        Ok(until)
    }

    pub(in crate::agent) fn peer_faults(&self) -> MutexGuard<'_, PeerFaults> {
        self.peer_faults.lock()
    }
}

/// The peer's fault behind an error. `None` when the peer lacks the blob, or when the manifest may
/// have the wrong size.
fn fault_of(error: &FetchError) -> Option<PeerFault> {
    match error {
        error if error.is_peer_fault() => Some(PeerFault::Lied),
        FetchError::Busy { .. } => Some(PeerFault::Busy),
        FetchError::Unreachable { .. } | FetchError::NotAdmitted { .. } => Some(PeerFault::Unreachable),
        FetchError::Stalled { .. } => Some(PeerFault::Stalled),
        FetchError::StoreFailed { .. } => Some(PeerFault::StoreFailed),
        _ => None,
    }
}

/// The failed attempts for one blob.
pub(in crate::agent) struct Attempts {
    digest: Digest,
    /// Peers that get no more requests for this blob.
    excluded: HashSet<PeerId>,
    errors: Vec<FetchError>,
}

/// Most errors kept for the report; the oldest is dropped first.
const MAX_ERRORS: usize = 16;

impl Attempts {
    pub(in crate::agent) fn new(digest: Digest) -> Self {
        Self { digest, excluded: HashSet::new(), errors: Vec::new() }
    }

    pub(in crate::agent) fn record(&mut self, peer: PeerId, error: FetchError) {
        if !error.is_retryable() {
            self.excluded.insert(peer);
        }
        if self.errors.len() == MAX_ERRORS {
            self.errors.remove(0);
        }
        self.errors.push(error);
    }

    pub(in crate::agent) fn into_error(self) -> RecoverError {
        RecoverError::Fetch { digest: self.digest, attempts: self.errors }
    }
}

/// Collects a small blob in memory. The `size` argument of the fetch is the bound.
#[derive(Default)]
struct MemorySink(Vec<u8>);

#[async_trait]
impl BlobSink for MemorySink {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.0.extend_from_slice(chunk));
        Ok(())
    }
}
