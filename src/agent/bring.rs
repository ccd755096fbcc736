//! One blob: held if it is here, else fetched from one provider after the other until one sends the right bytes.

mod local;

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

pub(super) use self::local::Held;
use super::holders::Holders;
use super::progress::{Counted, Progress};
use super::recover::child_kind;
use super::recover_error::RecoverError;
use crate::decide::plan::order_providers;
use crate::decide::trust::{Fault, Trust};
use crate::metrics::Metrics;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Document, DocumentError, MAX_DOCUMENT_BYTES, Reference, Verified};
use crate::ports::{BlobSink, BlobWriter, Child, ContentStore, FetchError, Fetcher, Pin, Remembered, StoreError};

/// Times that the providers of one blob are gone through. Only peers that are busy, or new ones, are worth another
/// round; with the waits between them this is half a minute, then the recovery's own back-off takes over.
const ROUNDS: u32 = 20;

/// Wait for a store that is busy with the same blob.
const BUSY_WAIT: Duration = Duration::from_millis(1500);

/// Waits for a store that is busy with the same blob: an hour, as long as a pin holds. Two images of this node share a layer, and the
/// recovery that writes it may be on a slow link; when that one ends, in whichever way, the store is free.
const BUSY_WAITS: u32 = 2400;

/// Gets single blobs.
pub struct Bring {
    /// This agent.
    pub me: PeerId,
    /// Where blobs go.
    pub store: Arc<dyn ContentStore>,
    /// Where they come from.
    pub fetcher: Arc<dyn Fetcher>,
    /// Who holds which.
    pub holders: Holders,
    /// Counts peers' faults.
    pub metrics: Metrics,
    /// What peers did wrong lately.
    pub trust: Mutex<Trust>,
}

/// A blob that is here now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Brought {
    /// Which one.
    pub descriptor: Descriptor,
    /// Who sent it; `None` when it was here.
    pub from: Option<PeerId>,
}

impl Bring {
    /// A config or a layer, streamed into the store.
    pub(super) async fn blob(
        &self,
        reference: &Reference,
        blob: &Descriptor,
        pin: &Pin,
        progress: &Progress,
    ) -> Result<Brought, RecoverError> {
        let remembered = Remembered { source: Some(reference.repository().clone()), children: Vec::new() };
        if self.is_damaged(blob).await? {
            let (bytes, proof, peer) = self.fetch_document(blob.digest, &[]).await?;
            self.keep(bytes, proof, pin, &remembered).await?;
            return Ok(Brought { descriptor: blob.clone(), from: Some(peer) });
        }
        let mut attempts = Attempts::new(blob.digest);
        for _ in 0..ROUNDS {
            for peer in self.order(&attempts, self.holders.of_blob(blob.digest)) {
                let Some(mut writer) = self.writer(blob.digest, blob.size, pin, &remembered).await? else {
                    return Ok(Brought { descriptor: blob.clone(), from: None });
                };
                let mut sink = Counted::new(&mut *writer, progress, blob.digest, peer);
                match self.fetcher.fetch(peer, blob.digest, blob.size, &mut sink).await {
                    Ok(proof) => {
                        self.trust().served(peer);
                        writer.commit(proof, &remembered).await.map_err(RecoverError::store("committing a blob"))?;
                        return Ok(Brought { descriptor: blob.clone(), from: Some(peer) });
                    }
                    Err(error) => self.note(&mut attempts, peer, error)?,
                }
            }
            // Nobody was asked, and yet it may be here: then no provider is needed.
            if attempts.is_empty() && self.writer(blob.digest, blob.size, pin, &remembered).await?.is_none() {
                return Ok(Brought { descriptor: blob.clone(), from: None });
            }
            if !self.wait_for_another_round(&attempts, self.holders.of_blob(blob.digest)).await {
                break;
            }
        }
        Err(attempts.into_error())
    }

