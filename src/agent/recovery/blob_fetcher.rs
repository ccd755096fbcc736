//! Single blobs: held if they are here; a document is fetched from one provider after the other until one sends the right bytes. What is large comes in
//! pieces ([`crate::agent::recovery::swarm`]), for which the place is made here.

mod local_blob;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

pub(in crate::agent) use self::local_blob::LocalBlob;
use crate::agent::peers::inventory_view::{BlobProvider, PeerInventory};
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::downloads::Downloads;
use crate::decide::peer_faults::{PeerFault, PeerFaults};
use crate::decide::plan::order_providers;
use crate::metrics::Metrics;
use crate::model::{PeerId, Zone};
use crate::oci::{BlobProof, Descriptor, Digest, Document, DocumentError, MAX_DOCUMENT_BYTES, Reference};
use crate::ports::{ChildKind, BlobMetadata, BlobSink, Child, ContentStore, FetchError, Fetcher, Pin, StagedBlob, StoreError};

/// Times that the providers of one blob are gone through. Only peers that are busy, or new ones, are worth another
/// round; with the waits between them this is half a minute, then the recovery's own back-off takes over.
const MAX_ROUNDS: u32 = 20;

/// Wait for a store that is busy with the same blob.
const BUSY_RETRY_DELAY: Duration = Duration::from_millis(1500);

/// Waits for a store that is busy with the same blob: an hour. Two images of this node share a layer, and the
/// recovery that writes it may be on a slow link; when that one ends, in whichever way, the store is free.
const MAX_BUSY_RETRIES: u32 = 2400;

/// Gets single blobs.
pub struct BlobFetcher {
    /// This agent.
    me: PeerId,
    /// Where blobs go.
    store: Arc<dyn ContentStore>,
    /// Where they come from.
    pub(in crate::agent) fetcher: Arc<dyn Fetcher>,
    /// Who holds which.
    pub(in crate::agent) inventory: PeerInventory,
    /// Blobs that are being fetched, for peers.
    pub(in crate::agent) downloads: Downloads,
    /// The zone that this node is in.
    zone: watch::Receiver<Option<Zone>>,
    /// Counts peers' faults.
    pub(in crate::agent) metrics: Metrics,
    /// What peers did wrong lately.
    trust: Mutex<PeerFaults>,
}

/// A blob that is here now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchedBlob {
    /// Which one.
    pub descriptor: Descriptor,
    /// Who sent how many bytes of it; `None` when it was here.
    pub from: Option<BTreeMap<PeerId, u64>>,
}

/// What was found when a blob was about to be fetched.
pub(in crate::agent) enum PreparedBlob {
    /// It is here.
    Present(FetchedBlob),
    /// It goes there.
    Staged(Arc<dyn StagedBlob>),
}

impl BlobFetcher {
    /// Fetches from those whom `holders` knows into `store`, in the name of `me`, which is in this zone. What is on its way is in `underway`.
    pub fn new(
        me: PeerId,
        store: Arc<dyn ContentStore>,
        fetcher: Arc<dyn Fetcher>,
        inventory: PeerInventory,
        downloads: Downloads,
        zone: watch::Receiver<Option<Zone>>,
        metrics: Metrics,
    ) -> Self {
        Self { me, store, fetcher, inventory, downloads, zone, metrics, trust: Mutex::default() }
    }

    /// Makes room in the store for a config or a layer, unless it is here. A small one that is here with wrong bytes is replaced.
    pub(in crate::agent) async fn prepare(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        pin: &Pin,
    ) -> Result<PreparedBlob, RecoverError> {
        let remembered = BlobMetadata { source: Some(reference.repository().clone()), children: Vec::new() };
        let here = |from| Ok(PreparedBlob::Present(FetchedBlob { descriptor: blob.clone(), from }));
        if self.is_damaged(blob).await? {
            let (bytes, proof, peer) = self.fetch_document(blob.digest, &[]).await?;
            self.write_whole(bytes, proof, pin, &remembered).await?;
            return here(Some([(peer, blob.size)].into()));
        }
        let stage = || self.store.stage(blob.digest, blob.size, pin);
        match self.open_for_writing(blob.digest, &remembered, stage).await? {
            Some(staged) => Ok(PreparedBlob::Staged(staged)),
            None => here(None),
        }
    }

    /// Who has a blob or is fetching it, but those that were given up.
    pub(in crate::agent) fn providers(&self, attempts: &Attempts) -> Vec<BlobProvider> {
        let mut sources = self.inventory.all_providers(attempts.digest);
        sources.retain(|source| !attempts.excluded.contains(&source.peer));
        sources
    }

    /// Moves whenever a recovery waits for a blob that is being written already.
    pub(in crate::agent) fn awaited(&self) -> watch::Receiver<Option<Digest>> {
        self.downloads.awaited()
    }

    /// This node's zone, once it is known.
    pub(in crate::agent) fn zone(&self) -> Option<Zone> {
        self.zone.borrow().clone()
    }

