//! The tasks of a swarm, and the handlers of their results.

use std::sync::Arc;

use super::dispute::{DisputeOutcome, settle_dispute};
use super::download_sink::DownloadSink;
use super::{ActiveBlob, BlobStage, FetchingStage, HASH_CHAIN_RETRY, Swarm, now};
use crate::agent::recovery::blob_fetcher::{FetchedBlob, PreparedBlob};
use crate::agent::recovery::downloads::blob_download::{BlobDownload, StoredPiece};
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::piece_picker::{PickedRequest, PieceRequestId, RequestEnd};
use crate::model::{NodeName, PeerId, PieceMapUpdate};
use crate::oci::{BlobProof, Descriptor, Digest, HashChain, HashState, PieceLayout, VerifyError};
use crate::ports::{BlobMetadata, ClaimError, FetchError, StoreError};

/// The result of a task.
pub(super) enum TaskResult {
    Prepared(Digest, Result<PreparedBlob, RecoverError>),
    RequestEnded(PieceRequestId, Result<(), FetchError>),
    FollowEnded(PeerId, Digest, FetchError),
    ChainFetched(PeerId, Digest, Result<HashChain, FetchError>),
    PiecesVerified(Digest, Result<Vec<(u32, Option<PeerId>)>, StoreError>),
    DisputeSettled(PeerId, Digest, u32, DisputeOutcome),
    Committed(Digest, Result<(), StoreError>),
    ZoneClaimed(Result<Option<NodeName>, ClaimError>),
}

