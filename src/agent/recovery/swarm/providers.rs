//! The providers of each blob and of its hash chain, and the effects of their failures.

use std::time::Duration;

use tokio::task::AbortHandle;

use super::{ActiveBlob, BlobStage, Swarm, now};
use crate::agent::recovery::blob_fetcher::Attempts;
use crate::agent::recovery::recover_error::RecoverError;
use crate::decide::peer_faults::Standing;
use crate::decide::piece_picker::Provider;
use crate::model::PeerId;
use crate::oci::Digest;
use crate::ports::FetchError;

/// Retry delay for a partial provider and for a busy peer. A node that downloads a blob has the
/// hash chain, and a piece, within about this time.
const PROVIDER_RETRY: Duration = Duration::from_millis(500);

/// Delay until the hash chain is requested from another peer too, and the most such requests. A
/// provider that computes the chain needs a second for each 1.8 GB.
const CHAIN_HEDGE_DELAY: Duration = Duration::from_secs(2);
const MAX_CHAIN_REQUESTS: usize = 3;

impl Swarm<'_> {
    /// Reads the providers of all blobs from the inventory.
    pub(super) fn refresh_providers(&mut self) {
        let digests: Vec<_> = self.active.keys().copied().collect();
        for digest in digests {
            self.update_providers(digest);
            self.request_hash_chain(digest);
        }
        self.update_zone_peers();
    }

    /// Schedules a refresh after `wait`, because changes come in bursts.
    pub(super) fn refresh_within(&mut self, wait: Duration) {
        let at = now() + wait;
        self.refresh_at = Some(self.refresh_at.map_or(at, |before| before.min(at)));
    }

    /// Gives the picker the providers of a blob. Peers with an open accusation are left out until
    /// the dispute ends.
    pub(super) fn update_providers(&self, digest: Digest) {
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), attempts, .. }) = self.active.get(&digest) else {
            return;
        };
        let mut providers = self.providers(attempts);
        providers.retain(|provider| !fetching.accused_peers.contains(&provider.peer));
        self.shared.picker().set_providers(digest, &providers);
    }

    /// Providers and partial providers of the blob, without the excluded peers.
    pub(super) fn providers(&self, attempts: &Attempts) -> Vec<Provider> {
        let providers = self.blob_fetcher.providers(attempts);
        let (faults, now) = (self.blob_fetcher.peer_faults(), now());
        let standing = |peer| match faults.standing(peer, now) {
            Standing::Good => 0,
            Standing::Troubled(_) => 1,
            Standing::Lying => 2,
        };
        providers
            .into_iter()
            .map(|provider| Provider {
                peer: provider.peer,
                zone: provider.zone,
                is_whole: provider.whole,
                standing: standing(provider.peer),
            })
            .collect()
    }

    pub(super) fn request_hash_chains(&mut self) {
        let digests: Vec<_> = self.active.keys().copied().collect();
        digests.into_iter().for_each(|digest| self.request_hash_chain(digest));
    }

    /// Requests the hash chain from the best peer. While a request is pending, another request
    /// follows after [`CHAIN_HEDGE_DELAY`], up to [`MAX_CHAIN_REQUESTS`] at a time.
    pub(super) fn request_hash_chain(&mut self, digest: Digest) {
        let now = now();
        let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), attempts, .. }) = self.active.get(&digest) else {
            return;
        };
        let is_waiting =
            fetching.chain_requests.values().any(|since| now.saturating_duration_since(*since) < CHAIN_HEDGE_DELAY);
        if is_waiting || fetching.chain_requests.len() >= MAX_CHAIN_REQUESTS || fetching.download.hash_chain().is_some()
        {
            return;
        }
        let mut providers = self.providers(attempts);
        let is_free = |peer: &PeerId| {
            !fetching.chain_requests.contains_key(peer)
                && fetching.no_chain_until.get(peer).is_none_or(|until| *until <= now)
        };
        providers.retain(|provider| is_free(&provider.peer));
        // A whole provider can always compute the chain. A partial provider has the chain only
        // after the chain's arrival.
        providers.sort_by_key(|provider| (provider.standing, !provider.is_whole, rand::random::<u32>()));
        let Some(Provider { peer, .. }) = providers.first() else { return };
        let (peer, layout) = (*peer, fetching.download.layout());
        if let Some(ActiveBlob { stage: BlobStage::Fetching(fetching), .. }) = self.active.get_mut(&digest) {
            fetching.chain_requests.insert(peer, now);
            self.spawn_chain_fetch(peer, digest, layout);
        }
    }

    /// Records a peer's failure with a blob. A partial provider may have no piece yet, or may have
    /// restarted its download, and a busy peer has no fault. Both are retried after
    /// [`PROVIDER_RETRY`].
    ///
    /// # Errors
    /// [`RecoverError`] when this node's own store failed.
    pub(super) fn record_failure(
        &mut self,
        digest: Digest,
        peer: PeerId,
        error: FetchError,
    ) -> Result<(), RecoverError> {
        self.followed_providers.remove(&(peer, digest)).iter().for_each(AbortHandle::abort);
        self.shared.picker().remove_provider(peer, digest);
        let is_early =
            matches!(error, FetchError::Absent { .. }) && self.blob_fetcher.inventory.is_partial_provider(peer, digest);
        if is_early || matches!(error, FetchError::Busy { .. }) {
            self.refresh_within(PROVIDER_RETRY);
            return Ok(());
        }
        let Some(active_blob) = self.active.get_mut(&digest) else { return Ok(()) };
        let is_unreachable = matches!(
            error,
            FetchError::Unreachable { .. } | FetchError::NotAdmitted { .. } | FetchError::Stalled { .. }
        );
        let until = self.blob_fetcher.record_failure(&mut active_blob.attempts, peer, error)?;
        // A peer that lied about one blob, or has lost the blob, may have the others.
        if let Some(until) = until.filter(|_| is_unreachable) {
            self.shared.picker().exclude_peer(peer, until);
        }
        self.update_providers(digest);
        Ok(())
    }
}
