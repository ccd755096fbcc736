//! One blob: held if it is here, else fetched from one provider after the other until one sends the right bytes.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use bytes::Bytes;

use super::holders::Holders;
use super::progress::{Counted, Progress};
use super::recover::child_kind;
use super::recover_error::RecoverError;
use crate::decide::plan::order_providers;
use crate::metrics::Metrics;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Document, DocumentError, MAX_DOCUMENT_BYTES, Reference, Verified};
use crate::ports::{BlobSink, BlobWriter, Child, ContentStore, FetchError, Fetcher, Pin, Remembered, StoreError};

/// Times that the providers of one blob are gone through. Only peers that are busy, or new ones, are worth another
/// round; with the waits between them this is half a minute, then the recovery's own back-off takes over.
const ROUNDS: u32 = 20;

/// Longest wait between two rounds, and for a store that is busy with the same blob.
const ROUND_WAIT: Duration = Duration::from_millis(1500);

/// Waits for a store that is busy with the same blob: an hour, as long as a pin holds. Two images of this node share a layer, and the
/// recovery that writes it may be on a slow link; when that one ends, in whichever way, the store is free.
const BUSY_WAITS: u32 = 2400;

/// How long a peer that sent wrong content or broke the protocol is asked last. Not excluded: one bad sector is no reason to
/// lose what only this peer holds, and nothing it sends is believed unverified.
const DISTRUST: Duration = Duration::from_secs(600);

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
    /// Counts failures.
    pub metrics: Metrics,
    /// Peers whose fault something was, and since when. Bounded by the peers that were ever admitted.
    pub distrusted: Mutex<HashMap<PeerId, Instant>>,
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
        let mut attempts = self.attempts(blob.digest);
        for round in 0..ROUNDS {
            for peer in attempts.order(self.me, self.holders.of_blob(blob.digest)) {
                let Some(mut writer) = self.writer(blob.digest, blob.size, pin, &remembered).await? else {
                    return Ok(Brought { descriptor: blob.clone(), from: None });
                };
                let mut sink = Counted::new(&mut *writer, progress, blob.digest, peer);
                match self.fetcher.fetch(peer, blob.digest, blob.size, &mut sink).await {
                    Ok(proof) => {
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
            if !attempts.wait_for_another_round(round, self.holders.of_blob(blob.digest)).await {
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
        let (bytes, proof, from) = match self.local_document(digest).await? {
            Some((bytes, proof)) => (bytes, proof, None),
            None => {
                let (bytes, proof, peer) = self.fetch_document(digest, providers).await?;
                (bytes, proof, Some(peer))
            }
        };
        let document = Document::parse(&bytes).map_err(|source| RecoverError::Document { digest, source })?;
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
        if let Some(mut writer) = self.writer(digest, proof.size(), pin, &remembered).await? {
            writer.append(&[bytes]).await.map_err(RecoverError::store("writing a manifest"))?;
            writer.commit(proof, &remembered).await.map_err(RecoverError::store("committing a manifest"))?;
        }
        Ok((document, Brought { descriptor, from }))
    }

    /// The document from our own store, hashed again: what is broken here is fetched, not trusted.
    async fn local_document(&self, digest: Digest) -> Result<Option<(Bytes, Verified)>, RecoverError> {
        let failed = RecoverError::store("reading a manifest");
        let mut reader = match self.store.open(digest).await {
            Ok(reader) => reader,
            Err(StoreError::Absent(_)) => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let size = reader.size();
        if size > MAX_DOCUMENT_BYTES {
            return Err(RecoverError::Document { digest, source: DocumentError::TooLarge(size) });
        }
        let mut sink = Kept::default();
        let mut hasher = crate::oci::Hasher::default();
        while hasher.size() < size {
            let left = usize::try_from(size - hasher.size()).unwrap_or(usize::MAX);
            match reader.read_at(hasher.size(), left).await {
                Ok(bytes) if bytes.is_empty() => break,
                Ok(bytes) => {
                    hasher.update(&bytes);
                    sink.0.extend_from_slice(&bytes);
                }
                Err(StoreError::Absent(_)) => return Ok(None),
                Err(error) => return Err(failed(error)),
            }
        }
        Ok(hasher.verify(digest, size).ok().map(|proof| (sink.0.into(), proof)))
    }

    async fn fetch_document(
        &self,
        digest: Digest,
        providers: &[PeerId],
    ) -> Result<(Bytes, Verified, PeerId), RecoverError> {
        let mut attempts = self.attempts(digest);
        for round in 0..ROUNDS {
            // The image's own providers first; a child manifest may be on others as well.
            let mut candidates = providers.to_vec();
            candidates.extend(self.holders.of_blob(digest).into_iter().filter(|peer| !providers.contains(peer)));
            for peer in attempts.order(self.me, candidates) {
                match self.fetch_document_from(peer, digest).await {
                    Ok((bytes, proof)) => return Ok((bytes, proof, peer)),
                    Err(error) => self.note(&mut attempts, peer, error)?,
                }
            }
            if !attempts.wait_for_another_round(round, self.holders.of_blob(digest)).await {
                break;
            }
        }
        Err(attempts.into_error())
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
                    tokio::time::sleep(ROUND_WAIT).await;
                }
                Err(error) => return Err(RecoverError::store("opening a blob for writing")(error)),
            }
        }
    }

    fn attempts(&self, digest: Digest) -> Attempts {
        let mut distrusted = self.distrusted.lock().unwrap_or_else(PoisonError::into_inner);
        distrusted.retain(|_, since| since.elapsed() < DISTRUST);
        Attempts { digest, failed: distrusted.keys().copied().collect(), given_up: HashSet::new(), errors: Vec::new() }
    }

    /// Counts a failed attempt. Fails when no peer can help: our own store is what broke.
    fn note(&self, attempts: &mut Attempts, peer: PeerId, error: FetchError) -> Result<(), RecoverError> {
        let digest = attempts.digest;
        match error {
            FetchError::Sink(source) => Err(RecoverError::Store { doing: "writing a blob", source }),
            error => {
                tracing::warn!(%peer, node = %self.holders.node_of(peer), %digest, %error, "a provider failed");
                if error.is_peers_fault() {
                    self.distrusted.lock().unwrap_or_else(PoisonError::into_inner).insert(peer, Instant::now());
                }
                attempts.failed(peer, error);
                Ok(())
            }
        }
    }
}

/// What was tried for one blob.
struct Attempts {
    digest: Digest,
    /// Asked last: busy just now, or distrusted.
    failed: HashSet<PeerId>,
    /// Not asked again for this blob.
    given_up: HashSet<PeerId>,
    errors: Vec<FetchError>,
}

/// Errors kept for the report; more would not be read.
const MAX_ERRORS: usize = 16;

impl Attempts {
    fn is_empty(&self) -> bool {
        self.errors.is_empty()
    }

    fn order(&self, me: PeerId, mut candidates: Vec<PeerId>) -> Vec<PeerId> {
        candidates.retain(|peer| !self.given_up.contains(peer));
        order_providers(me, self.digest, candidates, &self.failed)
    }

    fn failed(&mut self, peer: PeerId, error: FetchError) {
        if error.is_retryable() {
            self.failed.insert(peer);
        } else {
            self.given_up.insert(peer);
        }
        if self.errors.len() == MAX_ERRORS {
            self.errors.remove(0);
        }
        self.errors.push(error);
    }

    /// Waits when somebody is left who may do better in a moment; false when nobody is.
    async fn wait_for_another_round(&self, round: u32, holders: Vec<PeerId>) -> bool {
        if holders.iter().all(|peer| self.given_up.contains(peer)) {
            return false;
        }
        // Doubling from 100 ms; half of it random, so that fetchers which met at a busy peer do not meet again.
        let longest = Duration::from_millis(100).saturating_mul(1 << round.min(8)).min(ROUND_WAIT);
        tokio::time::sleep(longest.mul_f64(0.5 + rand::random::<f64>() / 2.0)).await;
        true
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
