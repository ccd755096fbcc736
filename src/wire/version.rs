//! The versions of the protocols between agents.
//!
//! Gossip and transfer have a MAJOR each, so that a change of one does not end the other. An agent
//! speaks the current MAJOR of a protocol and the one before. The names that negotiate a MAJOR
//! (TLS's ALPN, libp2p's protocol and topic) follow from its number.

use std::fmt;

/// A protocol between agents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProtocolKind {
    /// Over libp2p: membership, and the content of each member.
    Gossip,
    /// Over QUIC: admission, and blobs.
    Transfer,
}

impl fmt::Display for ProtocolKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Gossip => "gossip",
            Self::Transfer => "transfer",
        })
    }
}

/// A version of a protocol, as each frame carries it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Changes when an agent of the MAJOR before could not read a message.
    pub major: u8,
    /// Changes when a message gets a field at its end, or an enum a variant.
    pub minor: u8,
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

/// The versions of one protocol that an agent reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    protocol: ProtocolKind,
    current: Version,
    /// `None` while the current MAJOR is the first that was released.
    previous: Option<Version>,
}

impl Versions {
    /// The versions of the messages of `crate::model` between members of the mesh.
    pub const GOSSIP: Self =
        Self { protocol: ProtocolKind::Gossip, current: Version { major: FIRST_MAJOR, minor: 0 }, previous: None };

    /// The versions of the messages of [`super`] and of `PieceMapUpdate`.
    pub const TRANSFER: Self =
        Self { protocol: ProtocolKind::Transfer, current: Version { major: FIRST_MAJOR, minor: 0 }, previous: None };

    /// The protocol of these versions.
    pub const fn protocol(self) -> ProtocolKind {
        self.protocol
    }

    /// The format of messages to peers of the same MAJOR.
    pub const fn current(self) -> Format {
        Format { version: self.current, is_previous: false }
    }

    /// The format of messages to peers of the MAJOR before.
    pub fn previous(self) -> Option<Format> {
        self.previous.map(|version| Format { version, is_previous: true })
    }

    /// Both formats, the preferred one first.
    pub fn formats(self) -> impl Iterator<Item = Format> {
        std::iter::once(self.current()).chain(self.previous())
    }

    /// The format of messages of this MAJOR.
    pub fn format(self, major: u8) -> Option<Format> {
        self.formats().find(|format| format.version.major == major)
    }

    /// The versions after the next change of MAJOR, with today's messages. Tests run two releases
    /// side by side.
    #[cfg(any(test, feature = "testing"))]
    pub const fn after_next_major(self) -> Self {
        let current = Version { major: self.current.major + 1, minor: 0 };
        Self { protocol: self.protocol, current, previous: Some(self.current) }
    }
}

impl fmt::Display for Versions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.previous {
            Some(previous) => write!(f, "{} and {previous}", self.current),
            None => self.current.fmt(f),
        }
    }
}

/// The first released MAJOR of either protocol. The names that negotiate this MAJOR are older than
/// the rule that a name carries the number of its MAJOR.
pub const FIRST_MAJOR: u8 = 4;

/// The format of a message: one of an agent's [`Versions`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Format {
    version: Version,
    is_previous: bool,
}

impl Format {
    /// The version in the frame.
    pub const fn version(self) -> Version {
        self.version
    }

    /// Whether this is the MAJOR before the agent's own.
    pub const fn is_previous(self) -> bool {
        self.is_previous
    }
}
