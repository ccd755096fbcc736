//! Which blobs an image needs here, which of them are missing, and in which order peers are asked.

use std::collections::HashSet;

use sha2::{Digest as _, Sha256};

use super::disk::Volume;
use super::peer_faults::Standing;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Manifest};

/// What a manifest asks this node to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FetchPlan {
    /// Blobs that are here; they are held while the others come.
    pub present: Vec<Descriptor>,
    /// Blobs to fetch: the configuration, without which no layer can be unpacked, then the largest first, so that the last one to finish is
    /// a small one.
    pub missing: Vec<Descriptor>,
    /// Layers that are not here and that nobody may give us: their licence forbids to distribute them.
    pub withheld: Vec<Descriptor>,
}

/// Why an image may not be fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverLimit {
    /// A setting.
    #[error("the image misses {missing} bytes here and --max-image-bytes (or the rules file) allows {limit}")]
    Size {
        /// What would have to be fetched.
        missing: u64,
        /// The setting.
        limit: u64,
    },
    /// The disk.
    #[error(
        "{volume} has {free} bytes free; the image needs {need} there, other recoveries {reserved}, and {floor} have to stay free \
         (--min-free-bytes, --image-gc-percent, --eviction-percent or the rules file)"
    )]
    Disk {
        /// Which.
        volume: Volume,
        /// Bytes that the image takes there.
        need: u64,
        /// What other recoveries were promised there and have not written yet.
        reserved: u64,
        /// What is free now.
        free: u64,
        /// What must stay free.
        floor: u64,
    },
}

/// Splits a manifest's config and layers into what is there and what is missing. A layer that is named twice counts once.
pub fn plan(manifest: &Manifest, is_there: impl Fn(Digest) -> bool) -> FetchPlan {
    let mut seen = HashSet::new();
    let (there, mut missing): (Vec<_>, Vec<_>) = std::iter::once(&manifest.config)
        .chain(&manifest.layers)
        .filter(|blob| seen.insert(blob.digest))
        .cloned()
        .partition(|blob| is_there(blob.digest));
    let withheld = missing.extract_if(.., |blob| blob.is_foreign()).collect();
    missing.sort_by_key(|blob| (blob.digest != manifest.config.digest, std::cmp::Reverse(blob.size)));
    FetchPlan { present: there, missing, withheld }
}

impl FetchPlan {
    /// Bytes to fetch; saturating, because sizes come from a manifest that anybody may have written.
    pub fn missing_bytes(&self) -> u64 {
        self.missing.iter().fold(0, |sum, blob| sum.saturating_add(blob.size))
    }

    /// Whether the image may bring so much; what the disk has room for is checked by [`super::disk_reservations`]. `limit` is in bytes, 0 is none.
    ///
    /// # Errors
    /// [`OverLimit::Size`] with the figures and the setting that forbids it.
    pub fn check_size(&self, limit: u64) -> Result<(), OverLimit> {
        let missing = self.missing_bytes();
        if limit > 0 && missing > limit { Err(OverLimit::Size { missing, limit }) } else { Ok(()) }
    }
}

/// The order in which providers of a blob are asked: by rendezvous hash of the blob, the provider and the asker, so that the blobs of one
/// image spread over all its providers and so do the nodes that want the same blob. What is known against a provider goes before that.
pub fn order_providers(
    me: PeerId,
    digest: Digest,
    mut providers: Vec<PeerId>,
    standing: impl Fn(PeerId) -> Standing,
) -> Vec<PeerId> {
    providers.sort_by_cached_key(|provider| (standing(*provider), rendezvous(&[me, *provider], digest)));
    providers
}

/// A hash that everybody computes alike, used to rank peers for a digest.
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
        let plan = |is_there| plan(&manifest(vec![foreign.clone()]), move |_| is_there);
        assert_eq!((plan(false).missing, plan(false).withheld), (vec![blob("config", 10)], vec![foreign.clone()]));
        assert_eq!((plan(true).present.len(), plan(true).withheld), (2, Vec::new()), "it may have come from elsewhere");
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
        assert_eq!(firsts.len(), 4, "every provider is somebody's first");
        let best = first("x");
        let standing = |peer| if peer == best { Standing::Lying } else { Standing::Good };
        let order = order_providers(peer(9), Digest::of(b"x"), providers.clone(), standing);
        assert_eq!(order.last(), Some(&best));
    }
}
