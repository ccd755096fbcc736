//! The missing blobs of one image, in pieces, from everybody who has some of them.
//!
//! Which piece is asked of whom is decided in [`crate::decide::piece_picker`]; here its orders are carried out, each in a task of its own, so that
//! hashing and writing spread over the cores. What is here is served while the rest comes ([`Underway`]). Not here: documents, which
//! come whole ([`super::bring`]), and who may be helped.

mod dispute;
mod download_sink;
mod providers;
mod tasks;
#[cfg(test)]
mod tests;
mod zone_election;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};

use crate::agent::recovery::downloads::blob_download::BlobDownload;
use self::tasks::TaskResult;
use self::zone_election::ZoneElection;
use crate::agent::recovery::blob_fetcher::{Attempts, BlobFetcher, FetchedBlob};
use crate::agent::recovery::claim_coordinator::ClaimCoordinator;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::disk_reservations::Reservation;
use crate::decide::piece_picker::{FollowChange, MAX_IN_FLIGHT, PiecePicker, PieceRequestId};
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Reference};
use crate::ports::{FetchError, Pin};

/// Without a piece for so long, and with nobody who could be asked for one, a recovery ends; its own back-off then takes over, and finds
/// what has come. As long as peers that are busy were waited for before there were pieces.
const STALL_TIMEOUT: Duration = Duration::from_secs(30);

/// What changes in the inventory is gathered for so long.
const REFRESH_DELAY: Duration = Duration::from_millis(100);

/// Who had no list is asked for one again after so long.
const HASH_CHAIN_RETRY: Duration = Duration::from_secs(1);

/// How often whoever watches is told how far it is.
const REPORT_INTERVAL: Duration = Duration::from_millis(100);

/// What the tasks of one swarm share.
struct SwarmShared {
    picker: Mutex<PiecePicker>,
    /// A piece has come.
    piece_received: Notify,
    /// Pieces that may wait in memory because others write at their place; this node's, not this image's.
    buffer_permits: Arc<Semaphore>,
}

impl SwarmShared {
    fn picker(&self) -> MutexGuard<'_, PiecePicker> {
        self.picker.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock that tests pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// What the blobs are for.
pub(in crate::agent) struct FetchJob<'a> {
    /// The image's name.
    pub(in crate::agent) reference: &'a Reference,
    /// Its index or manifest.
    pub(in crate::agent) image_digest: Digest,
    /// Holds what has come.
    pub(in crate::agent) pin: &'a Pin,
    /// Is told how far it is.
    pub(in crate::agent) progress: &'a Progress,
    /// The room that was set aside.
    pub(in crate::agent) reservation: &'a Reservation,
    /// Is told of each blob that is whole here.
    pub(in crate::agent) complete_blobs: &'a watch::Sender<HashSet<Digest>>,
}

/// One image's blobs on their way.
pub(in crate::agent) struct Swarm<'a> {
    blob_fetcher: Arc<BlobFetcher>,
    reference: &'a Reference,
    pin: &'a Pin,
    progress: &'a Progress,
    reservation: &'a Reservation,
    complete_blobs: &'a watch::Sender<HashSet<Digest>>,
    shared: Arc<SwarmShared>,
    tasks: JoinSet<TaskResult>,
    /// Blobs that nothing was done about yet.
    queued: VecDeque<Descriptor>,
    /// Blobs that may be under way at a time.
    max_downloads: usize,
    active: HashMap<Digest, ActiveBlob>,
    requests: HashMap<PieceRequestId, (PeerId, Digest, AbortHandle)>,
    followed_providers: HashMap<(PeerId, Digest), AbortHandle>,
    fetched: Vec<FetchedBlob>,
    /// When to ask those again who had nothing yet.
    refresh_at: Option<Instant>,
    claims: Arc<ClaimCoordinator>,
    /// Where this node's zone is known.
    zone_election: Option<ZoneElection>,
}

/// A blob under way.
struct ActiveBlob {
    blob: Descriptor,
    stage: BlobStage,
    attempts: Attempts,
    /// Bytes that were reported as written.
    written: u64,
    /// Bytes that came from this node's zone.
    same_zone_bytes: u64,
    /// When some of it last came, or of its list, or its place was made.
    last_progress: Instant,
}

enum BlobStage {
    /// Its place in the store is being made, or waited for.
    Preparing,
    Fetching(FetchingStage),
    /// All of it is here and proved.
    Committing(Arc<BlobDownload>),
}

