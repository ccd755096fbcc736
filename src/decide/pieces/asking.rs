//! What is asked next, and of whom.

use std::time::Instant;

use rand::Rng;

use super::blob::{Blob, Link, MAX_ASKERS};
use super::peers::Number;
use super::{Ask, AskId, Pool};
use crate::model::{MAX_CHOICE, Order};

/// Most asks under way in one pool: each is a stream here and one at a peer. Twenty neighbours with two each, and as many again.
pub const MAX_ASKS: usize = 80;

/// How long an ask should take at its peer's rate: long against the way there and back, short against waiting for a slow one.
const ASK_TIME: f64 = 0.1;

/// Most pieces of one ask, and bytes of one at a peer whose rate nobody can guess.
const MAX_MOST: usize = 16;
const FIRST_BYTES: u64 = 1 << 20;

/// Pieces offered to one that holds everything, or has what nobody else near has: with so many to choose from, it nearly always finds one that it has not sent.
const MAX_OFFER: usize = 32;
const _: () = assert!(MAX_OFFER <= MAX_CHOICE && MAX_MOST <= MAX_OFFER);

/// What is under way at all peers together: so many seconds' worth of what comes, and always so many asks. More would wait in queues, and what
/// waits there is decided on too early; with less, nodes stand idle that could serve.
const WINDOW: f64 = 0.2;
const LEAST_ASKS: usize = 8;

/// How many asks there always are when less comes than that part of the most that came: those that were asked have little time for us, and more of them
/// are asked until one has. Of 300 simulated nodes the last is done after 1.21 times the time that its link needs; after 1.25 to 1.28 with eight or ten asks
/// at all times, after 1.35 with twenty, whose answers come late and are decided on early.
const STARVED: f64 = 0.9;
const STARVED_ASKS: usize = 12;

/// Pieces of a blob that are asked of two at once: the very last.
const LAST: usize = 4;

/// What was asked, and what of it is still to come.
#[derive(Debug)]
pub(super) struct Asked {
    pub(super) peer: Number,
    pub(super) place: usize,
    /// What the peer may still choose.
    pub(super) choice: Vec<u32>,
    /// What it sends.
    pub(super) current: Option<u32>,
    /// How many it has still to begin.
    pub(super) left: u8,
    /// Bytes that are still to come.
    pub(super) bytes: u64,
    pub(super) brought_any: bool,
    /// When something came, or it was asked.
    pub(super) moved: Instant,
    /// It was silent for too long, and counts no longer as under way.
    pub(super) is_late: bool,
    /// Nobody else is asked for what it may choose.
    pub(super) is_reserved: bool,
}

impl Asked {
    /// What nobody else is asked for because of it.
    pub(super) fn owed(&self) -> impl Iterator<Item = u32> + '_ {
        let choice = if self.is_reserved { &self.choice[..] } else { &[] };
        self.current.iter().chain(choice).copied()
    }

    /// Others may be asked for what this one may still choose.
    pub(super) fn release(&mut self, blob: &mut Blob) {
        if std::mem::take(&mut self.is_reserved) {
            self.choice.iter().for_each(|piece| blob.expect_no_more(*piece));
        }
    }
}

/// A peer that could be asked, and when it would be done.
#[derive(Clone, Copy)]
struct Offer {
    peer: Number,
    seconds: f64,
}

impl Pool {
    /// What to ask now; to be called until there is nothing.
    pub fn next(&mut self, now: Instant) -> Option<Ask> {
        self.clock(now);
        self.notice_late(now);
        if self.asks.len() < MAX_ASKS && self.blobs.iter().any(|blob| blob.missing() > 0) {
            let usual = self.peers.usual_rate(now).unwrap_or(FIRST_BYTES as f64 / ASK_TIME);
            let ask = self.ask_free(usual, now).or_else(|| self.ask_again(usual, now));
            if ask.is_some() {
                return ask;
            }
        }
        self.wake_at = self.next_wake(now);
        None
    }

    /// When to call [`Pool::neighbours`] and [`Pool::next`] again though nothing happens: somebody is late then, or may be asked again.
    pub fn wake_at(&self) -> Option<Instant> {
        self.wake_at
    }

