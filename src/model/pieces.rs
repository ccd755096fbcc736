//! What agents say to each other about the pieces of a blob.

use serde::{Deserialize, Serialize};

use super::{Bits, PeerId};
use crate::oci::{Digest, PieceLayout};

/// Most pieces in one [`Order`]: bounds the message, and what is set aside for one answer. 64 of the largest make half a gigabyte, a second's
/// worth of a fast network; of the smallest 16 MiB, which is more than is under way at any time.
pub const MAX_REQUEST_PIECES: usize = 64;

/// Most pieces that one [`Availability`] tells of as news; more are told in several.
pub const MAX_HAVE_PIECES: usize = 1024;

/// Some pieces of one blob, asked of one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceRequest {
    /// Who is asked.
    pub peer: PeerId,
    /// Which blob.
    pub digest: Digest,
    /// How it is cut: both ends cut a blob of a size alike ([`Cut::usual`]).
    pub layout: PieceLayout,
    /// The pieces that are welcome, the most welcome first; at most [`MAX_CHOICE`], each once.
    pub pieces: Vec<u32>,
    /// How many of them are to come. Which, the peer chooses: of what it has that which it has sent the least.
    pub limit: u8,
}

/// A word about what a peer has of a blob. A hint, like everything that a peer says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum PieceMapUpdate {
    /// These pieces and no others; one bit a piece. The first word about a blob that is being fetched.
    Map(Bits),
    /// These have come; at most [`MAX_NEWS`].
    Have(Vec<u32>),
    /// All of it. Nothing more will be said.
    HaveAll,
}