impl Swarm<'_> {
    pub(super) fn spawn_prepare(&mut self, blob: &Descriptor) {
        let (blob_fetcher, blob) = (Arc::clone(&self.blob_fetcher), blob.clone());
        let (reference, pin) = (self.reference.clone(), self.pin.clone());
        self.tasks.spawn(async move {
            let prepared = blob_fetcher.prepare(&reference, &blob, &pin).await;
            TaskResult::Prepared(blob.digest, prepared)
        });
    }

    pub(super) fn spawn_follow(&mut self, peer: PeerId, digest: Digest) {
        let Some(download) = self.download(digest) else { return };
        let (fetcher, shared) = (Arc::clone(&self.blob_fetcher.fetcher), Arc::clone(&self.shared));
        let task = self.tasks.spawn(async move {
            let followed = async {
                let mut updates = fetcher.follow(peer, digest, download.layout()).await?;
                loop {
                    let update = updates.next().await?;
                    shared.picker().record_piece_map(peer, digest, &update, now());
                    shared.piece_received.notify_one();
                    if update == PieceMapUpdate::HaveAll {
                        // The map is complete. The task lives on, because its end would deselect
                        // the provider.
                        std::future::pending::<()>().await;
                    }
                }
            };
            let Err::<std::convert::Infallible, _>(error) = followed.await;
            TaskResult::FollowEnded(peer, digest, error)
        });
        self.followed_providers.insert((peer, digest), task);
    }

    pub(super) fn spawn_request(&mut self, picked: PickedRequest) {
        let PickedRequest { id, request } = picked;
        let (peer, digest) = (request.peer, request.digest);
        let Some(download) = self.download(digest) else {
            return self.shared.picker().end_request(id, RequestEnd::Failed, now());
        };
        let fetcher = Arc::clone(&self.blob_fetcher.fetcher);
        let mut sink = DownloadSink::new(Arc::clone(&self.shared), download, id, peer);
        let task = self.tasks.spawn(async move {
            let fetched = fetcher.fetch_pieces(&request, &mut sink).await;
            TaskResult::RequestEnded(id, fetched)
        });
        self.requests.insert(id, (peer, digest, task));
    }

    pub(super) fn spawn_chain_fetch(&mut self, peer: PeerId, digest: Digest, layout: PieceLayout) {
        let Some(download) = self.download(digest) else { return };
        let (fetcher, shared) = (Arc::clone(&self.blob_fetcher.fetcher), Arc::clone(&self.shared));
        self.tasks.spawn(async move {
            let mut on_states = |states: &[HashState]| {
                download.extend_prefix(peer, states);
                shared.piece_received.notify_one();
            };
            TaskResult::ChainFetched(peer, digest, fetcher.fetch_hash_chain(peer, digest, layout, &mut on_states).await)
        });
    }

    /// Compares the senders' first pieces with the prefixes of hash chains.
    pub(super) fn spawn_prefix_checks(&mut self, download: Arc<BlobDownload>, has_single_provider: bool) {
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let digest = download.blob().digest;
            while let Some(check) = download.next_prefix_check(has_single_provider) {
                match download.check_prefix(check).await {
                    Ok(true) => shared.picker().record_verified_piece(check.sender, digest),
                    Ok(false) => shared.picker().record_mismatch(check.sender, digest, now()),
                    Err(error) => return TaskResult::PiecesVerified(digest, Err(error)),
                }
            }
            TaskResult::PiecesVerified(digest, Ok(Vec::new()))
        });
    }

    pub(super) fn spawn_verification(&mut self, download: Arc<BlobDownload>) {
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let (mut invalid_pieces, digest) = (Vec::new(), download.blob().digest);
            for piece in download.unverified() {
                match download.verify_stored(piece).await {
                    Ok(StoredPiece::Valid(from)) => {
                        from.iter().for_each(|peer| shared.picker().record_verified_piece(*peer, digest))
                    }
                    Ok(StoredPiece::Invalid(None)) => invalid_pieces.push((piece, None)),
                    // A dispute settles the fault before more pieces are discarded.
                    Ok(StoredPiece::Invalid(from)) => {
                        invalid_pieces.push((piece, from));
                        break;
                    }
                    Ok(StoredPiece::ChainReplaced) => break,
                    Err(error) => return TaskResult::PiecesVerified(digest, Err(error)),
                }
                tokio::task::yield_now().await;
            }
            TaskResult::PiecesVerified(digest, Ok(invalid_pieces))
        });
    }

    fn spawn_dispute(&mut self, download: Arc<BlobDownload>, peer: PeerId, piece: u32) {
        let fetcher = Arc::clone(&self.blob_fetcher.fetcher);
        self.tasks.spawn(async move {
            let digest = download.blob().digest;
            let Some((chain, author)) = download.hash_chain() else {
                return TaskResult::DisputeSettled(peer, digest, piece, DisputeOutcome::SenderAtFault);
            };
            let outcome =
                tokio::time::timeout(DISPUTE_TIMEOUT, settle_dispute(&*fetcher, &download, &chain, author, peer)).await;
            let seconds = DISPUTE_TIMEOUT.as_secs();
            let on_timeout = |_| DisputeOutcome::NoAnswer(FetchError::Stalled { peer, digest, seconds });
            TaskResult::DisputeSettled(peer, digest, piece, outcome.unwrap_or_else(on_timeout))
        });
    }

    pub(super) fn spawn_commit(&mut self, download: Arc<BlobDownload>, proof: BlobProof) {
        let metadata = BlobMetadata { source: Some(self.reference.repository().clone()), children: Vec::new() };
        self.tasks.spawn(async move {
            let committed = download.staged().commit(proof, &metadata).await;
            TaskResult::Committed(download.blob().digest, committed)
        });
    }

    pub(super) fn spawn_claim(&mut self, claim: Digest) {
        let (claims, reference) = (Arc::clone(&self.claims), self.reference.clone());
        self.tasks.spawn(async move { TaskResult::ZoneClaimed(claims.claim_zone(&reference, claim).await) });
    }

    fn download(&self, digest: Digest) -> Option<Arc<BlobDownload>> {
        match &self.active.get(&digest)?.stage {
            BlobStage::Fetching(FetchingStage { download, .. }) => Some(Arc::clone(download)),
            BlobStage::Preparing | BlobStage::Committing(_) => None,
        }
    }

    /// Applies the result of a task.
    ///
    /// # Errors
    /// [`RecoverError`] when the image cannot be completed.
    pub(super) fn handle(&mut self, done: TaskResult) -> Result<(), RecoverError> {
        match done {
            TaskResult::Prepared(digest, prepared) => self.on_prepared(digest, prepared?),
            TaskResult::RequestEnded(id, result) => self.on_request_ended(id, result)?,
            TaskResult::FollowEnded(peer, digest, error) => {
                self.record_failure(digest, peer, error)?;
            }
            TaskResult::ChainFetched(peer, digest, result) => self.on_chain_fetched(peer, digest, result)?,
            TaskResult::PiecesVerified(digest, checked) => self.on_pieces_verified(digest, checked)?,
            TaskResult::DisputeSettled(peer, digest, piece, verdict) => {
                self.on_dispute_settled(peer, digest, piece, verdict)?
            }
            TaskResult::Committed(digest, committed) => self.on_committed(digest, committed)?,
            TaskResult::ZoneClaimed(result) => {
                if let Some(election) = &mut self.zone_election {
                    let inventory = &self.blob_fetcher.inventory;
                    election.record_claim(result, |node| inventory.peer_on_node(node), now());
                }
            }
        }
        Ok(())
    }

    fn on_prepared(&mut self, digest: Digest, prepared: PreparedBlob) {
        let staged = match prepared {
            PreparedBlob::Present(blob) => {
                self.active.remove(&digest);
                self.add_fetched(blob);
                return;
            }
            PreparedBlob::Staged(staged) => staged,
        };
        let Some(active_blob) = self.active.get_mut(&digest) else { return };
        active_blob.last_progress = now();
        let download = Arc::new(BlobDownload::new(active_blob.blob.clone(), staged));
        let mut picker = self.shared.picker();
        picker.add_blob(digest, download.layout());
        if download.hash_chain().is_some() {
            picker.mark_hash_chain_ready(digest);
        }
        download.unverified().into_iter().for_each(|piece| picker.mark_piece_present(digest, piece));
        drop(picker);
        self.blob_fetcher.downloads.insert(&download);
        active_blob.stage = BlobStage::Fetching(FetchingStage::new(download));
        self.update_providers(digest);
        self.update_zone_peers();
        self.request_hash_chain(digest);
        self.advance(digest);
    }

    fn on_request_ended(
        &mut self,
        request: PieceRequestId,
        result: Result<(), FetchError>,
    ) -> Result<(), RecoverError> {
        // A canceled request ended before its task was aborted.
        let Some((peer, digest, _)) = self.requests.remove(&request) else { return Ok(()) };
        let end = match &result {
            Ok(()) => RequestEnd::Done,
            Err(FetchError::Busy { .. }) => RequestEnd::Busy,
            Err(_) => RequestEnd::Failed,
        };
        self.shared.picker().end_request(request, end, now());
        match result {
            Ok(()) => {
                let Some(download) = self.download(digest) else { return Ok(()) };
                if download.bytes_by_peer().contains_key(&peer) {
                    self.blob_fetcher.peer_faults().record_success(peer);
                }
            }
            Err(FetchError::Busy { .. }) => self.blob_fetcher.metrics.peer_at_fault("busy"),
            Err(FetchError::PieceMismatch { piece, .. }) => {
                self.on_invalid_piece(peer, digest, u32::try_from(piece).unwrap_or(u32::MAX))
            }
            Err(error) => self.record_failure(digest, peer, error)?,
        }
        Ok(())
    }

    /// Stops the requests for this blob to the sender of an invalid piece, until a dispute shows
    /// whether the sender or the chain is wrong.
    fn on_invalid_piece(&mut self, peer: PeerId, digest: Digest, piece: u32) {
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), .. }) = self.active.get_mut(&digest) else {
            return;
        };
        let is_new = fetching.accused_peers.insert(peer);
        let starts_dispute = is_new && fetching.open_disputes < MAX_DISPUTES;
        fetching.open_disputes += usize::from(starts_dispute);
        let download = Arc::clone(&fetching.download);
        self.update_providers(digest);
        if starts_dispute {
            self.spawn_dispute(download, peer, piece);
        }
    }

    fn on_dispute_settled(
        &mut self,
        peer: PeerId,
        digest: Digest,
        piece: u32,
        verdict: DisputeOutcome,
    ) -> Result<(), RecoverError> {
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), .. }) = self.active.get_mut(&digest) else {
            return Ok(());
        };
        fetching.open_disputes -= 1;
        // The other accused senders get requests again after the last dispute, or if the chain was
        // wrong.
        let is_last = fetching.open_disputes == 0;
        let is_chain_wrong = matches!(verdict, DisputeOutcome::AuthorAtFault(_) | DisputeOutcome::BothAtFault);
        fetching.accused_peers.remove(&peer);
        if is_last || is_chain_wrong {
            fetching.accused_peers.clear();
        }
        let download = Arc::clone(&fetching.download);
        let author = download.hash_chain().and_then(|(_, author)| author);
        let is_adopted = match verdict {
            DisputeOutcome::SenderAtFault => self.record_fault(digest, peer, piece).map(|()| false)?,
            DisputeOutcome::NoAnswer(error) => self.record_failure(digest, peer, error).map(|()| false)?,
            DisputeOutcome::AuthorAtFault(chain) => {
                download.set_hash_chain(chain, peer);
                author.map_or(Ok(()), |author| self.record_fault(digest, author, piece))?;
                true
            }
            DisputeOutcome::BothAtFault => {
                self.record_fault(digest, peer, piece)?;
                author.map_or(Ok(()), |author| self.record_fault(digest, author, piece))?;
                false
            }
        };
        if !is_adopted && download.discard(piece) {
            self.shared.picker().discard_piece(digest, piece);
        }
        self.update_providers(digest);
        self.advance(digest);
        Ok(())
    }

    /// Records a fault of the sender or of the author. A whole provider has lied, or has a damaged
    /// disk. A partial provider may have received wrong bytes itself, so only its requests for this
    /// blob end.
    fn record_fault(&mut self, digest: Digest, peer: PeerId, piece: u32) -> Result<(), RecoverError> {
        let piece = piece as usize;
        let error = match self.blob_fetcher.inventory.is_partial_provider(peer, digest) {
            true => FetchError::PieceMismatch { peer, digest, piece },
            false => FetchError::Corrupt { peer, source: VerifyError::Piece { expected: digest, piece } },
        };
        self.record_failure(digest, peer, error)
    }

    /// Adopts the first chain that arrives. A busy, stalled or partial provider without a chain may
    /// have pieces all the same, and is not excluded.
    fn on_chain_fetched(
        &mut self,
        peer: PeerId,
        digest: Digest,
        result: Result<HashChain, FetchError>,
    ) -> Result<(), RecoverError> {
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), .. }) = self.active.get_mut(&digest) else {
            return Ok(());
        };
        fetching.chain_requests.remove(&peer);
        fetching.download.drop_prefix(peer);
        fetching.no_chain_until.insert(peer, now() + HASH_CHAIN_RETRY);
        match result {
            Ok(chain) if fetching.download.hash_chain().is_none() => {
                fetching.download.set_hash_chain(Arc::new(chain), peer);
                self.shared.picker().mark_hash_chain_ready(digest);
            }
            // Another author's chain arrived first.
            Ok(_) => {}
            Err(FetchError::Busy { .. } | FetchError::Stalled { .. }) => {}
            Err(FetchError::Absent { .. }) if self.blob_fetcher.inventory.is_partial_provider(peer, digest) => {}
            Err(error) => self.record_failure(digest, peer, error)?,
        }
        self.advance(digest);
        Ok(())
    }

    fn on_pieces_verified(
        &mut self,
        digest: Digest,
        checked: Result<Vec<(u32, Option<PeerId>)>, StoreError>,
    ) -> Result<(), RecoverError> {
        let invalid_pieces = checked.map_err(RecoverError::store("checking what was written"))?;
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), .. }) = self.active.get_mut(&digest) else {
            return Ok(());
        };
        fetching.is_verifying = false;
        let download = Arc::clone(&fetching.download);
        for (piece, sender) in invalid_pieces {
            match sender {
                // No dispute can settle the fault of an unknown sender, or of a sender that is
                // accused already.
                Some(sender) if !is_accused(&self.active, digest, sender) => {
                    self.on_invalid_piece(sender, digest, piece)
                }
                Some(_) | None => {
                    download.discard(piece);
                    if !download.is_verified(piece) {
                        self.shared.picker().discard_piece(digest, piece);
                    }
                }
            }
        }
        self.advance(digest);
        Ok(())
    }

    fn on_committed(&mut self, digest: Digest, committed: Result<(), StoreError>) -> Result<(), RecoverError> {
        committed.map_err(RecoverError::store("committing a blob"))?;
        self.report_progress();
        let Some(active_blob) = self.active.remove(&digest) else { return Ok(()) };
        if let BlobStage::Committing(download) = active_blob.stage {
            self.blob_fetcher.downloads.remove(&download);
            if let Some((chain, _)) = download.hash_chain() {
                self.blob_fetcher.fetcher.keep_hash_chain(chain);
            }
            self.add_fetched(FetchedBlob { descriptor: active_blob.blob, from: Some(download.bytes_by_peer()) });
        }
        Ok(())
    }

    fn add_fetched(&mut self, blob: FetchedBlob) {
        self.complete_blobs.send_if_modified(|complete| complete.insert(blob.descriptor.digest));
        self.fetched.push(blob);
    }
}

/// Whether this sender is accused for this blob, without a verdict yet.
fn is_accused(active: &std::collections::HashMap<Digest, ActiveBlob>, digest: Digest, sender: PeerId) -> bool {
    let accused = |blob: &ActiveBlob| match &blob.stage {
        BlobStage::Fetching(fetching) => fetching.accused_peers.contains(&sender),
        BlobStage::Preparing | BlobStage::Committing(_) => false,
    };
    active.get(&digest).is_some_and(accused)
}

/// Longest time of a dispute: two pieces and one hash chain.
const DISPUTE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Most disputes of one blob at a time. With several, a slow sender does not delay the disputes of
/// the others.
const MAX_DISPUTES: usize = 4;
