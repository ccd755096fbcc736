//! Fetches the missing blobs of one image in pieces, from all providers at once.
//!
//! [`crate::decide::piece_picker`] decides which piece is requested from which peer. This module
//! sends the requests, each in a task of its own, so hashing and writing spread over the cores.
//! Pieces that are here are served to peers during the download
//! ([`crate::agent::recovery::downloads`]). Not here: documents, which are fetched whole
//! ([`crate::agent::recovery::blob_fetcher`]).

mod dispute;
mod download_sink;
mod providers;
mod tasks;
#[cfg(test)]
mod tests;
mod zone_election;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};

use self::tasks::TaskResult;
use self::zone_election::ZoneElection;
use crate::agent::recovery::blob_fetcher::{Attempts, BlobFetcher, FetchedBlob};
use crate::agent::recovery::claim_coordinator::ClaimCoordinator;
use crate::agent::recovery::downloads::blob_download::BlobDownload;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::disk_reservations::Reservation;
use crate::decide::piece_picker::{FollowChange, MAX_IN_FLIGHT, PiecePicker, PieceRequestId};
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Reference};
use crate::ports::{FetchError, Pin};
use crate::util::clock::{now, sleep_until};

/// Abort the recovery when a blob made no progress for this long and no request is in flight. The
/// back-off of the queue follows, and the retry reuses the staged pieces. Equal to the longest wait
/// for busy providers of a document: 20 rounds of 1.5 s.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// Batching interval of inventory changes.
const REFRESH_DELAY: Duration = Duration::from_millis(100);

/// Retry delay for a peer that returned no usable hash chain.
const HASH_CHAIN_RETRY: Duration = Duration::from_secs(1);

/// Interval of progress reports.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// State that the tasks of one swarm share.
struct SwarmShared {
    picker: Mutex<PiecePicker>,
    /// Signaled when a piece has arrived.
    piece_received: Notify,
    /// Permits for pieces that wait in memory while another task writes the same piece. Shared by
    /// all recoveries of this node.
    buffer_permits: Arc<Semaphore>,
}

impl SwarmShared {
    fn picker(&self) -> MutexGuard<'_, PiecePicker> {
        self.picker.lock()
    }
}

/// The image that the blobs belong to, and the recipients of progress.
pub(in crate::agent) struct FetchJob<'a> {
    pub(in crate::agent) reference: &'a Reference,
    /// Digest of the index or manifest.
    pub(in crate::agent) image_digest: Digest,
    /// Pins the fetched blobs.
    pub(in crate::agent) pin: &'a Pin,
    pub(in crate::agent) progress: &'a Progress,
    /// Reserved disk space, which shrinks by the written bytes.
    pub(in crate::agent) reservation: &'a Reservation,
    /// Receives the digests of the blobs that are whole here.
    pub(in crate::agent) complete_blobs: &'a watch::Sender<HashSet<Digest>>,
}

/// The blobs of one image in flight.
pub(in crate::agent) struct Swarm<'a> {
    blob_fetcher: Arc<BlobFetcher>,
    reference: &'a Reference,
    pin: &'a Pin,
    progress: &'a Progress,
    reservation: &'a Reservation,
    complete_blobs: &'a watch::Sender<HashSet<Digest>>,
    shared: Arc<SwarmShared>,
    tasks: JoinSet<TaskResult>,
    /// Blobs that are not started yet.
    queued: VecDeque<Descriptor>,
    /// Most blobs in flight at a time.
    max_downloads: usize,
    active: HashMap<Digest, ActiveBlob>,
    requests: HashMap<PieceRequestId, (PeerId, Digest, AbortHandle)>,
    followed_providers: HashMap<(PeerId, Digest), AbortHandle>,
    fetched: Vec<FetchedBlob>,
    /// When to read the providers again; `None` if no refresh is due.
    refresh_at: Option<Instant>,
    claims: Arc<ClaimCoordinator>,
    /// `None` while this node has no zone.
    zone_election: Option<ZoneElection>,
}

/// A blob in flight.
struct ActiveBlob {
    blob: Descriptor,
    stage: BlobStage,
    attempts: Attempts,
    /// Bytes that were reported as written.
    written: u64,
    /// Bytes from peers of this node's zone.
    same_zone_bytes: u64,
    /// The last piece, growth of a hash chain, or start of the download.
    last_progress: Instant,
}

enum BlobStage {
    /// The store stages the blob, or waits for another writer.
    Preparing,
    Fetching(FetchingStage),
    /// All pieces are here and verified.
    Committing(Arc<BlobDownload>),
}

struct FetchingStage {
    download: Arc<BlobDownload>,
    /// Peers with a pending request for the hash chain, and the time of the request.
    chain_requests: HashMap<PeerId, Instant>,
    /// Peers without a usable hash chain, and the time of the next request to each.
    no_chain_until: HashMap<PeerId, Instant>,
    /// A task verifies stored pieces.
    is_verifying: bool,
    /// Senders of pieces that did not match the hash chain. Some of them have an open dispute.
    accused_peers: HashSet<PeerId>,
    /// Number of open disputes.
    open_disputes: usize,
}