    /// A manifest or an index: small, wholly in memory, and parsed before it is kept.
    pub(in crate::agent) async fn document(
        &self,
        reference: &Reference,
        digest: Digest,
        providers: &[PeerId],
        pin: &Pin,
    ) -> Result<(Document, FetchedBlob), RecoverError> {
        let held = LocalBlob::read(&*self.store, digest).await.map_err(RecoverError::store("reading a manifest"))?;
        let (bytes, proof, from) = match held {
            LocalBlob::Whole(bytes, proof) => (bytes, proof, None),
            LocalBlob::TooLarge(size) => {
                return Err(RecoverError::Document { digest, source: DocumentError::TooLarge(size) });
            }
            // What is broken here is fetched, not trusted.
            LocalBlob::Absent | LocalBlob::Damaged => {
                let (bytes, proof, peer) = self.fetch_document(digest, providers).await?;
                (bytes, proof, Some(peer))
            }
        };
        let unusable = |source| RecoverError::Document { digest, source };
        let document = Document::parse(&bytes).map_err(unusable)?;
        document.check_runnable().map_err(unusable)?;
        let children = document.children().enumerate();
        let remembered = BlobMetadata {
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
        self.write_whole(bytes, proof, pin, &remembered).await?;
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
            // The image's own providers first; a child manifest may be on others as well.
            let mut candidates = providers.to_vec();
            candidates
                .extend(self.inventory.blob_providers(digest).into_iter().filter(|peer| !providers.contains(peer)));
            for peer in self.rank_providers(&attempts, candidates) {
                match self.fetch_document_from(peer, digest).await {
                    Ok((bytes, proof)) => {
                        self.trust().record_success(peer);
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

    /// A small blob, from this store or a provider, for looking at it once. Nothing is kept.
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
            // Only this peer's word for it: another may tell the truth.
            let reason =
                format!("says that the manifest {digest} has {size} bytes, over the limit of {MAX_DOCUMENT_BYTES}");
            return Err(FetchError::Protocol { peer, reason });
        }
        let mut sink = MemorySink::default();
        let proof = self.fetcher.fetch(peer, digest, size, &mut sink).await?;
        Ok((sink.0.into(), proof))
    }

    /// What is written through, for a blob that is not here; what is here is held by the pin and its memory refreshed instead.
    async fn open_for_writing<T, F: Future<Output = Result<T, StoreError>>>(
        &self,
        digest: Digest,
        remembered: &BlobMetadata,
        open: impl Fn() -> F,
    ) -> Result<Option<T>, RecoverError> {
        let mut waits = 0;
        let mut ended = self.downloads.ended();
        loop {
            ended.mark_unchanged();
            match open().await {
                Ok(opened) => return Ok(Some(opened)),
                Err(StoreError::AlreadyExists(_)) => {
                    self.store
                        .add_metadata(digest, remembered)
                        .await
                        .map_err(RecoverError::store("labelling a blob"))?;
                    return Ok(None);
                }
                // Another recovery of this node fetches the same blob: whoever is first, we profit.
                Err(StoreError::Busy(_)) if waits < MAX_BUSY_RETRIES => {
                    waits += 1;
                    self.downloads.mark_awaited(digest);
                    let _ = tokio::time::timeout(BUSY_RETRY_DELAY, ended.changed()).await;
                }
                Err(error) => return Err(RecoverError::store("opening a blob for writing")(error)),
            }
        }
    }

    /// Whom to ask now, the best first. Who is busy is left out until it may be better.
    fn rank_providers(&self, attempts: &Attempts, mut providers: Vec<PeerId>) -> Vec<PeerId> {
        let (trust, now) = (self.trust(), now());
        providers.retain(|peer| !attempts.excluded.contains(peer) && trust.busy_until(*peer, now).is_none());
        order_providers(self.me, attempts.digest, providers, |peer| trust.standing(peer, now))
    }

    /// Waits until somebody who is left may do better; false when nobody is left.
    async fn wait_for_another_round(&self, attempts: &Attempts, providers: Vec<PeerId>) -> bool {
        let remaining = providers.into_iter().filter(|peer| !attempts.excluded.contains(peer));
        let soonest = {
            let (trust, now) = (self.trust(), now());
            // One that is not busy has come just now.
            remaining.map(|peer| trust.busy_until(peer, now).unwrap_or(now)).min()
        };
        let Some(soonest) = soonest else { return false };
        tokio::time::sleep_until(soonest.into()).await;
        true
    }

    /// Counts a failed attempt. Answers until when it is held against the peer. Fails when no peer can help: our own store is what broke.
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
            self.trust().record_fault(peer, fault, now(), rand::random())
        });
        attempts.record(peer, error);
        Ok(until)
    }

    pub(in crate::agent) fn trust(&self) -> MutexGuard<'_, PeerFaults> {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a failure says about the peer; nothing where it does not have the blob, or where the size may be the manifest's mistake.
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

/// The clock that tests pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// What was tried for one blob.
pub(in crate::agent) struct Attempts {
    digest: Digest,
    /// Not asked again for this blob.
    excluded: HashSet<PeerId>,
    errors: Vec<FetchError>,
}

/// Errors kept for the report; more would not be read.
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

/// Keeps a small blob in memory. What may come is bounded by the size that the fetch is called with.
#[derive(Default)]
struct MemorySink(Vec<u8>);

#[async_trait]
impl BlobSink for MemorySink {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.0.extend_from_slice(chunk));
        Ok(())
    }
}
