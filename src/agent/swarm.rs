//! The missing blobs of one image, in pieces, from everybody who has some of them.
//!
//! Which piece is asked of whom is decided in [`crate::decide::pieces`]; here its orders are carried out, each in a task of its own, so that
//! hashing and writing spread over the cores. What is here is served while the rest comes ([`Underway`]). Not here: documents, which
//! come whole ([`super::bring`]), and who may be helped.

mod early;
mod incoming;
mod lists;
mod sink;
mod sources;
mod tasks;
#[cfg(test)]
mod tests;
mod underway;
mod zones;

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{AbortHandle, JoinSet};

use self::incoming::Incoming;
use self::tasks::Done;
pub use self::underway::Underway;
pub(super) use self::zones::Zones;
use super::bring::{Attempts, Bring, Brought};
use super::lead::Lead;
use super::progress::Progress;
use super::recover_error::RecoverError;
use crate::decide::pieces::{AskId, MAX_ASKS, Neighbour, Pool};
use crate::decide::reserve::Reservation;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Reference};
use crate::ports::{FetchError, Pin};

/// Without a piece for so long, and with nobody who could be asked for one, a recovery ends; its own back-off then takes over, and finds
/// what has come. As long as peers that are busy were waited for before there were pieces.
const STUCK: Duration = Duration::from_secs(30);

/// What changes in the inventory is gathered for so long.
const SETTLE: Duration = Duration::from_millis(100);

/// Who had no list is asked for one again after so long.
const LISTLESS: Duration = Duration::from_secs(1);

/// How often whoever watches is told how far it is.
const REPORT: Duration = Duration::from_millis(100);

/// What the tasks of one swarm share.
struct Shared {
    pool: Mutex<Pool>,
    /// A piece has come.
    moved: Notify,
    /// Pieces that may wait in memory because others write at their place; this node's, not this image's.
    waiting: Arc<Semaphore>,
}

impl Shared {
    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The clock that tests pause.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// What the blobs are for.
pub(super) struct Errand<'a> {
    /// The image's name.
    pub(super) reference: &'a Reference,
    /// Its index or manifest.
    pub(super) root: Digest,
    /// Holds what has come.
    pub(super) pin: &'a Pin,
    /// Is told how far it is.
    pub(super) progress: &'a Progress,
    /// The room that was set aside.
    pub(super) room: &'a Reservation,
    /// Is told of each blob that is whole here.
    pub(super) here: &'a watch::Sender<HashSet<Digest>>,
}

/// One image's blobs on their way.
pub(super) struct Swarm<'a> {
    bring: Arc<Bring>,
    reference: &'a Reference,
    pin: &'a Pin,
    progress: &'a Progress,
    room: &'a Reservation,
    here: &'a watch::Sender<HashSet<Digest>>,
    shared: Arc<Shared>,
    tasks: JoinSet<Done>,
    /// Blobs that nothing was done about yet.
    waiting: VecDeque<Descriptor>,
    /// Blobs that may be under way at a time.
    at_once: usize,
    coming: HashMap<Digest, Coming>,
    asks: HashMap<AskId, (PeerId, Digest, AbortHandle)>,
    follows: HashMap<(PeerId, Digest), AbortHandle>,
    brought: Vec<Brought>,
    /// When to ask those again who had nothing yet.
    look_again: Option<Instant>,
    lead: Arc<Lead>,
    /// Where this node's zone is known.
    zones: Option<Zones>,
}

/// A blob under way.
struct Coming {
    blob: Descriptor,
    stage: Stage,
    attempts: Attempts,
    /// Bytes that were reported as written.
    written: u64,
    /// Bytes that came from this node's zone.
    near: u64,
    /// When some of it last came, or of its list, or its place was made.
    moved: Instant,
}

enum Stage {
    /// Its place in the store is being made, or waited for.
    Preparing,
    Fetching(Fetching),
    /// All of it is here and proved.
    Committing(Arc<Incoming>),
}

struct Fetching {
    incoming: Arc<Incoming>,
    /// Who was asked for a list and has not answered, since when.
    listing: HashMap<PeerId, Instant>,
    /// Who has no list for us now; until when it is not asked again.
    listless: HashMap<PeerId, Instant>,
    /// Pieces are being compared with the list.
    checking: bool,
    /// Whose pieces did not fit; it is being found out who is wrong, of some of them.
    accused: HashSet<PeerId>,
    /// How many of them.
    settling: usize,
}

