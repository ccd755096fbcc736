//! What a swarm does at the same time, and what follows when it is done.

use std::sync::Arc;

use super::incoming::{Checked, Incoming};
use super::lists::{Verdict, settle};
use super::sink::Sink;
use super::{Coming, Fetching, LISTLESS, Stage, Swarm, now};
use crate::agent::bring::{Brought, Prepared};
use crate::agent::recover_error::RecoverError;
use crate::decide::pieces::{Ask, AskId, End};
use crate::model::{Availability, NodeName, PeerId};
use crate::oci::{Chain, Cut, Descriptor, Digest, State, Verified, VerifyError};
use crate::ports::{ClaimError, FetchError, Remembered, StoreError};

/// Something has ended.
pub(super) enum Done {
    Prepared(Digest, Result<Prepared, RecoverError>),
    Asked(AskId, Result<(), FetchError>),
    Followed(PeerId, Digest, FetchError),
    Listed(PeerId, Digest, Result<Chain, FetchError>),
    Checked(Digest, Result<Vec<(u32, Option<PeerId>)>, StoreError>),
    Settled(PeerId, Digest, u32, Verdict),
    Committed(Digest, Result<(), StoreError>),
    Claimed(Result<Option<NodeName>, ClaimError>),
}

impl Swarm<'_> {
    pub(super) fn spawn_prepare(&mut self, blob: &Descriptor) {
        let (bring, blob) = (Arc::clone(&self.bring), blob.clone());
        let (reference, pin) = (self.reference.clone(), self.pin.clone());
        self.tasks.spawn(async move {
            let prepared = bring.prepare(&reference, &blob, &pin).await;
            Done::Prepared(blob.digest, prepared)
        });
    }

    pub(super) fn spawn_follow(&mut self, peer: PeerId, digest: Digest) {
        let Some(incoming) = self.incoming(digest) else { return };
        let (fetcher, shared) = (Arc::clone(&self.bring.fetcher), Arc::clone(&self.shared));
        let task = self.tasks.spawn(async move {
            let followed = async {
                let mut following = fetcher.follow(peer, digest, incoming.cut()).await?;
                loop {
                    let word = following.next().await?;
                    shared.pool().hears(peer, digest, &word, now());
                    shared.moved.notify_one();
                    if word == Availability::Whole {
                        // There is no more to hear. The task lives on so that the pool's neighbour stays one.
                        std::future::pending::<()>().await;
                    }
                }
            };
            let Err::<std::convert::Infallible, _>(error) = followed.await;
            Done::Followed(peer, digest, error)
        });
        self.follows.insert((peer, digest), task);
    }

    pub(super) fn spawn_ask(&mut self, ask: Ask) {
        let Ask { id, order } = ask;
        let (peer, digest) = (order.peer, order.digest);
        let Some(incoming) = self.incoming(digest) else {
            return self.shared.pool().ends(id, End::Failed, now());
        };
        let fetcher = Arc::clone(&self.bring.fetcher);
        let mut sink = Sink::new(Arc::clone(&self.shared), incoming, id, peer);
        let task = self.tasks.spawn(async move {
            let fetched = fetcher.pieces(&order, &mut sink).await;
            Done::Asked(id, fetched)
        });
        self.asks.insert(id, (peer, digest, task));
    }

    pub(super) fn spawn_list(&mut self, peer: PeerId, digest: Digest, cut: Cut) {
        let Some(incoming) = self.incoming(digest) else { return };
        let (fetcher, shared) = (Arc::clone(&self.bring.fetcher), Arc::clone(&self.shared));
        self.tasks.spawn(async move {
            let mut heard = |states: &[State]| {
                incoming.hears(peer, states);
                shared.moved.notify_one();
            };
            Done::Listed(peer, digest, fetcher.chain(peer, digest, cut, &mut heard).await)
        });
    }

    /// Compares senders' first pieces with what there is of a list.
    pub(super) fn spawn_try(&mut self, incoming: Arc<Incoming>, is_alone: bool) {
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let digest = incoming.blob().digest;
            while let Some(trial) = incoming.next_trial(is_alone) {
                match incoming.try_early(trial).await {
                    Ok(true) => shared.pool().fits(trial.sender, digest),
                    Ok(false) => shared.pool().doubts(trial.sender, digest, now()),
                    Err(error) => return Done::Checked(digest, Err(error)),
                }
            }
            Done::Checked(digest, Ok(Vec::new()))
        });
    }

    pub(super) fn spawn_check(&mut self, incoming: Arc<Incoming>) {
        let shared = Arc::clone(&self.shared);
        self.tasks.spawn(async move {
            let (mut wrong, digest) = (Vec::new(), incoming.blob().digest);
            for piece in incoming.unchecked() {
                match incoming.check(piece).await {
                    Ok(Checked::Fits(from)) => from.iter().for_each(|peer| shared.pool().fits(*peer, digest)),
                    Ok(Checked::Unfit(None)) => wrong.push((piece, None)),
                    // Before more is thrown away it is found out who is wrong.
                    Ok(Checked::Unfit(from)) => {
                        wrong.push((piece, from));
                        break;
                    }
                    Ok(Checked::Again) => break,
                    Err(error) => return Done::Checked(digest, Err(error)),
                }
                tokio::task::yield_now().await;
            }
            Done::Checked(digest, Ok(wrong))
        });
    }

    fn spawn_settle(&mut self, incoming: Arc<Incoming>, peer: PeerId, piece: u32) {
        let fetcher = Arc::clone(&self.bring.fetcher);
        self.tasks.spawn(async move {
            let digest = incoming.blob().digest;
            let Some((ours, author)) = incoming.list() else {
                return Done::Settled(peer, digest, piece, Verdict::Sender);
            };
            let settled = tokio::time::timeout(SETTLING, settle(&*fetcher, &incoming, &ours, author, peer)).await;
            let seconds = SETTLING.as_secs();
            let slow = |_| Verdict::NoAnswer(FetchError::Stalled { peer, digest, seconds });
            Done::Settled(peer, digest, piece, settled.unwrap_or_else(slow))
        });
    }

    pub(super) fn spawn_commit(&mut self, incoming: Arc<Incoming>, proof: Verified) {
        let remembered = Remembered { source: Some(self.reference.repository().clone()), children: Vec::new() };
        self.tasks.spawn(async move {
            let committed = incoming.staged().commit(proof, &remembered).await;
            Done::Committed(incoming.blob().digest, committed)
        });
    }

    pub(super) fn spawn_claim(&mut self, claim: Digest) {
        let (lead, reference) = (Arc::clone(&self.lead), self.reference.clone());
        self.tasks.spawn(async move { Done::Claimed(lead.claim(&reference, claim).await) });
    }

    fn incoming(&self, digest: Digest) -> Option<Arc<Incoming>> {
        match &self.coming.get(&digest)?.stage {
            Stage::Fetching(Fetching { incoming, .. }) => Some(Arc::clone(incoming)),
            Stage::Preparing | Stage::Committing(_) => None,
        }
    }

    /// What follows.
    ///
    /// # Errors
    /// When the image cannot come.
    pub(super) fn take(&mut self, done: Done) -> Result<(), RecoverError> {
        match done {
            Done::Prepared(digest, prepared) => self.prepared(digest, prepared?),
            Done::Asked(ask, result) => self.asked(ask, result)?,
            Done::Followed(peer, digest, error) => {
                self.note(digest, peer, error)?;
            }
            Done::Listed(peer, digest, listed) => self.listed(peer, digest, listed)?,
            Done::Checked(digest, checked) => self.checked(digest, checked)?,
            Done::Settled(peer, digest, piece, verdict) => self.settled(peer, digest, piece, verdict)?,
            Done::Committed(digest, committed) => self.committed(digest, committed)?,
            Done::Claimed(result) => {
                if let Some(zones) = &mut self.zones {
                    let holders = &self.bring.holders;
                    zones.claimed(result, |node| holders.peer_on(node), now());
                }
            }
        }
        Ok(())
    }

    fn prepared(&mut self, digest: Digest, prepared: Prepared) {
        let staged = match prepared {
            Prepared::Here(brought) => {
                self.coming.remove(&digest);
                self.have(brought);
                return;
            }
            Prepared::Staged(staged) => staged,
        };
        let Some(coming) = self.coming.get_mut(&digest) else { return };
        coming.moved = now();
        let incoming = Arc::new(Incoming::new(coming.blob.clone(), staged));
        let mut pool = self.shared.pool();
        pool.add(digest, incoming.cut());
        if incoming.list().is_some() {
            pool.lists(digest);
        }
        incoming.unchecked().into_iter().for_each(|piece| pool.hold(digest, piece));
        drop(pool);
        self.bring.underway.begin(&incoming);
        coming.stage = Stage::Fetching(Fetching::new(incoming));
        self.tell_candidates(digest);
        self.learn_zone();
        self.ask_for_list(digest);
        self.advance(digest);
    }

    fn asked(&mut self, ask: AskId, result: Result<(), FetchError>) -> Result<(), RecoverError> {
        // One that was taken back ended before it could be stopped.
        let Some((peer, digest, _)) = self.asks.remove(&ask) else { return Ok(()) };
        let how = match &result {
            Ok(()) => End::Done,
            Err(FetchError::Busy { .. }) => End::Busy,
            Err(_) => End::Failed,
        };
        self.shared.pool().ends(ask, how, now());
        match result {
            Ok(()) => {
                let Some(incoming) = self.incoming(digest) else { return Ok(()) };
                if incoming.from().contains_key(&peer) {
                    self.bring.trust().served(peer);
                }
            }
            Err(FetchError::Busy { .. }) => self.bring.metrics.peer_at_fault("busy"),
            Err(FetchError::Unfit { piece, .. }) => self.unfit(peer, digest, u32::try_from(piece).unwrap_or(u32::MAX)),
            Err(error) => self.note(digest, peer, error)?,
        }
        Ok(())
    }

    /// A piece does not fit: nothing more of this blob is asked of its sender until it is known who is wrong.
    fn unfit(&mut self, peer: PeerId, digest: Digest, piece: u32) {
        let Some(Coming { stage: Stage::Fetching(fetching), .. }) = self.coming.get_mut(&digest) else { return };
        let is_new = fetching.accused.insert(peer);
        let settle = is_new && fetching.settling < MAX_SETTLING;
        fetching.settling += usize::from(settle);
        let incoming = Arc::clone(&fetching.incoming);
        self.tell_candidates(digest);
        if settle {
            self.spawn_settle(incoming, peer, piece);
        }
    }

    fn settled(&mut self, peer: PeerId, digest: Digest, piece: u32, verdict: Verdict) -> Result<(), RecoverError> {
        let Some(Coming { stage: Stage::Fetching(fetching), .. }) = self.coming.get_mut(&digest) else {
            return Ok(());
        };
        fetching.settling -= 1;
        // Those that are not being asked about may show again what they have; so may all when the list was wrong.
        let is_last = fetching.settling == 0;
        let is_list_wrong = matches!(verdict, Verdict::Author(_) | Verdict::Both);
        fetching.accused.remove(&peer);
        if is_last || is_list_wrong {
            fetching.accused.clear();
        }
        let incoming = Arc::clone(&fetching.incoming);
        let author = incoming.list().and_then(|(_, author)| author);
        let is_adopted = match verdict {
            Verdict::Sender => self.convict(digest, peer, piece).map(|()| false)?,
            Verdict::NoAnswer(error) => self.note(digest, peer, error).map(|()| false)?,
            Verdict::Author(chain) => {
                incoming.adopt(chain, peer);
                author.map_or(Ok(()), |author| self.convict(digest, author, piece))?;
                true
            }
            Verdict::Both => {
                self.convict(digest, peer, piece)?;
                author.map_or(Ok(()), |author| self.convict(digest, author, piece))?;
                false
            }
        };
        if !is_adopted && incoming.discard(piece) {
            self.shared.pool().unfit(digest, piece);
        }
        self.tell_candidates(digest);
        self.advance(digest);
        Ok(())
    }

    /// A peer that holds the blob has lied, or its disk does. One that is fetching it may have been lied to itself: it is left alone, no more.
    fn convict(&mut self, digest: Digest, peer: PeerId, piece: u32) -> Result<(), RecoverError> {
        let piece = piece as usize;
        let error = match self.bring.holders.is_fetching(peer, digest) {
            true => FetchError::Unfit { peer, digest, piece },
            false => FetchError::Corrupt { peer, source: VerifyError::Piece { expected: digest, piece } },
        };
        self.note(digest, peer, error)
    }

    /// Whoever has no list for us may have pieces all the same.
    fn listed(&mut self, peer: PeerId, digest: Digest, listed: Result<Chain, FetchError>) -> Result<(), RecoverError> {
        let Some(Coming { stage: Stage::Fetching(fetching), .. }) = self.coming.get_mut(&digest) else {
            return Ok(());
        };
        fetching.listing.remove(&peer);
        fetching.incoming.hears_no_more(peer);
        fetching.listless.insert(peer, now() + LISTLESS);
        match listed {
            Ok(chain) if fetching.incoming.list().is_none() => {
                fetching.incoming.adopt(Arc::new(chain), peer);
                self.shared.pool().lists(digest);
            }
            // Another one was faster.
            Ok(_) => {}
            Err(FetchError::Busy { .. } | FetchError::Stalled { .. }) => {}
            Err(FetchError::Absent { .. }) if self.bring.holders.is_fetching(peer, digest) => {}
            Err(error) => self.note(digest, peer, error)?,
        }
        self.advance(digest);
        Ok(())
    }

    fn checked(
        &mut self,
        digest: Digest,
        checked: Result<Vec<(u32, Option<PeerId>)>, StoreError>,
    ) -> Result<(), RecoverError> {
        let wrong = checked.map_err(RecoverError::store("checking what was written"))?;
        let Some(Coming { stage: Stage::Fetching(fetching), .. }) = self.coming.get_mut(&digest) else {
            return Ok(());
        };
        fetching.checking = false;
        let incoming = Arc::clone(&fetching.incoming);
        for (piece, sender) in wrong {
            match sender {
                // One that cannot be asked about now is thrown away.
                Some(sender) if !fetching_accuses(&self.coming, digest, sender) => self.unfit(sender, digest, piece),
                Some(_) | None => {
                    incoming.discard(piece);
                    if !incoming.has(piece) {
                        self.shared.pool().unfit(digest, piece);
                    }
                }
            }
        }
        self.advance(digest);
        Ok(())
    }

    fn committed(&mut self, digest: Digest, committed: Result<(), StoreError>) -> Result<(), RecoverError> {
        committed.map_err(RecoverError::store("committing a blob"))?;
        self.report();
        let Some(coming) = self.coming.remove(&digest) else { return Ok(()) };
        if let Stage::Committing(incoming) = coming.stage {
            self.bring.underway.end(&incoming);
            if let Some((chain, _)) = incoming.list() {
                self.bring.fetcher.keep(chain);
            }
            self.have(Brought { descriptor: coming.blob, from: Some(incoming.from()) });
        }
        Ok(())
    }

    fn have(&mut self, brought: Brought) {
        self.here.send_if_modified(|here| here.insert(brought.descriptor.digest));
        self.brought.push(brought);
    }
}

/// Whether it is being found out already whether this sender is wrong.
fn fetching_accuses(coming: &std::collections::HashMap<Digest, Coming>, digest: Digest, sender: PeerId) -> bool {
    let accused = |coming: &Coming| match &coming.stage {
        Stage::Fetching(fetching) => fetching.accused.contains(&sender),
        Stage::Preparing | Stage::Committing(_) => false,
    };
    coming.get(&digest).is_some_and(accused)
}

/// Longest time in which it is found out who is wrong: two pieces and a list.
const SETTLING: std::time::Duration = std::time::Duration::from_secs(10);

/// Senders of one blob about whom it is found out at a time. With several, one that drips does not keep the others from being heard.
const MAX_SETTLING: usize = 4;