struct FetchingStage {
    download: Arc<BlobDownload>,
    /// Who was asked for a list and has not answered, since when.
    chain_requests: HashMap<PeerId, Instant>,
    /// Who has no list for us now; until when it is not asked again.
    no_chain_until: HashMap<PeerId, Instant>,
    /// Pieces are being compared with the list.
    is_verifying: bool,
    /// Whose pieces did not fit; it is being found out who is wrong, of some of them.
    accused_peers: HashSet<PeerId>,
    /// How many of them.
    open_disputes: usize,
}

impl FetchingStage {
    fn new(incoming: Arc<BlobDownload>) -> Self {
        Self {
            download: incoming,
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
        at_once: usize,
    ) -> Self {
        let FetchJob { reference, image_digest: root, pin, progress, reservation: room, complete_blobs: here } = job;
        let (zone, waiting) = (blob_fetcher.zone(), blob_fetcher.downloads.buffer_permits());
        let pool = PiecePicker::new(zone.clone(), rand::random());
        Self {
            blob_fetcher: Arc::clone(blob_fetcher),
            reference,
            pin,
            progress,
            reservation: room,
            complete_blobs: here,
            shared: Arc::new(SwarmShared {
                picker: Mutex::new(pool),
                piece_received: Notify::new(),
                buffer_permits: waiting,
            }),
            tasks: JoinSet::new(),
            queued: VecDeque::new(),
            max_downloads: at_once.max(1),
            active: HashMap::new(),
            requests: HashMap::new(),
            followed_providers: HashMap::new(),
            fetched: Vec::new(),
            refresh_at: None,
            zone_election: zone.map(|zone| ZoneElection::new(claims.peer(), claims.node(), zone, root, now())),
            claims: Arc::clone(claims),
        }
    }

    /// Brings these blobs here, or says why one of them does not come. Those that are here already are held.
    ///
    /// # Errors
    /// [`RecoverError`]. What has come of the others stays for a later try.
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
            let zones = self.zone_election.as_ref().and_then(ZoneElection::wake_at);
            let wake = self.shared.picker().wake_at().into_iter().chain(self.refresh_at).chain(zones).min();
            tokio::select! {
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.handle(done)?,
                    // A bug of ours: let the supervisor see it.
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_) => {}
                },
                () = self.shared.piece_received.notified() => self.advance_all(),
                Ok(()) = inventory_changes.changed() => self.refresh_within(REFRESH_DELAY),
                () = sleep_until_some(wake) => if self.refresh_at.is_some_and(|at| at <= now()) {
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

    /// Begins with as many blobs as may be under way.
    fn start_queued(&mut self) {
        while self.active.len() < self.max_downloads
            && let Some(blob) = self.queued.pop_front()
        {
            let attempts = Attempts::new(blob.digest);
            self.spawn_prepare(&blob);
            let coming = ActiveBlob {
                stage: BlobStage::Preparing,
                attempts,
                written: 0,
                same_zone_bytes: 0,
                last_progress: now(),
                blob,
            };
            self.active.insert(coming.blob.digest, coming);
        }
    }

    /// Follows whom the pool wants to hear, and asks what it wants asked.
    fn send_requests(&mut self) {
        let now = now();
        let neighbors = self.shared.picker().take_follow_changes(now);
        for neighbor in neighbors {
            match neighbor {
                FollowChange::Follow { peer, digest } => self.spawn_follow(peer, digest),
                FollowChange::Unfollow { peer, digest } => {
                    self.followed_providers.remove(&(peer, digest)).iter().for_each(AbortHandle::abort);
                }
            }
        }
        // As many as a pool has under way at most.
        for _ in 0..MAX_IN_FLIGHT {
            let Some(ask) = self.shared.picker().next_request(now) else { break };
            self.spawn_request(ask);
        }
        let superseded = self.shared.picker().take_cancellations();
        for ask in superseded {
            if let Some((_, _, task)) = self.requests.remove(&ask) {
                task.abort();
            }
        }
    }

    /// Pieces have come: some blobs may be whole now, or have something to be checked.
    fn advance_all(&mut self) {
        let digests: Vec<_> = self.active.keys().copied().collect();
        digests.into_iter().for_each(|digest| self.advance(digest));
    }

    /// What can be done next about a blob.
    fn advance(&mut self, digest: Digest) {
        let Some(coming) = self.active.get_mut(&digest) else { return };
        let BlobStage::Fetching(fetching) = &mut coming.stage else { return };
        let incoming = Arc::clone(&fetching.download);
        if let Some(proof) = incoming.proof() {
            coming.stage = BlobStage::Committing(Arc::clone(&incoming));
            self.spawn_commit(incoming, proof);
        } else if !fetching.is_verifying
            && fetching.open_disputes == 0
            && incoming.hash_chain().is_some()
            && !incoming.unverified().is_empty()
        {
            fetching.is_verifying = true;
            self.spawn_verification(incoming);
        } else if !fetching.is_verifying && incoming.hash_chain().is_none() {
            let is_alone = self.blob_fetcher.providers(&coming.attempts).len() == 1;
            if incoming.next_prefix_check(is_alone).is_some() {
                fetching.is_verifying = true;
                self.spawn_prefix_checks(incoming, is_alone);
            }
        }
    }

    fn report_progress(&mut self) {
        for coming in self.active.values_mut() {
            let (incoming, list_gets_on) = match &coming.stage {
                BlobStage::Preparing => continue,
                BlobStage::Fetching(FetchingStage { download: incoming, chain_requests: listing, .. }) => {
                    (incoming, incoming.record_prefix_progress(listing, now()))
                }
                BlobStage::Committing(incoming) => (incoming, false),
            };
            let from = incoming.bytes_by_peer();
            let came = from.values().sum::<u64>().min(coming.blob.size);
            if came > coming.written || list_gets_on {
                coming.last_progress = now();
            }
            if let Some(zones) = &mut self.zone_election {
                let ours = |peer: &PeerId| zones.is_own_zone(self.blob_fetcher.inventory.zone_of(*peer).as_ref());
                let near: u64 = from.iter().filter(|(peer, _)| ours(peer)).map(|(_, bytes)| bytes).sum();
                if near > std::mem::replace(&mut coming.same_zone_bytes, near) {
                    zones.leader().record_zone_progress(now());
                }
            }
            self.progress.update_blob(coming.blob.digest, came, from.into_keys());
            // From here on the file system counts it.
            self.reservation.record_written(came.saturating_sub(coming.written));
            coming.written = coming.written.max(came);
        }
    }

    /// Fails when nothing can come any more: nobody is left who could send a blob, or nobody sends anything for long.
    fn fail_if_stalled(&mut self) -> Result<(), RecoverError> {
        let now = now();
        // Another zone will be asked, and is not yet.
        let is_waiting = self.zone_election.as_mut().is_some_and(|zones| !zones.leader().update_is_leading(now));
        let is_hopeless = |coming: &&mut ActiveBlob| {
            let BlobStage::Fetching(fetching) = &coming.stage else { return false };
            let digest = coming.blob.digest;
            let is_asked = fetching.is_verifying || self.requests.values().any(|(_, asked, _)| *asked == digest);
            let is_asking = !fetching.chain_requests.is_empty() || fetching.open_disputes > 0;
            let is_late = !is_waiting && now.saturating_duration_since(coming.last_progress) > STALL_TIMEOUT;
            !is_asked && (is_late || (!is_asking && self.blob_fetcher.providers(&coming.attempts).is_empty()))
        };
        let Some(coming) = self.active.values_mut().find(is_hopeless) else { return Ok(()) };
        // The blob stays among those that are coming, so that it is closed with them.
        let mut attempts = std::mem::replace(&mut coming.attempts, Attempts::new(coming.blob.digest));
        if let BlobStage::Fetching(FetchingStage { chain_requests: listing, .. }) = &coming.stage {
            for (peer, since) in listing {
                let seconds = now.saturating_duration_since(*since).as_secs();
                attempts.record(*peer, FetchError::Stalled { peer: *peer, digest: coming.blob.digest, seconds });
            }
        }
        Err(attempts.into_error())
    }
}

impl Drop for Swarm<'_> {
    fn drop(&mut self) {
        for coming in self.active.values() {
            if let BlobStage::Fetching(FetchingStage { download: incoming, .. }) | BlobStage::Committing(incoming) =
                &coming.stage
            {
                // Whoever follows is told that no more comes.
                self.blob_fetcher.downloads.remove(incoming);
            }
        }
    }
}

/// Until then; for ever when there is no such moment.
async fn sleep_until_some(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