impl FetchingStage {
    fn new(download: Arc<BlobDownload>) -> Self {
        Self {
            download,
            chain_requests: HashMap::new(),
            no_chain_until: HashMap::new(),
            is_verifying: false,
            accused_peers: HashSet::new(),
            open_disputes: 0,
        }
    }
}

impl<'a> Swarm<'a> {
    pub(in crate::agent) fn new(
        blob_fetcher: &Arc<BlobFetcher>,
        claims: &Arc<ClaimCoordinator>,
        job: FetchJob<'a>,
        max_downloads: usize,
    ) -> Self {
        let FetchJob { reference, image_digest, pin, progress, reservation, complete_blobs } = job;
        let (zone, buffer_permits) = (blob_fetcher.zone(), blob_fetcher.downloads.buffer_permits());
        let picker = PiecePicker::new(zone.clone(), rand::random());
        Self {
            blob_fetcher: Arc::clone(blob_fetcher),
            reference,
            pin,
            progress,
            reservation,
            complete_blobs,
            shared: Arc::new(SwarmShared { picker: Mutex::new(picker), piece_received: Notify::new(), buffer_permits }),
            tasks: JoinSet::new(),
            queued: VecDeque::new(),
            max_downloads: max_downloads.max(1),
            active: HashMap::new(),
            requests: HashMap::new(),
            followed_providers: HashMap::new(),
            fetched: Vec::new(),
            refresh_at: None,
            zone_election: zone.map(|zone| ZoneElection::new(claims.peer(), claims.node(), zone, image_digest, now())),
            claims: Arc::clone(claims),
        }
    }

