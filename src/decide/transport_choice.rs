//! The transport of a blob: QUIC, or the mesh's TCP connection where a firewall blocks UDP.
//!
//! The mesh's connections carry gossip, so only small blobs of small images go there, and only
//! while UDP is known to be blocked ([`super::udp_path`]).

use crate::oci::{Descriptor, Digest};

/// A transport that brings blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// QUIC, over UDP.
    Quic,
    /// Ranges over the libp2p connection of the mesh, over TCP.
    Mesh,
}

/// Bytes of one range over the mesh. A connection of 10 Mbit/s, the slowest that the mesh's own
/// limits allow for, sends a range in 0.2 s. A ping behind the ranges of all requests that may be
/// open ([`MAX_RANGES`]) waits 0.84 s, and a neighbor counts as silent after 1.75 s. A range is
/// also the first window of a yamux stream, so no range waits for credit.
pub const RANGE: u64 = 256 << 10;

/// Requests for ranges that one agent has open at a time, at all peers together.
pub const MAX_RANGES: usize = 4;

/// Requests for ranges that one agent has open at one peer. With two, one range is on the wire
/// while the next is requested.
pub const MAX_RANGES_OF_A_PEER: usize = 2;

/// The largest blob that comes over the mesh. A blob of up to 64 MiB has pieces of [`RANGE`] bytes,
/// so a request is a piece, and the hash chain fits into one range.
pub const MAX_BLOB: u64 = 64 << 20;

/// The most bytes of one image that come over the mesh: 3.6 min at 10 Mbit/s, during which gossip
/// shares the connection.
pub const MAX_IMAGE: u64 = 256 << 20;

/// The state of UDP, and of the connections to one peer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathState {
    /// Other nodes answer over TCP and none over UDP.
    pub udp_blocked: bool,
    /// A QUIC connection to the peer is open.
    pub quic_open: bool,
    /// The mesh has a connection to the peer.
    pub neighbor: bool,
}

/// The transport for a blob of this size.
pub fn choose_transport(size: u64, paths: PathState) -> Transport {
    let PathState { udp_blocked, quic_open, neighbor } = paths;
    if udp_blocked && !quic_open && neighbor && size <= MAX_BLOB { Transport::Mesh } else { Transport::Quic }
}

/// An image that cannot be fetched while UDP is blocked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TooLarge {
    /// A blob is too large.
    #[error("blob {digest} has {size} bytes, more than the {MAX_BLOB} bytes that a blob over TCP may have")]
    Blob {
        /// The blob.
        digest: Digest,
        /// The blob's size in bytes.
        size: u64,
    },
    /// The missing blobs together are too large.
    #[error("{size} bytes of the image are missing, more than the {MAX_IMAGE} bytes that may come over TCP")]
    Image {
        /// Bytes that are not here.
        size: u64,
    },
}

/// Whether the missing blobs of an image may come over the mesh.
///
/// # Errors
/// [`TooLarge`], which names the limit.
pub fn check_image(missing: &[Descriptor]) -> Result<(), TooLarge> {
    if let Some(blob) = missing.iter().find(|blob| blob.size > MAX_BLOB) {
        return Err(TooLarge::Blob { digest: blob.digest, size: blob.size });
    }
    let size = missing.iter().map(|blob| blob.size).fold(0, u64::saturating_add);
    if size > MAX_IMAGE { Err(TooLarge::Image { size }) } else { Ok(()) }
}

/// The ranges of `length` bytes from `offset` on, in order, each of at most [`RANGE`] bytes.
pub fn ranges(offset: u64, length: u64) -> impl Iterator<Item = (u64, u64)> {
    (0..length.div_ceil(RANGE)).map(move |number| {
        let begin = number * RANGE;
        (offset + begin, (length - begin).min(RANGE))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::oci::PieceLayout;

    const BLOCKED: PathState = PathState { udp_blocked: true, quic_open: false, neighbor: true };

    fn blob(size: u64) -> Descriptor {
        let digest = Digest::of(&size.to_be_bytes());
        Descriptor { media_type: String::new(), digest, size, platform: None, attestation: false }
    }

    #[test]
    fn a_small_blob_is_fetched_over_the_mesh_while_udp_is_blocked() {
        assert_eq!(choose_transport(MAX_BLOB, BLOCKED), Transport::Mesh);
    }

    #[test]
    fn every_blob_is_fetched_over_quic_where_udp_is_open() {
        for quic_open in [false, true] {
            assert_eq!(
                choose_transport(1, PathState { udp_blocked: false, quic_open, neighbor: true }),
                Transport::Quic
            );
        }
    }

    #[test]
    fn a_peer_with_an_open_quic_connection_is_used_over_quic() {
        assert_eq!(choose_transport(1, PathState { quic_open: true, ..BLOCKED }), Transport::Quic);
    }

    #[test]
    fn a_peer_without_a_mesh_connection_is_used_over_quic() {
        assert_eq!(choose_transport(1, PathState { neighbor: false, ..BLOCKED }), Transport::Quic);
    }

    #[test]
    fn a_large_blob_never_goes_over_the_mesh() {
        assert_eq!(choose_transport(MAX_BLOB + 1, BLOCKED), Transport::Quic);
    }

    #[test]
    fn an_image_within_the_limits_is_accepted() {
        let missing: Vec<_> = (0..MAX_IMAGE / MAX_BLOB).map(|_| blob(MAX_BLOB)).collect();
        assert_eq!(check_image(&missing), Ok(()));
        assert_eq!(check_image(&[]), Ok(()));
    }

    #[test]
    fn an_image_that_is_too_large_is_rejected_with_the_limit() {
        let large = blob(MAX_BLOB + 1);
        let error = check_image(&[blob(1), large.clone()]).unwrap_err();
        assert_eq!(error, TooLarge::Blob { digest: large.digest, size: large.size });
        assert!(error.to_string().contains(&MAX_BLOB.to_string()), "{error}");
        let many: Vec<_> = (0..=MAX_IMAGE / MAX_BLOB).map(|_| blob(MAX_BLOB)).collect();
        assert_eq!(check_image(&many), Err(TooLarge::Image { size: MAX_IMAGE + MAX_BLOB }));
        let overflowing = [blob(u64::MAX - 1), blob(u64::MAX)];
        assert!(check_image(&overflowing).is_err(), "the sum does not overflow");
    }

    #[test]
    fn a_piece_of_the_largest_blob_fits_a_range_and_so_does_its_hash_chain() {
        let layout = PieceLayout::for_size(MAX_BLOB);
        assert!(layout.piece_length(0) <= RANGE);
        assert!(layout.piece_count() as u64 * 32 <= RANGE);
    }

    proptest! {
        #[test]
        fn ranges_cover_every_byte_once(offset in 0u64..1 << 40, length in 0u64..5 * RANGE) {
            let mut at = offset;
            for (begin, some) in ranges(offset, length) {
                prop_assert_eq!(begin, at);
                prop_assert!(some > 0 && some <= RANGE);
                at += some;
            }
            prop_assert_eq!(at, offset + length);
        }
    }
}
