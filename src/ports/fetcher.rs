//! Transfer of a blob from a peer.

use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;

use super::{PieceMapUpdates, PieceSink, StateSink, StoreError};
use crate::model::{PeerId, PieceRequest};
use crate::oci::{BlobProof, Digest, HashChain, PieceLayout, VerifyError};

/// Fetches blobs from admitted peers: small blobs whole, other blobs in pieces.
#[async_trait]
pub trait Fetcher: Send + Sync + 'static {
    /// Streams the whole blob from `peer` into `sink`, in order, and verifies the digest on the
    /// way.
    ///
    /// Aborts when the peer sends more than `size` bytes, or nothing for a while. After an error
    /// the caller must delete the bytes in `sink`.
    ///
    /// # Errors
    /// [`FetchError`], from which the caller sees whether another peer is worth a try.
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError>;

    /// The blob's size according to `peer`, `None` when the peer lacks the blob. The size is not
    /// verified; use it only within bounds.
    ///
    /// # Errors
    /// As [`Fetcher::fetch`].
    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError>;

    /// Fetches the peer's hash chain. A peer without a chain computes it during the request, which
    /// takes the time to hash the blob. `heard` receives the states as they arrive, each once and
    /// in order.
    ///
    /// # Errors
    /// [`FetchError`]. The chain is not verified.
    async fn fetch_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
        sink: StateSink<'_>,
    ) -> Result<HashChain, FetchError>;

    /// Subscribes to the piece map of the peer.
    ///
    /// # Errors
    /// [`FetchError`]; [`FetchError::Absent`] when the peer has nothing of the blob.
    async fn follow(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError>;

    /// Passes pieces to `sink` as they arrive, until the peer has sent up to
    /// [`PieceRequest::limit`] pieces. Fewer pieces, or none, come from a peer that lacks them.
    ///
    /// Bounded like [`Fetcher::fetch`]: a peer that sends other pieces, or too slowly for
    /// long, is dropped.
    ///
    /// # Errors
    /// [`FetchError`]; pieces that ended before the error count.
    async fn fetch_pieces(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError>;

    /// Stores the hash chain of a verified blob of this node, for later requests of peers. A
    /// fetcher without a server stores nothing.
    fn keep_hash_chain(&self, _chain: Arc<HashChain>) {}
}

/// Receives fetched bytes, in order.
///
/// Called once per batch of chunks: at a gigabyte a second, one call per chunk would cost too much.
#[async_trait]
pub trait BlobSink: Send {
    /// Appends the chunks, one after the other.
    ///
    /// # Errors
    /// Any [`StoreError`]; the caller must then abandon the blob.
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError>;
}

/// Reason of a failed transfer from a peer.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No connection: unknown address, no answer, connection lost.
    #[error("peer {peer} cannot be reached: {reason}")]
    Unreachable {
        /// Provider.
        peer: PeerId,
        /// The peer sent nothing at all, as no running peer does.
        silent: bool,
        /// The transport's error.
        reason: String,
    },
    /// One side rejected the other's credential.
    #[error("peer {peer} and this agent do not admit each other: {reason}")]
    NotAdmitted {
        /// Provider.
        peer: PeerId,
        /// Reason of the rejecting side.
        reason: String,
    },
    /// The peer announced the blob and no longer has it.
    #[error("peer {peer} does not hold {digest}")]
    Absent {
        /// Provider.
        peer: PeerId,
        /// Requested blob.
        digest: Digest,
    },
    /// The peer speaks another MAJOR of the transfer protocol, and the request needs equal MAJORs.
    #[error("peer {peer} speaks another MAJOR of the transfer protocol")]
    OtherMajor {
        /// Provider.
        peer: PeerId,
    },
    /// The peer serves as many requests as it can at present.
    #[error("peer {peer} is busy")]
    Busy {
        /// Provider.
        peer: PeerId,
    },
    /// The peer stopped sending, or sends next to nothing.
    #[error("peer {peer} sent nothing of {digest}, or next to nothing, for {seconds} s")]
    Stalled {
        /// Provider.
        peer: PeerId,
        /// Requested blob.
        digest: Digest,
        /// Time limit in seconds.
        seconds: u64,
    },
    /// The peer cannot read the blob.
    #[error("peer {peer} reports that its content store failed")]
    StoreFailed {
        /// Provider.
        peer: PeerId,
    },
    /// The peer's bytes do not hash to the digest, or have another size.
    #[error("peer {peer} sent wrong content: {source}")]
    Corrupt {
        /// Provider.
        peer: PeerId,
        /// Difference.
        source: VerifyError,
    },
    /// The piece does not fit the hash chain; either the piece or the chain is wrong.
    #[error("piece {piece} of {digest} from peer {peer} does not fit")]
    PieceMismatch {
        /// Provider.
        peer: PeerId,
        /// Requested blob.
        digest: Digest,
        /// Index of the piece.
        piece: usize,
    },
    /// The peer violated the protocol, or speaks another version of it.
    #[error("peer {peer} broke the protocol: {reason}")]
    Protocol {
        /// Provider.
        peer: PeerId,
        /// Violation.
        reason: String,
    },
    /// This node's store failed during the transfer.
    #[error("while writing: {0}")]
    Sink(#[from] StoreError),
}

impl FetchError {
    /// Whether no honest, healthy peer of this release behaves so. A wrong size is no fault of the
    /// peer: the size came from a manifest of any author.
    pub fn is_peer_fault(&self) -> bool {
        let is_digest_mismatch =
            |source: &VerifyError| matches!(source, VerifyError::Digest { .. } | VerifyError::Piece { .. });
        matches!(self, Self::Corrupt { source, .. } if is_digest_mismatch(source))
            || matches!(self, Self::Protocol { .. })
    }

    /// Provider that failed; `None` when this node's store failed.
    pub fn peer(&self) -> Option<PeerId> {
        match self {
            Self::Unreachable { peer, .. }
            | Self::NotAdmitted { peer, .. }
            | Self::Absent { peer, .. }
            | Self::OtherMajor { peer }
            | Self::Busy { peer }
            | Self::StoreFailed { peer }
            | Self::Stalled { peer, .. }
            | Self::Corrupt { peer, .. }
            | Self::PieceMismatch { peer, .. }
            | Self::Protocol { peer, .. } => Some(*peer),
            Self::Sink(_) => None,
        }
    }

    /// Value of the metric's label.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Unreachable { .. } => "unreachable",
            Self::NotAdmitted { .. } => "not_admitted",
            Self::Absent { .. } => "absent",
            Self::OtherMajor { .. } => "other_major",
            Self::Busy { .. } => "busy",
            Self::Stalled { .. } => "stalled",
            Self::StoreFailed { .. } => "store_failed",
            Self::Corrupt { .. } => "corrupt",
            Self::PieceMismatch { .. } => "unfit",
            Self::Protocol { .. } => "protocol",
            Self::Sink(_) => "sink",
        }
    }

    /// Whether the same peer is worth another request in a moment.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}
