//! The messages of the transfer protocol: the handshake, the requests and the answers.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use super::{Message, Versions};
use crate::model::{Credential, PieceMapUpdate};
use crate::oci::{Digest, MAX_PIECES};

/// The first message on a connection, sent by the dialer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The credential of the sender.
    pub credential: Credential,
    /// The sender's node name, for logs and status. A node name in the credential takes precedence.
    pub node: String,
    /// The TCP port of the sender's gossip; the address is the connection's.
    pub gossip_port: u16,
    /// The receiver's address, as the sender sees the address.
    pub observed_address: IpAddr,
}

/// The answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// The dialer is admitted; the listener sends its own `Hello`.
    Admitted(Hello),
    /// The dialer is not admitted, with the reason; the connection closes after this.
    Rejected(String),
}

/// A request on a stream of an admitted connection. One request a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Request whether the blob is present, and its length.
    Have(Digest),
    /// Request a range of a blob.
    Get {
        /// The blob.
        digest: Digest,
        /// The first byte of the range.
        offset: u64,
        /// The length of the range, in bytes.
        length: u64,
    },
    /// Request some of these pieces of a blob, as [`crate::oci::PieceLayout::for_size`] divides the
    /// blob.
    Pieces {
        /// The blob.
        digest: Digest,
        /// The acceptable pieces, in order of preference; at most
        /// [`crate::model::MAX_REQUEST_PIECES`].
        pieces: Vec<u32>,
        /// The largest number of pieces to send.
        limit: u8,
    },
    /// Request the hash chain of a blob.
    HashChain(Digest),
    /// Request the piece map of a blob, and updates as pieces arrive.
    Follow(Digest),
}

impl Request {
    /// Whether the request is served to peers of the same MAJOR only. These requests are the most
    /// likely to change with a MAJOR, and the other requests can replace them.
    pub fn needs_equal_majors(&self) -> bool {
        match self {
            Self::Have(_) | Self::Get { .. } => false,
            Self::Pieces { .. } | Self::HashChain(_) | Self::Follow(_) => true,
        }
    }
}

/// The answer to a request. After [`Answer::Blob`] follows exactly the requested content:
///
/// - to a `Get` the bytes;
/// - to a `HashChain` the states, 32 bytes each, one fewer than pieces;
/// - to a `Follow` nothing, as the whole blob is present.
///
/// After [`Answer::Partial`] to a `HashChain` the states follow too, and to a `Follow` follow
/// [`PieceMapUpdate`] messages until the end of the stream. After either answer to `Pieces` follow
/// pieces until the end of the stream: the number of each in four bytes, big endian, and its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// The whole blob is present.
    Blob {
        /// The whole blob's length in bytes.
        size: u64,
    },
    /// A part of the blob is present, and the rest is being fetched.
    Partial {
        /// The whole blob's length in bytes.
        size: u64,
    },
    /// The blob is absent.
    Absent,
    /// The agent serves as many requests as it may. The fetcher retries later, or at another peer.
    Busy,
    /// The range or a piece is outside of the blob.
    Invalid {
        /// The whole blob's length in bytes. The fetcher compares the length with the manifest's.
        size: u64,
    },
    /// The content store failed; another peer may have the blob.
    Failed,
}

impl Message for Hello {
    /// A ServiceAccount token is 1 to 2 KiB, a chain of certificates up to 12 KiB; a name has 253
    /// bytes. The rest is a reserve.
    const LIMIT: usize = 16 << 10;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for Welcome {
    /// A [`Hello`] and its variant's tag.
    const LIMIT: usize = Hello::LIMIT + 16;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for Request {
    /// A digest, [`crate::model::MAX_REQUEST_PIECES`] numbers of up to five bytes, and some bytes
    /// around them: 360. The rest is for fields of later releases.
    const LIMIT: usize = 512;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for Answer {
    /// One integer and the tag: 10 bytes. The rest is for fields of later releases.
    const LIMIT: usize = 64;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for PieceMapUpdate {
    /// One bit for each of [`MAX_PIECES`], or [`crate::model::MAX_HAVE_PIECES`] numbers of up to
    /// five bytes.
    const LIMIT: usize = MAX_PIECES as usize / 8 + 64;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}
