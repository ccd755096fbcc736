//! Errors of messages.

use std::io;

use super::{Version, Versions};

/// A message that cannot be used, or a stream that ended in the middle of a message.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The sender speaks a MAJOR that this agent does not speak.
    #[error("{}", other_version(*.theirs, *.ours))]
    Version {
        /// The version in the frame.
        theirs: Version,
        /// The versions of this agent.
        ours: Versions,
    },
    /// The sender runs another release, and the message has no meaning in this one. The sender did
    /// nothing wrong; the receiver ignores the message.
    #[error("a {} message of version {theirs} has no meaning to this agent ({ours}): {reason}", .ours.protocol())]
    Unknown {
        /// The version in the frame.
        theirs: Version,
        /// The versions of this agent.
        ours: Versions,
        /// The decoder's error.
        reason: String,
    },
    /// The message is longer than its type allows.
    #[error("a message of {length} bytes is over its limit of {limit}")]
    TooLong {
        /// The announced length.
        length: usize,
        /// The limit of this type of message.
        limit: usize,
    },
    /// The bytes are no message of this type.
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
