//! The messages of agents about the pieces of a blob.

use serde::{Deserialize, Serialize};

use super::{Bits, PeerId};
use crate::oci::{Digest, PieceLayout};

/// Most pieces in one [`PieceRequest`]. The limit bounds the message, and the memory that is
/// reserved for one answer. 64 of the largest pieces make half a gigabyte, a second's worth of a
/// fast network. 64 of the smallest make 16 MiB, which is more than is in flight at any time.
pub const MAX_REQUEST_PIECES: usize = 64;

/// Most pieces in one [`PieceMapUpdate::Have`]. More pieces go into several updates.
pub const MAX_HAVE_PIECES: usize = 1024;

/// A request for pieces of one blob, to one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceRequest {
    /// The provider.
    pub peer: PeerId,
    /// The blob.
    pub digest: Digest,
    /// The division of the blob into pieces. Both ends derive the same layout from the blob's size
    /// ([`PieceLayout::for_size`]).
    pub layout: PieceLayout,
    /// Acceptable pieces, the most wanted first; at most [`MAX_REQUEST_PIECES`], each once.
    pub pieces: Vec<u32>,
    /// How many of the pieces the provider sends. The provider chooses, among the pieces that it
    /// has, those that it has sent least.
    pub limit: u8,
}

/// A statement of a peer about its pieces of one blob. A hint, like every announcement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PieceMapUpdate {
    /// The whole piece map, one bit per piece: the first update about a blob that is being
    /// downloaded.
    Map(Bits),
    /// Pieces that arrived; at most [`MAX_HAVE_PIECES`].
    Have(Vec<u32>),
    /// The peer has the whole blob. No update follows.
    HaveAll,
}
