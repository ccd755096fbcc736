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
    pub fn set_providers(&mut self, digest: Digest, providers: &[Provider]) {
        let Some(&blob_index) = self.blob_indexes.get(&digest) else { return };
        let (zone, salt) = (&self.zone, self.salt);
        let is_far = |provider: &Provider| matches!((zone, &provider.zone), (Some(ours), Some(its)) if ours != its);
        let (far, near) = providers.iter().partition::<Vec<_>, _>(|provider| is_far(provider));
        let blob = &mut self.blobs[blob_index];
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
        for blob_index in 0..self.blobs.len() {
            if std::mem::take(&mut self.blobs[blob_index].needs_selection) {
                self.reselect(blob_index, now);
            }
        }
        std::mem::take(&mut self.follow_changes)
    }

    fn reselect(&mut self, blob_index: usize, now: Instant) {
        let far = if self.is_cross_zone_allowed { MAX_FAR_AS_LEADER } else { MAX_FAR };
        let selected = select_providers(&self.blobs[blob_index], &self.peers, far, now);
        let previous: Vec<_> = self.blobs[blob_index].selected.iter().map(|provider| provider.peer).collect();
        for peer in previous {
            if !selected.iter().any(|(provider, _)| provider.peer == self.peers.get(peer).id) {
                self.deselect(blob_index, peer);
                self.cancel_requests(peer, Some(blob_index), false);
            }
        }
        for (candidate, is_far) in selected {
            self.select(blob_index, &candidate, is_far);
        }
    }

    fn select(&mut self, blob_index: usize, candidate: &Provider, is_far: bool) {
        let peer = self.peers.index_or_insert(candidate.peer);
        let blob = &mut self.blobs[blob_index];
        let (digest, id) = (blob.digest, candidate.peer);
        let index = blob.selected_index(peer).unwrap_or_else(|| {
            blob.select(peer, is_far);
            blob.selected.len() - 1
        });
        match (candidate.is_whole, blob.selected[index].is_whole) {
            (true, false) => {
                blob.set_whole(index);
                if std::mem::take(&mut blob.selected[index].is_followed) {
                    self.follow_changes.push(FollowChange::Unfollow { peer: id, digest });
                }
            }
            // The inventory lists the peer as a partial provider. The peer's own piece map decides
            // which pieces count.
            (false, _) if !blob.selected[index].is_followed && !blob.selected[index].announced_whole => {
                blob.clear_pieces(index);
                blob.selected[index].is_followed = true;
                self.follow_changes.push(FollowChange::Follow { peer: id, digest });
            }
            _ => {}
        }
    }

    pub(super) fn deselect(&mut self, blob_index: usize, peer: usize) {
        let blob = &mut self.blobs[blob_index];
        if let Some(index) = blob.selected_index(peer)
            && blob.deselect(index).is_followed
        {
            self.follow_changes.push(FollowChange::Unfollow { peer: self.peers.get(peer).id, digest: blob.digest });
        }
    }
}

/// Lowest standing first; equal standings in random order.
fn best_listed(providers: Vec<&Provider>, salt: u64, digest: Digest) -> Vec<ListedProvider> {
    let [first, ..] = digest.as_bytes().as_chunks::<8>().0 else { return Vec::new() };
    let salt = salt ^ u64::from_le_bytes(*first);
    let mut keyed: Vec<_> =
        providers.into_iter().map(|provider| (provider.standing, score(provider.peer, salt), provider)).collect();
    keyed.sort_unstable_by_key(|(standing, score, provider)| (*standing, *score, provider.peer));
    keyed.dedup_by_key(|(_, _, provider)| provider.peer);
    let to_listed = |(_, score, candidate): (u8, u32, &Provider)| {
        // Near and far providers are separate lists from here on.
        ListedProvider { provider: Provider { zone: None, ..candidate.clone() }, score, is_lost: false }
    };
    keyed.into_iter().take(MAX_LISTED).map(to_listed).collect()
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
    let order = |listed: &[ListedProvider]| {
        let fits = |candidate: &&ListedProvider| !candidate.is_lost && !peers.is_excluded(candidate.provider.peer, now);
        let is_selected = |candidate: &ListedProvider| {
            peers.index_of(candidate.provider.peer).is_some_and(|peer| blob.selected_index(peer).is_some())
        };
        let mut fit: Vec<_> = listed.iter().filter(fits).collect();
        // A selected provider gets half its score, so the selection changes less: each change costs
        // a stream and a first piece map.
        fit.sort_by_cached_key(|candidate| {
            (candidate.provider.standing, if is_selected(candidate) { candidate.score / 2 } else { candidate.score })
        });
        fit.into_iter().map(|candidate| candidate.provider.clone()).collect::<Vec<_>>()
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
