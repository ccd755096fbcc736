//! Which blobs an image needs here, which of them are missing, and in which order peers are asked.

use std::collections::HashSet;

use sha2::{Digest as _, Sha256};

use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, Manifest};

/// What a manifest asks this node to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Blobs that are here; they are held while the others come.
    pub there: Vec<Descriptor>,
    /// Blobs to fetch, the largest first: the last one to finish is then a small one.
    pub missing: Vec<Descriptor>,
}

/// Why an image may not be fetched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OverLimit {
    /// A setting.
    #[error("the image misses {missing} bytes here and --max-image-bytes is {limit}")]
    Size {
        /// What would have to be fetched.
        missing: u64,
        /// The setting.
        limit: u64,
    },
    /// The disk.
    #[error("fetching {missing} bytes would leave less than --min-free-bytes {floor} of {free} free bytes")]
    Disk {
        /// What would have to be fetched.
        missing: u64,
        /// What is free now.
        free: u64,
        /// The setting.
        floor: u64,
    },
}

/// Limits on one recovery.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Most bytes that one image may bring; 0 is no limit.
    pub max_image_bytes: u64,
    /// What must stay free on the content store's file system.
    pub min_free_bytes: u64,
}

/// Splits a manifest's config and layers into what is there and what is missing. A layer that is named twice counts once;
/// layers that must not be distributed are left to the runtime, which skips them as well.
pub fn plan(manifest: &Manifest, is_there: impl Fn(Digest) -> bool) -> Plan {
    let mut seen = HashSet::new();
    let (there, mut missing): (Vec<_>, Vec<_>) = std::iter::once(&manifest.config)
        .chain(manifest.layers.iter().filter(|layer| !layer.is_foreign()))
        .filter(|blob| seen.insert(blob.digest))
        .cloned()
        .partition(|blob| is_there(blob.digest));
    missing.sort_by_key(|blob| std::cmp::Reverse(blob.size));
    Plan { there, missing }
}

impl Plan {
    /// Bytes to fetch; saturating, because sizes come from a manifest that anybody may have written.
    pub fn missing_bytes(&self) -> u64 {
        self.missing.iter().fold(0, |sum, blob| sum.saturating_add(blob.size))
    }

    /// Whether the plan may be carried out.
    ///
    /// # Errors
    /// [`OverLimit`] with the figures and the setting that forbids it.
    pub fn check(&self, limits: Limits, free: Option<u64>) -> Result<(), OverLimit> {
        let Limits { max_image_bytes: limit, min_free_bytes: floor } = limits;
        let missing = self.missing_bytes();
        if limit > 0 && missing > limit {
            return Err(OverLimit::Size { missing, limit });
        }
        match free {
            Some(free) if missing > 0 && missing.saturating_add(floor) > free => {
                Err(OverLimit::Disk { missing, free, floor })
            }
            _ => Ok(()),
        }
    }
}

/// The order in which providers of a blob are asked: by rendezvous hash of the blob, the provider and the asker, so that the blobs of one
/// image spread over all its providers and so do the nodes that want the same blob. Those that failed come last.
pub fn order_providers(
    me: PeerId,
    digest: Digest,
    mut providers: Vec<PeerId>,
    failed: &HashSet<PeerId>,
) -> Vec<PeerId> {
    providers.sort_by_cached_key(|provider| (failed.contains(provider), rendezvous(&[me, *provider], digest)));
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
        Manifest { media_type: String::new(), config: blob("config", 10), layers }
    }

    fn peer(n: u8) -> PeerId {
        PeerId::from_public_key([n; 32])
    }

    #[test]
    fn only_what_is_missing_is_fetched_and_the_largest_first() {
        let manifest = manifest(vec![blob("base", 100), blob("small", 1), blob("big", 50), blob("small", 1)]);
        let plan = plan(&manifest, |digest| digest == Digest::of(b"base"));
        assert_eq!(plan.there, [blob("base", 100)]);
        assert_eq!(plan.missing, [blob("big", 50), blob("config", 10), blob("small", 1)]);
        assert_eq!(plan.missing_bytes(), 61);
    }

    #[test]
    fn layers_that_must_not_be_distributed_are_not_asked_for() {
        let mut foreign = blob("windows", 9);
        foreign.media_type = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip".into();
        assert_eq!(plan(&manifest(vec![foreign]), |_| false).missing, [blob("config", 10)]);
    }

    #[test]
    fn limits_name_their_setting() {
        let plan = plan(&manifest(vec![blob("layer", 990)]), |_| false);
        let check = |max_image_bytes, min_free_bytes, free| {
            plan.check(Limits { max_image_bytes, min_free_bytes }, free).map_err(|error| error.to_string())
        };
        assert_eq!(check(0, 0, None), Ok(()));
        assert_eq!(check(1000, 500, Some(1500)), Ok(()));
        assert!(check(999, 0, None).unwrap_err().contains("--max-image-bytes is 999"));
        assert!(check(0, 501, Some(1500)).unwrap_err().contains("--min-free-bytes 501"));
    }

    #[test]
    fn absurd_sizes_do_not_overflow() {
        let plan =
            plan(&manifest(vec![blob("a", i64::MAX as u64), blob("b", i64::MAX as u64), blob("c", 99)]), |_| false);
        assert_eq!(plan.missing_bytes(), u64::MAX);
        assert!(plan.check(Limits { max_image_bytes: 0, min_free_bytes: 1 }, Some(u64::MAX - 1)).is_err());
    }

    #[test]
    fn blobs_spread_over_providers_and_failures_come_last() {
        let providers: Vec<_> = (1..=4).map(peer).collect();
        let first =
            |name: &str| order_providers(peer(9), Digest::of(name.as_bytes()), providers.clone(), &HashSet::new())[0];
        let firsts: HashSet<_> = (0..32).map(|i| first(&i.to_string())).collect();
        assert_eq!(firsts.len(), 4, "every provider is somebody's first");
        let best = first("x");
        let order = order_providers(peer(9), Digest::of(b"x"), providers.clone(), &[best].into());
        assert_eq!(order.last(), Some(&best));
    }
}
