//! Provider selection: a random few of a blob's providers, most of them in our own zone.

use std::time::Instant;

use super::blob::{BlobPicker, ListedProvider};
use super::peers::PeerRecords;
use super::{FollowChange, PiecePicker, Provider, mix};
use crate::model::PeerId;
use crate::oci::Digest;

/// Selected providers per blob. In simulations of a thousand nodes the last node finishes after
/// 1.27 times its link's minimum with 10 providers, 1.17 with 20 and 1.13 with 40. Each costs a
/// stream.
pub(super) const MAX_SELECTED: usize = 20;

/// Selected providers in other zones, when there are any: enough to connect the zones. A zone
/// leader selects more.
const MAX_FAR: usize = MAX_SELECTED / 4;
const MAX_FAR_AS_LEADER: usize = MAX_SELECTED / 2;

/// Listed providers that are kept, for our own zone and for the others: three replacements per
/// selected provider until the next list.
const MAX_LISTED: usize = 4 * MAX_SELECTED;

/// The standing of a lying provider.
const LYING_STANDING: u8 = 2;

impl PiecePicker {
    /// Replaces the list of a blob's providers and partial providers.
    pub fn set_providers(&mut self, digest: Digest, list: &[Provider]) {
        let Some(&place) = self.blob_indexes.get(&digest) else { return };
        let (zone, salt) = (&self.zone, self.salt);
        let is_far = |one: &Provider| matches!((zone, &one.zone), (Some(ours), Some(its)) if ours != its);
        let (far, near) = list.iter().partition::<Vec<_>, _>(|one| is_far(one));
        let blob = &mut self.blobs[place];
        blob.near_listed = best_listed(near, salt, digest);
        blob.far_listed = best_listed(far, salt, digest);
        blob.needs_selection = true;
    }

    /// Changes of the followed providers. Whole providers are not followed, neither are providers
    /// that sent [`crate::model::PieceMapUpdate::HaveAll`], nor lost ones
    /// ([`PiecePicker::remove_provider`]).
    pub fn take_follow_changes(&mut self, now: Instant) -> Vec<FollowChange> {
        self.advance_clock(now);
        if self.exclusion_ends_at.is_some_and(|at| at <= now) {
            self.exclusion_ends_at = self.peers.next_exclusion_end(now);
            self.blobs.iter_mut().for_each(|blob| blob.needs_selection = true);
        }
        for place in 0..self.blobs.len() {
            if std::mem::take(&mut self.blobs[place].needs_selection) {
                self.reselect(place, now);
            }
        }
        std::mem::take(&mut self.follow_changes)
    }

    fn reselect(&mut self, place: usize, now: Instant) {
        let far = if self.is_cross_zone_allowed { MAX_FAR_AS_LEADER } else { MAX_FAR };
        let chosen = select_providers(&self.blobs[place], &self.peers, far, now);
        let gone: Vec<_> = self.blobs[place].selected.iter().map(|link| link.peer).collect();
        for peer in gone {
            if !chosen.iter().any(|(one, _)| one.peer == self.peers.get(peer).id) {
                self.deselect(place, peer);
                self.cancel_requests(peer, Some(place), false);
            }
        }
        for (candidate, is_far) in chosen {
            self.select(place, &candidate, is_far);
        }
    }

    fn select(&mut self, place: usize, candidate: &Provider, is_far: bool) {
        let peer = self.peers.index_or_insert(candidate.peer);
        let blob = &mut self.blobs[place];
        let (digest, id) = (blob.digest, candidate.peer);
        let link = blob.selected_index(peer).unwrap_or_else(|| {
            blob.select(peer, is_far);
            blob.selected.len() - 1
        });
        match (candidate.is_whole, blob.selected[link].is_whole) {
            (true, false) => {
                blob.set_whole(link);
                if std::mem::take(&mut blob.selected[link].is_followed) {
                    self.follow_changes.push(FollowChange::Unfollow { peer: id, digest });
                }
            }
            // The inventory lists the peer as a partial provider. The peer's own piece map decides
            // which pieces count.
            (false, _) if !blob.selected[link].is_followed && !blob.selected[link].announced_whole => {
                blob.clear_pieces(link);
                blob.selected[link].is_followed = true;
                self.follow_changes.push(FollowChange::Follow { peer: id, digest });
            }
            _ => {}
        }
    }

    pub(super) fn deselect(&mut self, place: usize, peer: usize) {
        let blob = &mut self.blobs[place];
        if let Some(link) = blob.selected_index(peer)
            && blob.deselect(link).is_followed
        {
            self.follow_changes.push(FollowChange::Unfollow { peer: self.peers.get(peer).id, digest: blob.digest });
        }
    }
}

/// Lowest standing first; equal standings in random order.
fn best_listed(list: Vec<&Provider>, salt: u64, digest: Digest) -> Vec<ListedProvider> {
    let [first, ..] = digest.as_bytes().as_chunks::<8>().0 else { return Vec::new() };
    let salt = salt ^ u64::from_le_bytes(*first);
    let mut keyed: Vec<_> = list.into_iter().map(|one| (one.standing, score(one.peer, salt), one)).collect();
    keyed.sort_unstable_by_key(|(standing, score, one)| (*standing, *score, one.peer));
    keyed.dedup_by_key(|(_, _, one)| one.peer);
    let known = |(_, score, candidate): (u8, u32, &Provider)| {
        // Near and far providers are separate lists from here on.
        ListedProvider { provider: Provider { zone: None, ..candidate.clone() }, score, is_lost: false }
    };
    keyed.into_iter().take(MAX_LISTED).map(known).collect()
}

/// Random rank of a peer, different in each picker. A peer cannot choose a key that ranks high.
fn score(peer: PeerId, salt: u64) -> u32 {
    let words = peer.public_key().as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
    (words.fold(salt, |hash, word| mix(hash ^ word)) >> 32) as u32
}

/// The providers that the blob should have, each with a flag for "in another zone".
fn select_providers(blob: &BlobPicker, peers: &PeerRecords, far: usize, now: Instant) -> Vec<(Provider, bool)> {
    if blob.missing() == 0 {
        return Vec::new();
    }
    let order = |known: &[ListedProvider]| {
        let fits = |one: &&ListedProvider| !one.is_lost && !peers.is_excluded(one.provider.peer, now);
        let linked = |one: &ListedProvider| {
            peers.index_of(one.provider.peer).is_some_and(|peer| blob.selected_index(peer).is_some())
        };
        let mut fit: Vec<_> = known.iter().filter(fits).collect();
        // A selected provider gets half its score, so the selection changes less: each change costs
        // a stream and a first piece map.
        fit.sort_by_cached_key(|one| (one.provider.standing, if linked(one) { one.score / 2 } else { one.score }));
        fit.into_iter().map(|one| one.provider.clone()).collect::<Vec<_>>()
    };
    let (near, far_ones) = (order(&blob.near_listed), order(&blob.far_listed));
    let from_far = far.min(far_ones.len()).max(MAX_SELECTED.saturating_sub(near.len()));
    let far_ones = far_ones.into_iter().take(from_far).map(|one| (one, true));
    let near = near.into_iter().take(MAX_SELECTED - from_far.min(far_ones.len())).map(|one| (one, false));
    let mut chosen: Vec<_> = near.chain(far_ones).collect();
    if chosen.iter().any(|(one, _)| one.standing < LYING_STANDING) {
        chosen.retain(|(one, _)| one.standing < LYING_STANDING);
    }
    chosen
}
