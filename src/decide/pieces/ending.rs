//! What comes of what was asked.

use std::time::Instant;

use super::asking::Asked;
use super::blob::MAX_ASKERS;
use super::{AskId, End, Pool};

impl Pool {
    /// The peer chose this piece of those that it was asked for; its bytes follow.
    pub fn begins(&mut self, ask: AskId, piece: u32, now: Instant) {
        self.clock(now);
        let Some(asked) = self.asks.get_mut(&ask) else { return };
        let Some(choice) = asked.choice.iter().position(|one| *one == piece) else { return };
        // A piece that it began and did not end is not coming any more.
        if let Some(earlier) = asked.current.take() {
            self.blobs[asked.place].expect_no_more(earlier);
        }
        asked.choice.swap_remove(choice);
        asked.current = Some(piece);
        asked.is_late = false;
        asked.left = asked.left.saturating_sub(1);
        let blob = &mut self.blobs[asked.place];
        let is_elsewhere = blob.is_here(piece) || (!asked.is_reserved && blob.askers(piece) >= MAX_ASKERS);
        if !asked.is_reserved {
            blob.expect(piece);
        }
        if asked.left == 0 {
            asked.release(blob);
            asked.choice.clear();
        }
        if is_elsewhere {
            self.cancel(ask);
        }
    }

    /// So many bytes came.
    pub fn brings(&mut self, ask: AskId, bytes: u64, now: Instant) {
        self.clock(now);
        let Some(asked) = self.asks.get_mut(&ask) else { return };
        self.rate.add(bytes, now);
        self.peers.get_mut(asked.peer).brought(bytes, now);
        asked.moved = now;
        asked.is_late = false;
        let owed = bytes.min(asked.bytes);
        asked.bytes -= owed;
        let peer = self.peers.get_mut(asked.peer);
        peer.bytes = peer.bytes.saturating_sub(owed);
    }

    /// A piece has come whole. With the last one the ask is over.
    pub fn has(&mut self, ask: AskId, piece: u32, now: Instant) {
        self.clock(now);
        let Some(asked) = self.asks.get_mut(&ask) else { return };
        if asked.current != Some(piece) {
            return;
        }
        asked.current = None;
        asked.brought_any = true;
        asked.moved = now;
        let (place, peer, is_over) = (asked.place, asked.peer, asked.left == 0);
        self.peers.get_mut(peer).kept();
        let blob = &mut self.blobs[place];
        blob.came_from(peer, now);
        blob.expect_no_more(piece);
        if let Some(link) = blob.link_of(peer) {
            blob.set_vain(link, false);
        }
        self.arrives(place, piece, Some(ask));
        if is_over {
            self.remove(ask);
            if self.peers.get(peer).asks == 0 {
                self.peers.get_mut(peer).ran_dry();
            }
        }
    }

    /// The ask is over. What did not come is asked for again; of a peer that brought nothing, not at once.
    pub fn ends(&mut self, ask: AskId, how: End, now: Instant) {
        self.clock(now);
        let Some(asked) = self.remove(ask) else { return };
        let is_vain = how != End::Done || !asked.brought_any;
        if is_vain {
            self.peers.get_mut(asked.peer).rests(now);
        }
        let blob = &mut self.blobs[asked.place];
        let Some(link) = blob.link_of(asked.peer) else { return };
        if is_vain {
            blob.set_vain(link, true);
        }
        // It was asked for what it said that it has.
        if how == End::Done {
            asked.choice.iter().chain(&asked.current).for_each(|piece| blob.has_not(link, *piece));
        }
    }

    /// Asks that are not needed any more, because what they were for came from elsewhere or the peer is not to be asked now. They are over: the
    /// driver drops them, and whatever it still says about them is ignored. A piece that came through one meanwhile is told by [`Pool::hold`].
    pub fn cancels(&mut self) -> Vec<AskId> {
        std::mem::take(&mut self.cancels)
    }

    /// A piece is here, by this ask or none.
    pub(super) fn arrives(&mut self, place: usize, piece: u32, by: Option<AskId>) {
        let blob = &mut self.blobs[place];
        if !blob.exists(piece) || !blob.arrives(piece) {
            return;
        }
        if blob.missing() == 0 {
            blob.is_unsettled = true;
        }
        let others = self.asks.iter_mut().filter(|(id, asked)| Some(**id) != by && asked.place == place);
        let mut useless = Vec::new();
        for (id, asked) in others {
            if let Some(choice) = asked.choice.iter().position(|one| *one == piece) {
                asked.choice.swap_remove(choice);
                if asked.is_reserved {
                    blob.expect_no_more(piece);
                }
            }
            // Its bytes are on their way for nothing, or it cannot be fulfilled any more.
            if asked.current == Some(piece) || asked.choice.len() < usize::from(asked.left) {
                useless.push(*id);
            }
        }
        useless.into_iter().for_each(|id| self.cancel(id));
    }

    pub(super) fn cancel(&mut self, ask: AskId) {
        if self.remove(ask).is_some() {
            self.cancels.push(ask);
        }
    }

    /// Takes back what was asked of a peer: of one blob or of all, what has not begun or everything.
    pub(super) fn withdraw(&mut self, peer: usize, place: Option<usize>, even_begun: bool) {
        let fits = |asked: &Asked| {
            asked.peer == peer
                && place.is_none_or(|place| asked.place == place)
                && (even_begun || (asked.current.is_none() && !asked.brought_any))
        };
        let ids: Vec<_> = self.asks.iter().filter(|(_, asked)| fits(asked)).map(|(id, _)| *id).collect();
        ids.into_iter().for_each(|id| self.cancel(id));
    }

    /// Nothing is expected of it any more.
    fn remove(&mut self, ask: AskId) -> Option<Asked> {
        let mut asked = self.asks.remove(&ask)?;
        let blob = &mut self.blobs[asked.place];
        asked.release(blob);
        asked.current.iter().for_each(|piece| blob.expect_no_more(*piece));
        let now = self.now.unwrap_or(asked.moved);
        self.peers.get_mut(asked.peer).over(asked.bytes, now);
        if self.asks.is_empty() {
            self.rate.end(now);
        }
        Some(asked)
    }
}
