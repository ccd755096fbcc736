//! The tasks of a swarm. `results` handles their results.

mod results;

use std::sync::Arc;

use super::dispute::{DisputeOutcome, settle_dispute};
use super::download_sink::DownloadSink;
use super::{BlobStage, FetchingStage, Swarm, now};
use crate::agent::recovery::blob_fetcher::PreparedBlob;
use crate::agent::recovery::downloads::blob_download::{BlobDownload, StoredPiece};
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::piece_picker::{PickedRequest, PieceRequestId, RequestEnd};
use crate::model::{NodeName, PeerId, PieceMapUpdate};
use crate::oci::{BlobProof, Descriptor, Digest, HashChain, HashState, PieceLayout};
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
}

/// Longest time of a dispute: two pieces and one hash chain.
const DISPUTE_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(10);