    fn next_wake(&self, now: Instant) -> Option<Instant> {
        if self.is_done() {
            return None;
        }
        let late = self.asks.values().filter(|asked| !asked.is_late).map(|asked| self.late_at(asked));
        late.chain(self.peers.wake_at(now)).chain(self.blobs.iter().filter_map(|blob| blob.wake_at(now))).min()
    }

    fn late_at(&self, asked: &Asked) -> Instant {
        let peer = self.peers.get(asked.peer);
        peer.moved.map_or(asked.moved, |moved| moved.max(asked.moved)) + peer.patience()
    }

    fn notice_late(&mut self, now: Instant) {
        let late = |asked: &Asked| !asked.is_late && self.late_at(asked) <= now;
        let late: Vec<_> = self.asks.iter().filter(|(_, asked)| late(asked)).map(|(id, _)| *id).collect();
        for id in late {
            let Some(asked) = self.asks.get_mut(&id) else { continue };
            asked.is_late = true;
            let blob = &mut self.blobs[asked.place];
            if asked.choice.len() > usize::from(asked.left) {
                asked.release(blob);
            }
            if let Some(link) = blob.link_of(asked.peer) {
                blob.set_vain(link, true);
            }
        }
    }

    /// Whether what is under way keeps the link busy.
    fn is_window_full(&self, now: Instant) -> bool {
        let punctual = self.asks.values().filter(|asked| !asked.is_late);
        let (asks, bytes) = punctual.fold((0, 0), |(asks, bytes), asked| (asks + 1, bytes + asked.bytes));
        let rate = self.rate.now(now).unwrap_or(0.0);
        let least = if rate < self.rate.most() * STARVED { STARVED_ASKS } else { LEAST_ASKS };
        asks >= least && bytes as f64 >= rate * WINDOW
    }

    /// Asks for what is asked of nobody.
    fn ask_free(&mut self, usual: f64, now: Instant) -> Option<Ask> {
        if self.is_window_full(now) {
            return None;
        }
        let mut offers = self.offers(usual, now);
        offers.sort_unstable_by(|one, other| f64::total_cmp(&one.seconds, &other.seconds));
        offers.into_iter().find_map(|offer| {
            let places = self.places_for(offer.peer, now);
            places.into_iter().find_map(|place| self.ask_of(offer.peer, place, usual, now))
        })
    }

    /// Who has something that is wanted, and time for it.
    fn offers(&self, usual: f64, now: Instant) -> Vec<Offer> {
        let mut offers: Vec<Offer> = Vec::new();
        for blob in self.blobs.iter().filter(|blob| blob.free_count() > 0) {
            let piece = blob.length(0);
            for link in blob.links.iter().filter(|link| link.useful > 0 && self.may_ask(blob, link, now)) {
                if offers.iter().all(|offer| offer.peer != link.peer) {
                    offers.push(Offer { peer: link.peer, seconds: self.finish(link.peer, piece, usual, now) });
                }
            }
        }
        offers
    }

    fn may_ask(&self, blob: &Blob, link: &Link, now: Instant) -> bool {
        (self.cross || !link.is_far)
            && self.peers.get(link.peer).is_ready(now)
            && self.is_compared(blob, link.peer, now)
    }

    /// Whether it may be asked for a piece of this blob, after what it sent of it. One of which nothing was compared yet has one ask at a time.
    fn is_compared(&self, blob: &Blob, peer: Number, now: Instant) -> bool {
        if blob.is_tried(peer) {
            return true;
        }
        let is_asked =
            || self.asks.values().any(|asked| asked.peer == peer && self.blobs[asked.place].digest == blob.digest);
        blob.compares_until(peer).is_none_or(|until| until <= now) && !is_asked()
    }

    /// In how many seconds a peer would be done with what it owes and so many bytes more.
    fn finish(&self, peer: Number, bytes: u64, usual: f64, now: Instant) -> f64 {
        let peer = self.peers.get(peer);
        (peer.bytes + bytes) as f64 / peer.rate.now(now).unwrap_or(usual)
    }

    /// The blobs of which this peer has something free: those whose tail it has, then by chance, each as likely as it has pieces.
    fn places_for(&mut self, peer: Number, now: Instant) -> Vec<usize> {
        let mut places = Vec::new();
        for (place, blob) in self.blobs.iter().enumerate() {
            if let Some(link) = blob.links.iter().find(|link| link.peer == peer && link.useful > 0)
                && self.is_compared(blob, peer, now)
            {
                let chance = self.rng.random::<f64>().powf(1.0 / link.useful as f64);
                places.push((place, if blob.offers_tail(link) { 2.0 } else { chance }));
            }
        }
        places.sort_by(|(_, one), (_, other)| f64::total_cmp(other, one));
        places.into_iter().map(|(place, _)| place).collect()
    }

