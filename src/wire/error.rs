//! Why a message cannot be used.

use std::io;

use super::{Version, Versions};

/// A message that cannot be used, or a stream that ended in the middle of one.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The sender speaks a MAJOR that this agent does not.
    #[error("{}", other_version(*.theirs, *.ours))]
    Version {
        /// The version of its frame.
        theirs: Version,
        /// The versions of this agent.
        ours: Versions,
    },
    /// The sender is of another release, and the message has no meaning in this one. The sender did
    /// nothing wrong; the receiver ignores the message.
    #[error("a {} message of version {theirs} means nothing to this agent ({ours}): {reason}", .ours.protocol())]
    Unknown {
        /// The version of its frame.
        theirs: Version,
        /// The versions of this agent.
        ours: Versions,
        /// The decoder's error.
        reason: String,
    },
    /// Longer than its kind may be.
    #[error("a message of {length} bytes is over its limit of {limit}")]
    TooLong {
        /// The length that was announced.
        length: usize,
        /// The limit of this kind of message.
        limit: usize,
    },
    /// Not a message of this kind.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// The connection failed, or ended too early.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
}

fn other_version(theirs: Version, ours: Versions) -> String {
    let older = if theirs > ours.current().version() { "this agent" } else { "that peer" };
    format!(
        "the peer speaks version {theirs} of the {} protocol and this agent {ours}; \
         upgrade {older}, as agents are compatible across one MAJOR only",
        ours.protocol()
    )
}