    /// Fetches these blobs. Blobs that are here already are only pinned.
    ///
    /// # Errors
    /// [`RecoverError`] of the first blob that failed. The pieces of the other blobs stay for a
    /// retry.
    pub(in crate::agent) async fn fetch(
        mut self,
        blobs: impl Iterator<Item = &Descriptor>,
    ) -> Result<Vec<FetchedBlob>, RecoverError> {
        self.queued = blobs.cloned().collect();
        let mut inventory_changes = self.blob_fetcher.inventory.changes();
        let mut report = tokio::time::interval(REPORT_INTERVAL);
        report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.start_queued();
            self.update_zone_leader();
            self.send_requests();
            if self.active.is_empty() && self.queued.is_empty() {
                return Ok(std::mem::take(&mut self.fetched));
            }
            self.fail_if_stalled()?;
            let election_wake_at = self.zone_election.as_ref().and_then(ZoneElection::wake_at);
            let wake_at =
                self.shared.picker().wake_at().into_iter().chain(self.refresh_at).chain(election_wake_at).min();
            tokio::select! {
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.handle(done)?,
                    // A bug of the agent: the supervisor gets the panic.
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_) => {}
                },
                () = self.shared.piece_received.notified() => self.advance_all(),
                Ok(()) = inventory_changes.changed() => self.refresh_within(REFRESH_DELAY),
                () = sleep_until(wake_at) => if self.refresh_at.is_some_and(|at| at <= now()) {
                    self.refresh_at = None;
                    self.refresh_providers();
                },
                _ = report.tick() => {
                    self.report_progress();
                    self.request_hash_chains();
                }
            }
        }
    }

    /// Starts queued blobs up to the limit of blobs in flight.
    fn start_queued(&mut self) {
        while self.active.len() < self.max_downloads
            && let Some(blob) = self.queued.pop_front()
        {
            let attempts = Attempts::new(blob.digest);
            self.spawn_prepare(&blob);
            let active_blob = ActiveBlob {
                stage: BlobStage::Preparing,
                attempts,
                written: 0,
                same_zone_bytes: 0,
                last_progress: now(),
                blob,
            };
            self.active.insert(active_blob.blob.digest, active_blob);
        }
    }

    /// Follows and unfollows providers, and sends requests, as the picker decides.
    fn send_requests(&mut self) {
        let now = now();
        let follow_changes = self.shared.picker().take_follow_changes(now);
        for change in follow_changes {
            match change {
                FollowChange::Follow { peer, digest } => self.spawn_follow(peer, digest),
                FollowChange::Unfollow { peer, digest } => {
                    self.followed_providers.remove(&(peer, digest)).iter().for_each(AbortHandle::abort);
                }
            }
        }
        // The picker has at most this many requests in flight.
        for _ in 0..MAX_IN_FLIGHT {
            let Some(request) = self.shared.picker().next_request(now) else { break };
            self.spawn_request(request);
        }
        let superseded = self.shared.picker().take_cancellations();
        for id in superseded {
            if let Some((_, _, task)) = self.requests.remove(&id) {
                task.abort();
            }
        }
    }

    /// Pieces have arrived, so some blobs may be complete, or have pieces to verify.
    fn advance_all(&mut self) {
        let digests: Vec<_> = self.active.keys().copied().collect();
        digests.into_iter().for_each(|digest| self.advance(digest));
    }

    /// Starts the next step of a blob: the commit, or a verification.
    fn advance(&mut self, digest: Digest) {
        let Some(active_blob) = self.active.get_mut(&digest) else { return };
        let BlobStage::Fetching(fetching) = &mut active_blob.stage else { return };
        let download = Arc::clone(&fetching.download);
        if let Some(proof) = download.proof() {
            active_blob.stage = BlobStage::Committing(Arc::clone(&download));
            self.spawn_commit(download, proof);
        } else if !fetching.is_verifying
            && fetching.open_disputes == 0
            && download.hash_chain().is_some()
            && !download.unverified().is_empty()
        {
            fetching.is_verifying = true;
            self.spawn_verification(download);
        } else if !fetching.is_verifying && download.hash_chain().is_none() {
            let has_single_provider = self.blob_fetcher.providers(&active_blob.attempts).len() == 1;
            if download.next_prefix_check(has_single_provider).is_some() {
                fetching.is_verifying = true;
                self.spawn_prefix_checks(download, has_single_provider);
            }
        }
    }

    fn report_progress(&mut self) {
        for active_blob in self.active.values_mut() {
            let (download, is_chain_progressing) = match &active_blob.stage {
                BlobStage::Preparing => continue,
                BlobStage::Fetching(FetchingStage { download, chain_requests, .. }) => {
                    (download, download.record_prefix_progress(chain_requests, now()))
                }
                BlobStage::Committing(download) => (download, false),
            };
            let from = download.bytes_by_peer();
            let received = from.values().sum::<u64>().min(active_blob.blob.size);
            if received > active_blob.written || is_chain_progressing {
                active_blob.last_progress = now();
            }
            if let Some(election) = &mut self.zone_election {
                let is_same_zone =
                    |peer: &PeerId| election.is_own_zone(self.blob_fetcher.inventory.zone_of(*peer).as_ref());
                let same_zone_bytes: u64 =
                    from.iter().filter(|(peer, _)| is_same_zone(peer)).map(|(_, bytes)| bytes).sum();
                if same_zone_bytes > std::mem::replace(&mut active_blob.same_zone_bytes, same_zone_bytes) {
                    election.leader().record_zone_progress(now());
                }
            }
            self.progress.update_blob(active_blob.blob.digest, received, from.into_keys());
            // The file system counts these bytes from now on.
            self.reservation.record_written(received.saturating_sub(active_blob.written));
            active_blob.written = active_blob.written.max(received);
        }
    }

    /// Fails when a blob cannot be completed: no provider remains, or no piece arrived for
    /// [`STALL_TIMEOUT`].
    fn fail_if_stalled(&mut self) -> Result<(), RecoverError> {
        let now = now();
        // This node does not lead its zone yet, and will request from other zones later.
        let is_waiting = self.zone_election.as_mut().is_some_and(|election| !election.leader().update_is_leading(now));
        let is_hopeless = |active_blob: &&mut ActiveBlob| {
            let BlobStage::Fetching(fetching) = &active_blob.stage else { return false };
            let digest = active_blob.blob.digest;
            let is_in_flight =
                fetching.is_verifying || self.requests.values().any(|(_, requested, _)| *requested == digest);
            let awaits_chain = !fetching.chain_requests.is_empty() || fetching.open_disputes > 0;
            let is_late = !is_waiting && now.saturating_duration_since(active_blob.last_progress) > STALL_TIMEOUT;
            !is_in_flight
                && (is_late || (!awaits_chain && self.blob_fetcher.providers(&active_blob.attempts).is_empty()))
        };
        let Some(active_blob) = self.active.values_mut().find(is_hopeless) else { return Ok(()) };
        // The blob stays in `active`, so its download is closed with the others.
        let mut attempts = std::mem::replace(&mut active_blob.attempts, Attempts::new(active_blob.blob.digest));
        if let BlobStage::Fetching(FetchingStage { chain_requests, .. }) = &active_blob.stage {
            for (peer, since) in chain_requests {
                let seconds = now.saturating_duration_since(*since).as_secs();
                attempts.record(*peer, FetchError::Stalled { peer: *peer, digest: active_blob.blob.digest, seconds });
            }
        }
        Err(attempts.into_error())
    }
}

impl Drop for Swarm<'_> {
    fn drop(&mut self) {
        for active_blob in self.active.values() {
            if let BlobStage::Fetching(FetchingStage { download, .. }) | BlobStage::Committing(download) =
                &active_blob.stage
            {
                // Followers see the end of the download.
                self.blob_fetcher.downloads.remove(download);
            }
        }
    }
}
