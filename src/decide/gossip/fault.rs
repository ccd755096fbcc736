//! Faults of members in the gossip protocol.

/// A fault of a member. A score adds the points of its faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum GossipFault {
    /// The publisher signed two different entries with one number.
    Contradiction,
    /// A signature is not the publisher's.
    Forged,
    /// A message exceeds its size limit.
    Oversized,
    /// A message is no valid encoding, or breaks a limit of its content.
    Malformed,
    /// The publisher's own snapshot does not match the state that the publisher signed.
    SnapshotMismatch,
    /// Requests exceed the neighbor's rate limit.
    TooMany,
}

impl GossipFault {
    /// The value of the metrics' labels `fault` and `reason`.
    pub fn label(self) -> &'static str {
        match self {
            Self::Contradiction => "contradiction",
            Self::Forged => "forged",
            Self::Oversized => "oversized",
            Self::Malformed => "malformed",
            Self::SnapshotMismatch => "snapshot_mismatch",
            Self::TooMany => "too_many",
        }
    }

    /// Points of 100 that ban a member. A fault that a neighbor may have relayed in good faith has
    /// fewer points than a fault that the neighbor must have made.
    pub(super) fn points(self) -> f64 {
        match self {
            Self::Contradiction => 100.0,
            Self::Forged | Self::Oversized | Self::Malformed => 34.0,
            Self::SnapshotMismatch => 20.0,
            Self::TooMany => 5.0,
        }
    }
}
