//! Who may have a blob, or a list of its states, and what is made of it when they fail.

use std::time::Duration;

use tokio::task::AbortHandle;

use super::{Coming, Stage, Swarm, now};
use crate::agent::bring::Attempts;
use crate::agent::recover_error::RecoverError;
use crate::decide::pieces::Candidate;
use crate::decide::trust::Standing;
use crate::model::PeerId;
use crate::oci::Digest;
use crate::ports::FetchError;

/// A node that is fetching a blob has a list of its states, and a piece, within about so long.
const LOOK_AGAIN: Duration = Duration::from_millis(500);

/// A list that has not come by then is asked of another one too, of so many at most. A holder that makes it needs a second for each 1.8 GB.
const LIST_PATIENCE: Duration = Duration::from_secs(2);
const MAX_LISTING: usize = 3;

impl Swarm<'_> {
    /// Whoever has, or is fetching, any of the blobs.
    pub(super) fn look_around(&mut self) {
        let digests: Vec<_> = self.coming.keys().copied().collect();
        for digest in digests {
            self.tell_candidates(digest);
            self.ask_for_list(digest);
        }
        self.learn_zone();
    }

    /// Soon, not at once: what changes comes in bursts.
    pub(super) fn look_again_in(&mut self, wait: Duration) {
        let at = now() + wait;
        self.look_again = Some(self.look_again.map_or(at, |before| before.min(at)));
    }

    /// The pool asks nobody for a blob whose pieces did not fit, until it is known why.
    pub(super) fn tell_candidates(&self, digest: Digest) {
        let Some(Coming { stage: Stage::Fetching(fetching), attempts, .. }) = self.coming.get(&digest) else { return };
        let mut candidates = self.candidates(attempts);
        candidates.retain(|candidate| !fetching.accused.contains(&candidate.peer));
        self.shared.pool().candidates(digest, &candidates);
    }

    /// Who may have it, but those who showed that they do not.
    pub(super) fn candidates(&self, attempts: &Attempts) -> Vec<Candidate> {
        let known = self.bring.sources(attempts);
        let (trust, now) = (self.bring.trust(), now());
        let standing = |peer| match trust.standing(peer, now) {
            Standing::Good => 0,
            Standing::Troubled(_) => 1,
            Standing::Lying => 2,
        };
        known
            .into_iter()
            .map(|source| Candidate {
                peer: source.peer,
                zone: source.zone,
                whole: source.whole,
                standing: standing(source.peer),
            })
            .collect()
    }

    pub(super) fn ask_for_lists(&mut self) {
        let digests: Vec<_> = self.coming.keys().copied().collect();
        digests.into_iter().for_each(|digest| self.ask_for_list(digest));
    }

    /// A list is wanted as soon as there is somebody who may have one; of another one too when it does not come soon.
    pub(super) fn ask_for_list(&mut self, digest: Digest) {
        let now = now();
        let Some(Coming { stage: Stage::Fetching(fetching), attempts, .. }) = self.coming.get(&digest) else { return };
        let patient = fetching.listing.values().any(|since| now.saturating_duration_since(*since) < LIST_PATIENCE);
        if patient || fetching.listing.len() >= MAX_LISTING || fetching.incoming.list().is_some() {
            return;
        }
        let mut candidates = self.candidates(attempts);
        let is_free = |peer: &PeerId| {
            !fetching.listing.contains_key(peer) && fetching.listless.get(peer).is_none_or(|until| *until <= now)
        };
        candidates.retain(|candidate| is_free(&candidate.peer));
        // Whole ones can always make one; the others tell theirs, once they have it.
        candidates.sort_by_key(|candidate| (candidate.standing, !candidate.whole, rand::random::<u32>()));
        let Some(Candidate { peer, .. }) = candidates.first() else { return };
        let (peer, cut) = (*peer, fetching.incoming.cut());
        if let Some(Coming { stage: Stage::Fetching(fetching), .. }) = self.coming.get_mut(&digest) {
            fetching.listing.insert(peer, now);
            self.spawn_list(peer, digest, cut);
        }
    }

    /// A peer failed to do something about a blob. One that is fetching it itself may have nothing of it yet, or may have given up and begin
    /// again; and who is busy is asked again: these are no failures.
    ///
    /// # Errors
    /// When it was not the peer but our own store.
    pub(super) fn note(&mut self, digest: Digest, peer: PeerId, error: FetchError) -> Result<(), RecoverError> {
        self.follows.remove(&(peer, digest)).iter().for_each(AbortHandle::abort);
        self.shared.pool().loses(peer, digest);
        let is_early = matches!(error, FetchError::Absent { .. }) && self.bring.holders.is_fetching(peer, digest);
        if is_early || matches!(error, FetchError::Busy { .. }) {
            self.look_again_in(LOOK_AGAIN);
            return Ok(());
        }
        let Some(coming) = self.coming.get_mut(&digest) else { return Ok(()) };
        let is_away = matches!(
            error,
            FetchError::Unreachable { .. } | FetchError::NotAdmitted { .. } | FetchError::Stalled { .. }
        );
        let until = self.bring.note(&mut coming.attempts, peer, error)?;
        // Who lies about one blob, or has lost it, may have the others.
        if let Some(until) = until.filter(|_| is_away) {
            self.shared.pool().forget(peer, until);
        }
        self.tell_candidates(digest);
        Ok(())
    }
}
