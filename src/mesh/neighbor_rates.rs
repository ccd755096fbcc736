//! Rate limits for one neighbor. The task counts before decoding or verifying anything.

use crate::util::token_bucket::Rate;

/// The rate limits of every neighbor.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct NeighborRateLimits {
    /// Gossip messages.
    pub(super) messages: Rate,
    /// Bytes of gossip messages.
    pub(super) bytes: Rate,
    /// Sync requests.
    pub(super) sync_requests: Rate,
    /// Requests for ranges of blobs.
    pub(super) ranges: Rate,
}

impl NeighborRateLimits {
    /// Far above the needs of an honest mesh, because an excess is a fault.
    pub(super) const DEFAULT: Self = Self {
        // A thousand nodes start together, each with 16 entries, and all entries come through one
        // neighbor. Then 5000 nodes, the maximum of Kubernetes, publish an entry a second each.
        messages: Rate::per_second(16_384, 5_000),
        // As above: an entry of 128 blobs has 4.7 KiB, so that start has 75 MiB. Then more than a
        // link of 100 Mbit/s carries.
        bytes: Rate::per_second(96 << 20, 16 << 20),
        // A neighbor that was cut off requests the entries of each of 256 members, two at a time,
        // and then the entries that are still missing.
        sync_requests: Rate::per_second(256, 64),
        // Eight images of the largest size at once, then 8.6 Gbit/s in ranges of 256 KiB.
        ranges: Rate::per_second(8_192, 4_096),
    };
}
