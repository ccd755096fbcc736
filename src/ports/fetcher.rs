//! Getting a blob from a peer.

use async_trait::async_trait;

use super::{BlobSink, PieceFetcher, StoreError};
use crate::model::PeerId;
use crate::oci::{BlobProof, Digest, VerifyError};

/// Fetches blobs from peers that were admitted: whole here, which is for small ones, and in pieces.
#[async_trait]
pub trait Fetcher: PieceFetcher {
    /// Streams the whole blob from `peer` into `sink`, in order, and proves on the way that it is the right one.
    ///
    /// Bounded: a peer that sends more than `size` bytes, or nothing for a while, is given up. When it fails, what
    /// `sink` received must be thrown away.
    ///
    /// # Errors
    /// [`FetchError`], which says whether another peer is worth a try.
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError>;

    /// The size of the blob as `peer` tells it, `None` when it does not hold it. Not proved, but bounded use can be made of it.
    ///
    /// # Errors
    /// As [`Fetcher::fetch`].
    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError>;
}

/// Why a blob did not come from a peer.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// No connection: unknown, down, cut off.
    #[error("peer {peer} cannot be reached: {reason}")]
    Unreachable {
        /// Who was called.
        peer: PeerId,
        /// Nothing at all came back, which a living peer does not do.
        silent: bool,
        /// What the transport said.
        reason: String,
    },
    /// The peer does not accept us, or we do not accept it.
    #[error("peer {peer} and this agent do not admit each other: {reason}")]
    NotAdmitted {
        /// Who was called.
        peer: PeerId,
        /// What the refusing side said.
        reason: String,
    },
    /// It announced the blob and does not have it any more.
    #[error("peer {peer} does not hold {digest}")]
    Absent {
        /// Who was asked.
        peer: PeerId,
        /// For what.
        digest: Digest,
    },
    /// It speaks another MAJOR of the transfer protocol, and was asked what needs equal ones.
    #[error("peer {peer} speaks another MAJOR of the transfer protocol")]
    OtherMajor {
        /// Who was asked.
        peer: PeerId,
    },
    /// It serves as many as it can at the moment.
    #[error("peer {peer} is busy")]
    Busy {
        /// Who was asked.
        peer: PeerId,
    },
    /// It stopped sending, or sends so little that it might as well.
    #[error("peer {peer} sent nothing of {digest}, or next to nothing, for {seconds} s")]
    Stalled {
        /// Who was sending.
        peer: PeerId,
        /// What.
        digest: Digest,
        /// The wait that was allowed.
        seconds: u64,
    },
    /// It cannot read the blob itself.
    #[error("peer {peer} says that its content store failed")]
    StoreFailed {
        /// Who was asked.
        peer: PeerId,
    },
    /// It sent other bytes than the digest asks for.
    #[error("peer {peer} sent wrong content: {source}")]
    Corrupt {
        /// Who sent them.
        peer: PeerId,
        /// What was wrong.
        source: VerifyError,
    },
    /// It sent a piece that does not fit the list of states that it is checked against. The piece or the list is wrong.
    #[error("piece {piece} of {digest} from peer {peer} does not fit")]
    PieceMismatch {
        /// Who sent it.
        peer: PeerId,
        /// Of which blob.
        digest: Digest,
        /// Which piece.
        piece: usize,
    },
    /// It broke the protocol, or speaks another version of it.
    #[error("peer {peer} broke the protocol: {reason}")]
    Protocol {
        /// Who.
        peer: PeerId,
        /// How.
        reason: String,
    },
    /// Our own store failed while the bytes came.
    #[error("while writing: {0}")]
    Sink(#[from] StoreError),
}

impl FetchError {
    /// Whether the peer did what no honest, healthy peer of this release does. A wrong size is not such a thing: the size was the
    /// manifest's word, and anybody may have written that.
    pub fn is_peer_fault(&self) -> bool {
        let lied = |source: &VerifyError| matches!(source, VerifyError::Digest { .. } | VerifyError::Piece { .. });
        matches!(self, Self::Corrupt { source, .. } if lied(source)) || matches!(self, Self::Protocol { .. })
    }

    /// Who failed; `None` when it was our own store.
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

    /// The kind, for the metric.
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

    /// Whether this same peer is worth asking again in a moment.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Busy { .. })
    }
}
