//! The handlers of task results: a result changes the state of its blob and the standing of its
//! peer. A dispute decides whether the sender or the author of the chain is at fault.

use std::sync::Arc;

use crate::agent::recovery::blob_fetcher::{FetchedBlob, PreparedBlob};
use crate::agent::recovery::downloads::blob_download::BlobDownload;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::swarm::dispute::DisputeOutcome;
use crate::agent::recovery::swarm::{ActiveBlob, BlobStage, FetchingStage, HASH_CHAIN_RETRY, Swarm, now};
use crate::decide::piece_picker::{PieceRequestId, RequestEnd};
use crate::model::PeerId;
use crate::oci::{Digest, HashChain, VerifyError};
use crate::ports::{FetchError, StoreError};

impl Swarm<'_> {
    pub(super) fn on_prepared(&mut self, digest: Digest, prepared: PreparedBlob) {
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

    pub(super) fn on_request_ended(
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

    pub(super) fn on_dispute_settled(
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
    pub(super) fn on_chain_fetched(
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

    pub(super) fn on_pieces_verified(
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

    pub(super) fn on_committed(
        &mut self,
        digest: Digest,
        committed: Result<(), StoreError>,
    ) -> Result<(), RecoverError> {
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

/// Most disputes of one blob at a time. With several, a slow sender does not delay the disputes of
/// the others.
const MAX_DISPUTES: usize = 4;