    /// A manifest or an index: small, wholly in memory, and parsed before it is kept.
    pub(super) async fn document(
        &self,
        reference: &Reference,
        digest: Digest,
        providers: &[PeerId],
        pin: &Pin,
    ) -> Result<(Document, Brought), RecoverError> {
        let held = Held::read(&*self.store, digest).await.map_err(RecoverError::store("reading a manifest"))?;
        let (bytes, proof, from) = match held {
            Held::Whole(bytes, proof) => (bytes, proof, None),
            Held::TooLarge(size) => {
                return Err(RecoverError::Document { digest, source: DocumentError::TooLarge(size) });
            }
            // What is broken here is fetched, not trusted.
            Held::Absent | Held::Damaged => {
                let (bytes, proof, peer) = self.fetch_document(digest, providers).await?;
                (bytes, proof, Some(peer))
            }
        };
        let unusable = |source| RecoverError::Document { digest, source };
        let document = Document::parse(&bytes).map_err(unusable)?;
        document.check_runnable().map_err(unusable)?;
        let children = document.children().enumerate();
        let remembered = Remembered {
            source: Some(reference.repository().clone()),
            children: children
                .map(|(position, child)| Child { digest: child.digest, kind: child_kind(&document, position) })
                .collect(),
        };
        let descriptor = Descriptor {
            media_type: document.media_type().to_owned(),
            digest,
            size: proof.size(),
            platform: None,
            attestation: false,
        };
        self.keep(bytes, proof, pin, &remembered).await?;
        Ok((document, Brought { descriptor, from }))
    }

    async fn fetch_document(
        &self,
        digest: Digest,
        providers: &[PeerId],
    ) -> Result<(Bytes, Verified, PeerId), RecoverError> {
        let mut attempts = Attempts::new(digest);
        for _ in 0..ROUNDS {
            // The image's own providers first; a child manifest may be on others as well.
            let mut candidates = providers.to_vec();
            candidates.extend(self.holders.of_blob(digest).into_iter().filter(|peer| !providers.contains(peer)));
            for peer in self.order(&attempts, candidates) {
                match self.fetch_document_from(peer, digest).await {
                    Ok((bytes, proof)) => {
                        self.trust().served(peer);
                        return Ok((bytes, proof, peer));
                    }
                    Err(error) => self.note(&mut attempts, peer, error)?,
                }
            }
            if !self.wait_for_another_round(&attempts, self.holders.of_blob(digest)).await {
                break;
            }
        }
        Err(attempts.into_error())
    }

    /// A small blob, from this store or a provider, for looking at it once. Nothing is kept.
    pub(super) async fn peek(&self, digest: Digest, providers: &[PeerId]) -> Result<Bytes, RecoverError> {
        match Held::read(&*self.store, digest).await.map_err(RecoverError::store("reading a manifest"))? {
            Held::Whole(bytes, _) => Ok(bytes),
            Held::TooLarge(size) => Err(RecoverError::Document { digest, source: DocumentError::TooLarge(size) }),
            Held::Absent | Held::Damaged => self.fetch_document(digest, providers).await.map(|(bytes, _, _)| bytes),
        }
    }

    async fn fetch_document_from(&self, peer: PeerId, digest: Digest) -> Result<(Bytes, Verified), FetchError> {
        let size = self.fetcher.size_of(peer, digest).await?.ok_or(FetchError::Absent { peer, digest })?;
        if size > MAX_DOCUMENT_BYTES {
            // Only this peer's word for it: another may tell the truth.
            let reason =
                format!("says that the manifest {digest} has {size} bytes, over the limit of {MAX_DOCUMENT_BYTES}");
            return Err(FetchError::Protocol { peer, reason });
        }
        let mut sink = Kept::default();
        let proof = self.fetcher.fetch(peer, digest, size, &mut sink).await?;
        Ok((sink.0.into(), proof))
    }

    /// A writer for a blob that is not here; what is here is held by the pin and its memory refreshed instead.
    async fn writer(
        &self,
        digest: Digest,
        size: u64,
        pin: &Pin,
        remembered: &Remembered,
    ) -> Result<Option<Box<dyn BlobWriter>>, RecoverError> {
        let mut waits = 0;
        loop {
            match self.store.create(digest, size, pin).await {
                Ok(writer) => return Ok(Some(writer)),
                Err(StoreError::AlreadyThere(_)) => {
                    self.store.remember(digest, remembered).await.map_err(RecoverError::store("labelling a blob"))?;
                    return Ok(None);
                }
                // Another recovery of this node fetches the same blob: whoever is first, we profit.
                Err(StoreError::Busy(_)) if waits < BUSY_WAITS => {
                    waits += 1;
                    tokio::time::sleep(BUSY_WAIT).await;
                }
                Err(error) => return Err(RecoverError::store("opening a blob for writing")(error)),
            }
        }
    }