    fn ask_of(&mut self, peer: Number, place: usize, usual: f64, now: Instant) -> Option<Ask> {
        let most = self.most(peer, place, usual, now);
        let blob = &mut self.blobs[place];
        let link = blob.link_of(peer)?;
        let choice = if blob.links[link].is_whole {
            // A quarter of what there is, so that others find something too, down to the last.
            blob.rarest(link, (blob.free_count() / 4).clamp(most.min(blob.free_count().div_ceil(4)), MAX_OFFER))
        } else {
            let fair = blob.free_count().div_ceil(4);
            blob.rarest(link, most.max(blob.sole(link)).min(MAX_OFFER).min(fair))
        };
        let most = most.min(choice.len());
        (most > 0).then(|| self.ask(peer, place, choice, most, now))
    }

    /// How many pieces of a blob take this peer the time that an ask should take.
    fn most(&self, peer: Number, place: usize, usual: f64, now: Instant) -> usize {
        let blob = &self.blobs[place];
        let bytes = self.peers.get(peer).rate.now(now).unwrap_or(usual) * ASK_TIME;
        let most = if blob.is_tried(peer) { MAX_MOST } else { 1 };
        ((bytes / blob.length(0).max(1) as f64) as usize).clamp(1, most)
    }

    /// Asks for what somebody else owes who is late, or has the very last. Whoever only waits in a queue is not late: in a swarm at work
    /// everybody does, and what is asked for twice takes the place of something else.
    fn ask_again(&mut self, usual: f64, now: Instant) -> Option<Ask> {
        let ids: Vec<AskId> = self.asks.keys().copied().collect();
        ids.into_iter().find_map(|id| {
            let asked = &self.asks[&id];
            let blob = &self.blobs[asked.place];
            let first = asked.owed().find(|piece| blob.askers(*piece) < MAX_ASKERS)?;
            let (place, bytes) = (asked.place, blob.length(first));
            let of = self.quickest(asked, first, bytes, usual, now)?;
            if !asked.is_late && blob.missing() > LAST {
                return None;
            }
            let link = &blob.links[blob.link_of(of.peer)?];
            let most = self.most(of.peer, place, usual, now).min(usize::from(asked.left).max(1));
            let fits = |piece: &u32| blob.askers(*piece) < MAX_ASKERS && blob.gives(link, *piece);
            let choice: Vec<_> = asked.owed().filter(fits).take(most).collect();
            let most = choice.len();
            (most > 0).then(|| self.ask(of.peer, place, choice, most, now))
        })
    }

    /// Who else would bring this piece first.
    fn quickest(&self, asked: &Asked, piece: u32, bytes: u64, usual: f64, now: Instant) -> Option<Offer> {
        let blob = &self.blobs[asked.place];
        let others = blob.links.iter().filter(|link| link.peer != asked.peer);
        let fit = others.filter(|link| blob.gives(link, piece) && self.may_ask(blob, link, now));
        let offers = fit.map(|link| Offer { peer: link.peer, seconds: self.finish(link.peer, bytes, usual, now) });
        offers.min_by(|one, other| f64::total_cmp(&one.seconds, &other.seconds))
    }

    fn ask(&mut self, peer: Number, place: usize, choice: Vec<u32>, most: usize, now: Instant) -> Ask {
        let blob = &mut self.blobs[place];
        choice.iter().for_each(|piece| blob.expect(*piece));
        let bytes = choice.iter().take(most).map(|piece| blob.length(*piece)).sum();
        self.peers.get_mut(peer).asked(bytes, now);
        self.rate.begin(now);
        let id = self.next_id;
        self.next_id += 1;
        let most = most as u8;
        let order = Order { peer: self.peers.get(peer).id, digest: blob.digest, cut: blob.cut, choice, most };
        let asked = Asked {
            peer,
            place,
            choice: order.choice.clone(),
            current: None,
            left: most,
            bytes,
            brought_any: false,
            moved: now,
            is_late: false,
            is_reserved: true,
        };
        self.asks.insert(id, asked);
        Ask { id, order }
    }
}
