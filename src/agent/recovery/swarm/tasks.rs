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
        let Some(incoming) = self.download(digest) else { return };
        let (fetcher, shared) = (Arc::clone(&self.blob_fetcher.fetcher), Arc::clone(&self.shared));
        let task = self.tasks.spawn(async move {
            let followed = async {
                let mut following = fetcher.follow(peer, digest, incoming.layout()).await?;
                loop {
                    let update = following.next().await?;
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

    pub(super) fn spawn_request(&mut self, request: PickedRequest) {
        let PickedRequest { id, request: order } = request;
        let (peer, digest) = (order.peer, order.digest);
        let Some(incoming) = self.download(digest) else {
            return self.shared.picker().end_request(id, RequestEnd::Failed, now());
        };
        let fetcher = Arc::clone(&self.blob_fetcher.fetcher);
        let mut sink = DownloadSink::new(Arc::clone(&self.shared), incoming, id, peer);
        let task = self.tasks.spawn(async move {
            let fetched = fetcher.fetch_pieces(&order, &mut sink).await;
            TaskResult::RequestEnded(id, fetched)
        });
        self.requests.insert(id, (peer, digest, task));
    }

    pub(super) fn spawn_chain_fetch(&mut self, peer: PeerId, digest: Digest, layout: PieceLayout) {
        let Some(incoming) = self.download(digest) else { return };
        let (fetcher, shared) = (Arc::clone(&self.blob_fetcher.fetcher), Arc::clone(&self.shared));
        self.tasks.spawn(async move {
            let mut on_states = |states: &[HashState]| {
                incoming.extend_prefix(peer, states);
                shared.piece_received.notify_one();
            };
            TaskResult::ChainFetched(peer, digest, fetcher.fetch_hash_chain(peer, digest, layout, &mut on_states).await)
        });
    }

    /// Compares the senders' first pieces with the prefixes of hash chains.
    pub(super) fn spawn_prefix_checks(&mut self, incoming: Arc<BlobDownload>, is_alone: bool) {
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let digest = incoming.blob().digest;
            while let Some(check) = incoming.next_prefix_check(is_alone) {
                match incoming.check_prefix(check).await {
                    Ok(true) => shared.picker().record_verified_piece(check.sender, digest),
                    Ok(false) => shared.picker().record_mismatch(check.sender, digest, now()),
                    Err(error) => return TaskResult::PiecesVerified(digest, Err(error)),
                }
            }
            TaskResult::PiecesVerified(digest, Ok(Vec::new()))
        });
    }

    pub(super) fn spawn_verification(&mut self, incoming: Arc<BlobDownload>) {
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let (mut wrong, digest) = (Vec::new(), incoming.blob().digest);
            for piece in incoming.unverified() {
                match incoming.verify_stored(piece).await {
                    Ok(StoredPiece::Valid(from)) => {
                        from.iter().for_each(|peer| shared.picker().record_verified_piece(*peer, digest))
                    }
                    Ok(StoredPiece::Invalid(None)) => wrong.push((piece, None)),
                    // A dispute settles the fault before more pieces are discarded.
                    Ok(StoredPiece::Invalid(from)) => {
                        wrong.push((piece, from));
                        break;
                    }
                    Ok(StoredPiece::ChainReplaced) => break,
                    Err(error) => return TaskResult::PiecesVerified(digest, Err(error)),
                }
                tokio::task::yield_now().await;
            }
            TaskResult::PiecesVerified(digest, Ok(wrong))
        });
    }

    fn spawn_dispute(&mut self, incoming: Arc<BlobDownload>, peer: PeerId, piece: u32) {
        let fetcher = Arc::clone(&self.blob_fetcher.fetcher);
        self.tasks.spawn(async move {
            let digest = incoming.blob().digest;
            let Some((ours, author)) = incoming.hash_chain() else {
                return TaskResult::DisputeSettled(peer, digest, piece, DisputeOutcome::SenderAtFault);
            };
            let settled =
                tokio::time::timeout(DISPUTE_TIMEOUT, settle_dispute(&*fetcher, &incoming, &ours, author, peer)).await;
            let seconds = DISPUTE_TIMEOUT.as_secs();
            let slow = |_| DisputeOutcome::NoAnswer(FetchError::Stalled { peer, digest, seconds });
            TaskResult::DisputeSettled(peer, digest, piece, settled.unwrap_or_else(slow))
        });
    }

    pub(super) fn spawn_commit(&mut self, incoming: Arc<BlobDownload>, proof: BlobProof) {
        let remembered = BlobMetadata { source: Some(self.reference.repository().clone()), children: Vec::new() };
        self.tasks.spawn(async move {
            let committed = incoming.staged().commit(proof, &remembered).await;
            TaskResult::Committed(incoming.blob().digest, committed)
        });
    }

    pub(super) fn spawn_claim(&mut self, claim: Digest) {
        let (claims, reference) = (Arc::clone(&self.claims), self.reference.clone());
        self.tasks.spawn(async move { TaskResult::ZoneClaimed(claims.claim_zone(&reference, claim).await) });
    }

    fn download(&self, digest: Digest) -> Option<Arc<BlobDownload>> {
        match &self.active.get(&digest)?.stage {
            BlobStage::Fetching(FetchingStage { download: incoming, .. }) => Some(Arc::clone(incoming)),
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
            TaskResult::RequestEnded(ask, result) => self.on_request_ended(ask, result)?,
            TaskResult::FollowEnded(peer, digest, error) => {
                self.record_failure(digest, peer, error)?;
            }
            TaskResult::ChainFetched(peer, digest, listed) => self.on_chain_fetched(peer, digest, listed)?,
            TaskResult::PiecesVerified(digest, checked) => self.on_pieces_verified(digest, checked)?,
            TaskResult::DisputeSettled(peer, digest, piece, verdict) => {
                self.on_dispute_settled(peer, digest, piece, verdict)?
            }
            TaskResult::Committed(digest, committed) => self.on_committed(digest, committed)?,
            TaskResult::ZoneClaimed(result) => {
                if let Some(zones) = &mut self.zone_election {
                    let inventory = &self.blob_fetcher.inventory;
                    zones.record_claim(result, |node| inventory.peer_on_node(node), now());
                }
            }
        }
        Ok(())
    }

    fn on_prepared(&mut self, digest: Digest, prepared: PreparedBlob) {
        let staged = match prepared {
            PreparedBlob::Present(brought) => {
                self.active.remove(&digest);
                self.add_fetched(brought);
                return;
            }
            PreparedBlob::Staged(staged) => staged,
        };
        let Some(coming) = self.active.get_mut(&digest) else { return };
        coming.last_progress = now();
        let incoming = Arc::new(BlobDownload::new(coming.blob.clone(), staged));
        let mut pool = self.shared.picker();
        pool.add_blob(digest, incoming.layout());
        if incoming.hash_chain().is_some() {
            pool.mark_hash_chain_ready(digest);
        }
        incoming.unverified().into_iter().for_each(|piece| pool.mark_piece_present(digest, piece));
        drop(pool);
        self.blob_fetcher.downloads.insert(&incoming);
        coming.stage = BlobStage::Fetching(FetchingStage::new(incoming));
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
        let how = match &result {
            Ok(()) => RequestEnd::Done,
            Err(FetchError::Busy { .. }) => RequestEnd::Busy,
            Err(_) => RequestEnd::Failed,
        };
        self.shared.picker().end_request(request, how, now());
        match result {
            Ok(()) => {
                let Some(incoming) = self.download(digest) else { return Ok(()) };
                if incoming.bytes_by_peer().contains_key(&peer) {
                    self.blob_fetcher.trust().record_success(peer);
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
        let settle = is_new && fetching.open_disputes < MAX_DISPUTES;
        fetching.open_disputes += usize::from(settle);
        let incoming = Arc::clone(&fetching.download);
        self.update_providers(digest);
        if settle {
            self.spawn_dispute(incoming, peer, piece);
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
        let is_list_wrong = matches!(verdict, DisputeOutcome::AuthorAtFault(_) | DisputeOutcome::BothAtFault);
        fetching.accused_peers.remove(&peer);
        if is_last || is_list_wrong {
            fetching.accused_peers.clear();
        }
        let incoming = Arc::clone(&fetching.download);
        let author = incoming.hash_chain().and_then(|(_, author)| author);
        let is_adopted = match verdict {
            DisputeOutcome::SenderAtFault => self.record_fault(digest, peer, piece).map(|()| false)?,
            DisputeOutcome::NoAnswer(error) => self.record_failure(digest, peer, error).map(|()| false)?,
            DisputeOutcome::AuthorAtFault(chain) => {
                incoming.set_hash_chain(chain, peer);
                author.map_or(Ok(()), |author| self.record_fault(digest, author, piece))?;
                true
            }
            DisputeOutcome::BothAtFault => {
                self.record_fault(digest, peer, piece)?;
                author.map_or(Ok(()), |author| self.record_fault(digest, author, piece))?;
                false
            }
        };
        if !is_adopted && incoming.discard(piece) {
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
        listed: Result<HashChain, FetchError>,
    ) -> Result<(), RecoverError> {
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), .. }) = self.active.get_mut(&digest) else {
            return Ok(());
        };
        fetching.chain_requests.remove(&peer);
        fetching.download.drop_prefix(peer);
        fetching.no_chain_until.insert(peer, now() + HASH_CHAIN_RETRY);
        match listed {
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
        let wrong = checked.map_err(RecoverError::store("checking what was written"))?;
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), .. }) = self.active.get_mut(&digest) else {
            return Ok(());
        };
        fetching.is_verifying = false;
        let incoming = Arc::clone(&fetching.download);
        for (piece, sender) in wrong {
            match sender {
                // No dispute can settle the fault of an unknown sender, or of a sender that is
                // accused already.
                Some(sender) if !is_accused(&self.active, digest, sender) => {
                    self.on_invalid_piece(sender, digest, piece)
                }
                Some(_) | None => {
                    incoming.discard(piece);
                    if !incoming.is_verified(piece) {
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
        let Some(coming) = self.active.remove(&digest) else { return Ok(()) };
        if let BlobStage::Committing(incoming) = coming.stage {
            self.blob_fetcher.downloads.remove(&incoming);
            if let Some((chain, _)) = incoming.hash_chain() {
                self.blob_fetcher.fetcher.keep_hash_chain(chain);
            }
            self.add_fetched(FetchedBlob { descriptor: coming.blob, from: Some(incoming.bytes_by_peer()) });
        }
        Ok(())
    }

    fn add_fetched(&mut self, blob: FetchedBlob) {
        self.complete_blobs.send_if_modified(|here| here.insert(blob.descriptor.digest));
        self.fetched.push(blob);
    }
}

/// Whether this sender is accused for this blob, without a verdict yet.
fn is_accused(coming: &std::collections::HashMap<Digest, ActiveBlob>, digest: Digest, sender: PeerId) -> bool {
    let accused = |coming: &ActiveBlob| match &coming.stage {
        BlobStage::Fetching(fetching) => fetching.accused_peers.contains(&sender),
        BlobStage::Preparing | BlobStage::Committing(_) => false,
    };
    coming.get(&digest).is_some_and(accused)
}

/// Longest time of a dispute: two pieces and one hash chain.
const DISPUTE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);

/// Most disputes of one blob at a time. With several, a slow sender does not delay the disputes of
/// the others.
const MAX_DISPUTES: usize = 4;