    /// Whom to ask now, the best first. Who is busy is left out until it may be better.
    fn order(&self, attempts: &Attempts, mut candidates: Vec<PeerId>) -> Vec<PeerId> {
        let (trust, now) = (self.trust(), now());
        candidates.retain(|peer| !attempts.given_up.contains(peer) && trust.not_before(*peer, now).is_none());
        order_providers(self.me, attempts.digest, candidates, |peer| trust.standing(peer, now))
    }

    /// Waits until somebody who is left may do better; false when nobody is left.
    async fn wait_for_another_round(&self, attempts: &Attempts, holders: Vec<PeerId>) -> bool {
        let left = holders.into_iter().filter(|peer| !attempts.given_up.contains(peer));
        let soonest = {
            let (trust, now) = (self.trust(), now());
            // One that is not busy has come just now.
            left.map(|peer| trust.not_before(peer, now).unwrap_or(now)).min()
        };
        let Some(soonest) = soonest else { return false };
        tokio::time::sleep_until(soonest.into()).await;
        true
    }

    /// Counts a failed attempt. Fails when no peer can help: our own store is what broke.
    fn note(&self, attempts: &mut Attempts, peer: PeerId, error: FetchError) -> Result<(), RecoverError> {
        let digest = attempts.digest;
        match error {
            FetchError::Sink(source) => Err(RecoverError::Store { doing: "writing a blob", source }),
            error => {
                tracing::warn!(%peer, node = %self.holders.node_of(peer), %digest, %error, "a provider failed");
                if let Some(fault) = fault_of(&error) {
                    self.metrics.peer_at_fault(fault.label());
                    self.trust().fault(peer, fault, now(), rand::random());
                }
                attempts.failed(peer, error);
                Ok(())
            }
        }
    }

    fn trust(&self) -> MutexGuard<'_, Trust> {
        self.trust.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a failure says about the peer; nothing where it does not have the blob, or where the size may be the manifest's mistake.
fn fault_of(error: &FetchError) -> Option<Fault> {
    match error {
        error if error.is_peers_fault() => Some(Fault::Lied),
        FetchError::Busy { .. } => Some(Fault::Busy),
        FetchError::Unreachable { .. } | FetchError::NotAdmitted { .. } => Some(Fault::Unreachable),
        FetchError::Stalled { .. } => Some(Fault::Stalled),
        FetchError::StoreFailed { .. } => Some(Fault::StoreFailed),
        _ => None,
    }
}

/// The clock that tests pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// What was tried for one blob.
struct Attempts {
    digest: Digest,
    /// Not asked again for this blob.
    given_up: HashSet<PeerId>,
    errors: Vec<FetchError>,
}

/// Errors kept for the report; more would not be read.
const MAX_ERRORS: usize = 16;

impl Attempts {
    fn new(digest: Digest) -> Self {
        Self { digest, given_up: HashSet::new(), errors: Vec::new() }
    }

    fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    fn failed(&mut self, peer: PeerId, error: FetchError) {
        if !error.is_retryable() {
            self.given_up.insert(peer);
        }
        if self.errors.len() == MAX_ERRORS {
            self.errors.remove(0);
        }
        self.errors.push(error);
    }

    fn into_error(self) -> RecoverError {
        RecoverError::Fetch { digest: self.digest, attempts: self.errors }
    }
}

/// Keeps a small blob in memory. What may come is bounded by the size that the fetch is called with.
#[derive(Default)]
struct Kept(Vec<u8>);

#[async_trait]
impl BlobSink for Kept {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        chunks.iter().for_each(|chunk| self.0.extend_from_slice(chunk));
        Ok(())
    }
}