impl Fetching {
    fn new(incoming: Arc<Incoming>) -> Self {
        Self {
            incoming,
            listing: HashMap::new(),
            listless: HashMap::new(),
            checking: false,
            accused: HashSet::new(),
            settling: 0,
        }
    }
}

impl<'a> Swarm<'a> {
    pub(super) fn new(bring: &Arc<Bring>, lead: &Arc<Lead>, errand: Errand<'a>, at_once: usize) -> Self {
        let Errand { reference, root, pin, progress, room, here } = errand;
        let (zone, waiting) = (bring.zone(), bring.underway.waiting());
        let pool = Pool::new(zone.clone(), rand::random());
        Self {
            bring: Arc::clone(bring),
            reference,
            pin,
            progress,
            room,
            here,
            shared: Arc::new(Shared { pool: Mutex::new(pool), moved: Notify::new(), waiting }),
            tasks: JoinSet::new(),
            waiting: VecDeque::new(),
            at_once: at_once.max(1),
            coming: HashMap::new(),
            asks: HashMap::new(),
            follows: HashMap::new(),
            brought: Vec::new(),
            look_again: None,
            zones: lead.zones(zone, root),
            lead: Arc::clone(lead),
        }
    }

    /// Brings these blobs here, or says why one of them does not come. Those that are here already are held.
    ///
    /// # Errors
    /// [`RecoverError`]. What has come of the others stays for a later try.
    pub(super) async fn fetch(
        mut self,
        blobs: impl Iterator<Item = &Descriptor>,
    ) -> Result<Vec<Brought>, RecoverError> {
        self.waiting = blobs.cloned().collect();
        let mut known = self.bring.holders.changes();
        let mut report = tokio::time::interval(REPORT);
        report.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.prepare();
            self.mind_zones();
            self.ask();
            if self.coming.is_empty() && self.waiting.is_empty() {
                return Ok(std::mem::take(&mut self.brought));
            }
            self.check_stuck()?;
            let zones = self.zones.as_ref().and_then(Zones::wake_at);
            let wake = self.shared.pool().wake_at().into_iter().chain(self.look_again).chain(zones).min();
            tokio::select! {
                Some(done) = self.tasks.join_next() => match done {
                    Ok(done) => self.take(done)?,
                    // A bug of ours: let the supervisor see it.
                    Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                    Err(_) => {}
                },
                () = self.shared.moved.notified() => self.look(),
                Ok(()) = known.changed() => self.look_again_in(SETTLE),
                () = until(wake) => if self.look_again.is_some_and(|at| at <= now()) {
                    self.look_again = None;
                    self.look_around();
                },
                _ = report.tick() => {
                    self.report();
                    self.ask_for_lists();
                }
            }
        }
    }

    /// Begins with as many blobs as may be under way.
    fn prepare(&mut self) {
        while self.coming.len() < self.at_once
            && let Some(blob) = self.waiting.pop_front()
        {
            let attempts = Attempts::new(blob.digest);
            self.spawn_prepare(&blob);
            let coming = Coming { stage: Stage::Preparing, attempts, written: 0, near: 0, moved: now(), blob };
            self.coming.insert(coming.blob.digest, coming);
        }
    }

    /// Follows whom the pool wants to hear, and asks what it wants asked.
    fn ask(&mut self) {
        let now = now();
        let neighbours = self.shared.pool().neighbours(now);
        for neighbour in neighbours {
            match neighbour {
                Neighbour::Follow { peer, digest } => self.spawn_follow(peer, digest),
                Neighbour::Leave { peer, digest } => {
                    self.follows.remove(&(peer, digest)).iter().for_each(AbortHandle::abort);
                }
            }
        }
        // As many as a pool has under way at most.
        for _ in 0..MAX_ASKS {
            let Some(ask) = self.shared.pool().next(now) else { break };
            self.spawn_ask(ask);
        }
        let superseded = self.shared.pool().cancels();
        for ask in superseded {
            if let Some((_, _, task)) = self.asks.remove(&ask) {
                task.abort();
            }
        }
    }

    /// Pieces have come: some blobs may be whole now, or have something to be checked.
    fn look(&mut self) {
        let digests: Vec<_> = self.coming.keys().copied().collect();
        digests.into_iter().for_each(|digest| self.advance(digest));
    }

    /// What can be done next about a blob.
    fn advance(&mut self, digest: Digest) {
        let Some(coming) = self.coming.get_mut(&digest) else { return };
        let Stage::Fetching(fetching) = &mut coming.stage else { return };
        let incoming = Arc::clone(&fetching.incoming);
        if let Some(proof) = incoming.verified() {
            coming.stage = Stage::Committing(Arc::clone(&incoming));
            self.spawn_commit(incoming, proof);
        } else if !fetching.checking
            && fetching.settling == 0
            && incoming.list().is_some()
            && !incoming.unchecked().is_empty()
        {
            fetching.checking = true;
            self.spawn_check(incoming);
        } else if !fetching.checking && incoming.list().is_none() {
            let is_alone = self.bring.sources(&coming.attempts).len() == 1;
            if incoming.next_trial(is_alone).is_some() {
                fetching.checking = true;
                self.spawn_try(incoming, is_alone);
            }
        }
    }

    fn report(&mut self) {
        for coming in self.coming.values_mut() {
            let (incoming, list_gets_on) = match &coming.stage {
                Stage::Preparing => continue,
                Stage::Fetching(Fetching { incoming, listing, .. }) => (incoming, incoming.gets_on(listing, now())),
                Stage::Committing(incoming) => (incoming, false),
            };
            let from = incoming.from();
            let came = from.values().sum::<u64>().min(coming.blob.size);
            if came > coming.written || list_gets_on {
                coming.moved = now();
            }
            if let Some(zones) = &mut self.zones {
                let ours = |peer: &PeerId| zones.is_ours(self.bring.holders.zone_of(*peer).as_ref());
                let near: u64 = from.iter().filter(|(peer, _)| ours(peer)).map(|(_, bytes)| bytes).sum();
                if near > std::mem::replace(&mut coming.near, near) {
                    zones.crossing().came(now());
                }
            }
            self.progress.at(coming.blob.digest, came, from.into_keys());
            // From here on the file system counts it.
            self.room.written(came.saturating_sub(coming.written));
            coming.written = coming.written.max(came);
        }
    }

    /// Fails when nothing can come any more: nobody is left who could send a blob, or nobody sends anything for long.
    fn check_stuck(&mut self) -> Result<(), RecoverError> {
        let now = now();
        // Another zone will be asked, and is not yet.
        let is_waiting = self.zones.as_mut().is_some_and(|zones| !zones.crossing().may_cross(now));
        let is_hopeless = |coming: &&mut Coming| {
            let Stage::Fetching(fetching) = &coming.stage else { return false };
            let digest = coming.blob.digest;
            let is_asked = fetching.checking || self.asks.values().any(|(_, asked, _)| *asked == digest);
            let is_asking = !fetching.listing.is_empty() || fetching.settling > 0;
            let is_late = !is_waiting && now.saturating_duration_since(coming.moved) > STUCK;
            !is_asked && (is_late || (!is_asking && self.bring.sources(&coming.attempts).is_empty()))
        };
        let Some(coming) = self.coming.values_mut().find(is_hopeless) else { return Ok(()) };
        // The blob stays among those that are coming, so that it is closed with them.
        let mut attempts = std::mem::replace(&mut coming.attempts, Attempts::new(coming.blob.digest));
        if let Stage::Fetching(Fetching { listing, .. }) = &coming.stage {
            for (peer, since) in listing {
                let seconds = now.saturating_duration_since(*since).as_secs();
                attempts.failed(*peer, FetchError::Stalled { peer: *peer, digest: coming.blob.digest, seconds });
            }
        }
        Err(attempts.into_error())
    }
}

impl Drop for Swarm<'_> {
    fn drop(&mut self) {
        for coming in self.coming.values() {
            if let Stage::Fetching(Fetching { incoming, .. }) | Stage::Committing(incoming) = &coming.stage {
                // Whoever follows is told that no more comes.
                self.bring.underway.end(incoming);
            }
        }
    }
}

/// Until then; for ever when there is no such moment.
async fn until(moment: Option<Instant>) {
    match moment {
        Some(moment) => tokio::time::sleep_until(moment.into()).await,
        None => std::future::pending().await,
    }
}
