//! Fetch plan of an image: the blobs that are missing on this node, and the order of their
//! providers.

use std::collections::HashSet;

use sha2::{Digest as _, Sha256};

use super::disk_floor::OverLimit;
use super::peer_faults::Standing;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Manifest};

/// The blobs of a manifest, by what this node does about them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchPlan {
    /// Present blobs, which are pinned during the fetch.
    pub present: Vec<Descriptor>,
    /// Blobs to fetch. The config comes first, because unpacking needs the config; then the largest
    /// blobs, so that the last blob to finish is a small one.
    pub missing: Vec<Descriptor>,
    /// Missing layers that peers must not serve: their license forbids distribution.
    pub withheld: Vec<Descriptor>,
}

/// Splits a manifest's config and layers into present and missing blobs. A repeated layer counts
/// once.
pub fn plan(manifest: &Manifest, is_present: impl Fn(Digest) -> bool) -> FetchPlan {
    let mut seen = HashSet::new();
    let (present, mut missing): (Vec<_>, Vec<_>) = std::iter::once(&manifest.config)
        .chain(&manifest.layers)
        .filter(|blob| seen.insert(blob.digest))
        .cloned()
        .partition(|blob| is_present(blob.digest));
    let withheld = missing.extract_if(.., |blob| blob.is_foreign()).collect();
    missing.sort_by_key(|blob| (blob.digest != manifest.config.digest, std::cmp::Reverse(blob.size)));
    FetchPlan { present, missing, withheld }
}

impl FetchPlan {
    /// Bytes to fetch. Saturating, because the manifest's author chose the sizes.
    pub fn missing_bytes(&self) -> u64 {
        self.missing.iter().fold(0, |sum, blob| sum.saturating_add(blob.size))
    }

    /// Checks the size limit; [`super::disk_reservations`] checks the room on the disk. `limit` is
    /// in bytes, and 0 means no limit.
    ///
    /// # Errors
    /// [`OverLimit::Size`] with the figures and the name of the setting.
    pub fn check_size(&self, limit: u64) -> Result<(), OverLimit> {
        let missing = self.missing_bytes();
        if limit > 0 && missing > limit { Err(OverLimit::Size { missing, limit }) } else { Ok(()) }
    }
}

/// Request order of a blob's providers. Good standing comes first, then a rendezvous hash of blob,
/// provider and requester. The blobs of one image spread over all providers, and so do the nodes
/// that want the same blob.
pub fn order_providers(
    me: PeerId,
    digest: Digest,
    mut providers: Vec<PeerId>,
    standing: impl Fn(PeerId) -> Standing,
) -> Vec<PeerId> {
    providers.sort_by_cached_key(|provider| (standing(*provider), rendezvous(&[me, *provider], digest)));
    providers
}

/// Ranks peers for a digest. Every node computes the same hash.
pub(super) fn rendezvous(peers: &[PeerId], digest: Digest) -> u64 {
    let mut hasher = Sha256::new();
    hasher.update(digest.as_bytes());
    peers.iter().for_each(|peer| hasher.update(peer.public_key()));
    let hash: [u8; 32] = hasher.finalize().into();
    hash.iter().take(8).fold(0, |value, byte| value << 8 | u64::from(*byte))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn blob(name: &str, size: u64) -> Descriptor {
        let digest = Digest::of(name.as_bytes());
        Descriptor { media_type: String::new(), digest, size, platform: None, attestation: false }
    }

    fn manifest(layers: Vec<Descriptor>) -> Manifest {
        Manifest { media_type: String::new(), artifact_type: None, config: blob("config", 10), layers }
    }

    fn peer(n: u8) -> PeerId {
        PeerId::from_public_key([n; 32])
    }

    #[test]
    fn missing_blobs_are_fetched_the_config_first_and_then_the_largest() {
        let manifest = manifest(vec![blob("base", 100), blob("small", 1), blob("big", 50), blob("small", 1)]);
        let plan = plan(&manifest, |digest| digest == Digest::of(b"base"));
        assert_eq!(plan.present, [blob("base", 100)]);
        assert_eq!(plan.missing, [blob("config", 10), blob("big", 50), blob("small", 1)]);
        assert_eq!(plan.missing_bytes(), 61);
    }

    #[test]
    fn layers_that_must_not_be_distributed_are_not_fetched() {
        let mut foreign = blob("windows", 9);
        foreign.media_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".into();
        let plan = |is_present| plan(&manifest(vec![foreign.clone()]), move |_| is_present);
        assert_eq!((plan(false).missing, plan(false).withheld), (vec![blob("config", 10)], vec![foreign.clone()]));
        assert_eq!(
            (plan(true).present.len(), plan(true).withheld),
            (2, Vec::new()),
            "a present layer of any origin is kept"
        );
    }

    #[test]
    fn the_size_limit_names_its_setting_and_counts_missing_bytes() {
        let manifest = manifest(vec![blob("base", 1 << 40), blob("layer", 990)]);
        let plan = plan(&manifest, |digest| digest == Digest::of(b"base"));
        assert_eq!(plan.check_size(0), Ok(()));
        assert_eq!(plan.check_size(1000), Ok(()));
        assert!(plan.check_size(999).unwrap_err().to_string().contains("allows 999"));
    }

    proptest::proptest! {
        #[test]
        fn an_image_that_passes_the_size_limit_is_within_the_limit(
            sizes in proptest::collection::vec(proptest::prelude::any::<u64>(), 0..6),
            limit in proptest::prelude::any::<u64>(),
        ) {
            let layers = sizes.iter().enumerate().map(|(number, size)| blob(&number.to_string(), *size)).collect();
            let plan = plan(&manifest(layers), |_| false);
            let exact = 10 + sizes.iter().map(|size| u128::from(*size)).sum::<u128>();
            proptest::prop_assert_eq!(plan.check_size(limit).is_ok(), limit == 0 || exact <= limit.into());
        }
    }

    #[test]
    fn blobs_spread_over_providers_and_lying_providers_come_last() {
        let providers: Vec<_> = (1..=4).map(peer).collect();
        let first = |name: &str| {
            order_providers(peer(9), Digest::of(name.as_bytes()), providers.clone(), |_| Standing::Good)[0]
        };
        let firsts: HashSet<_> = (0..32).map(|i| first(&i.to_string())).collect();
        assert_eq!(firsts.len(), 4, "every provider comes first for some blob");
        let best = first("x");
        let standing = |peer| if peer == best { Standing::Lying } else { Standing::Good };
        let order = order_providers(peer(9), Digest::of(b"x"), providers.clone(), standing);
        assert_eq!(order.last(), Some(&best));
    }
}
