//! What agents say to each other on the mesh. [`crate::wire`] encodes it; what follows from it is `crate::decide::gossip`'s.
//!
//! Everything that is passed on carries its author's signature, so that any neighbour can relay it and none can invent it. What
//! exactly is signed is written down here, by hand, because it is part of the protocol: the codec may change, these bytes may not.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{Bits, Credential, InventoryChange, InventoryItem, NodeName, PeerId};
use crate::oci::Digest;

/// An ed25519 signature (RFC 8032): R and S.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature(pub [u8; 32], pub [u8; 32]);

/// Members that one agent knows at a time. Kubernetes supports 5000 nodes and some providers 15 000; a member
/// costs some 3 KiB.
pub const MAX_MEMBERS: usize = 16_384;

/// Most characters of a zone's name: a label's value has at most 63.
const MAX_ZONE: usize = 63;

/// Most characters of a release's name.
const MAX_RELEASE: usize = 32;

/// A failure domain, as the node's label `topology.kubernetes.io/zone` names it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Zone(String);

/// An agent's release, for people: `0.1.0`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Release(String);

/// The text cannot be a zone or a release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no name (1 to {1} of A-Z a-z 0-9 - _ . +)")]
pub struct NameError(String, usize);

macro_rules! name_type {
    ($type:ident, $limit:ident) => {
        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl TryFrom<String> for $type {
            type Error = NameError;

            /// Accepts what a label's value may be made of, and `+`, which bounds what a peer can put in our logs.
            fn try_from(name: String) -> Result<Self, NameError> {
                let fits = (1..=$limit).contains(&name.len())
                    && name.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+".contains(&b));
                if fits { Ok(Self(name)) } else { Err(NameError(name.chars().take(64).collect(), $limit)) }
            }
        }

        impl std::str::FromStr for $type {
            type Err = NameError;

            fn from_str(name: &str) -> Result<Self, NameError> {
                name.to_owned().try_into()
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> Self {
                name.0
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(Zone, MAX_ZONE);
name_type!(Release, MAX_RELEASE);

/// What an agent says of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// Its key.
    pub peer: PeerId,
    /// Chosen at the start of its process; a later start has a larger one.
    pub epoch: u64,
    /// Counts the introductions of this epoch: a later one replaces an earlier.
    pub version: u64,
    /// Its node.
    pub node: NodeName,
    /// Its node's zone, where the cluster has any.
    pub zone: Option<Zone>,
    /// What it runs.
    pub release: Release,
    /// Where it serves blobs (QUIC, UDP).
    pub transfer: SocketAddr,
    /// Where it gossips (libp2p, TCP).
    pub gossip: SocketAddr,
}

/// A [`Profile`], with the reason to believe that it is an agent of this cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// Who it is.
    pub profile: Profile,
    /// Good for this key alone, so it may be shown by anybody.
    pub credential: Credential,
    /// Over [`Introduction::signed`].
    pub signature: Signature,
}

/// Where a publisher's log stands after one of its entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHead {
    /// Whose log.
    pub publisher: PeerId,
    /// As in [`Profile::epoch`]; everything of an earlier one is void.
    pub epoch: u64,
    /// Counts entries within the epoch, from 1; before the first the log is empty.
    pub sequence: u64,
    /// Of the entry's changes ([`super::changes_digest`]).
    pub changes: Digest,
    /// Of everything that the publisher holds after it ([`super::state_digest`]), so that a relayed snapshot can be checked.
    pub state: Digest,
    /// Over [`Head::signed`].
    pub signature: Signature,
}

/// What changed at its publisher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Which entry, and the proof of it.
    pub head: LogHead,
    /// At most [`crate::model::MAX_CHANGES`].
    pub changes: Vec<InventoryChange>,
}

/// "This neighbour of mine does not answer."
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspicion {
    /// Who is silent.
    pub suspect: PeerId,
    /// Which process of it.
    pub epoch: u64,
    /// How often it had refuted before.
    pub incarnation: u64,
    /// Who says so.
    pub witness: PeerId,
    /// Over [`Suspicion::signed`], by that one.
    pub signature: Signature,
}

/// "I am alive."
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refutation {
    /// Who.
    pub peer: PeerId,
    /// Which process of it.
    pub epoch: u64,
    /// Larger than that of every suspicion that it answers.
    pub incarnation: u64,
    /// Over [`Refutation::signed`].
    pub signature: Signature,
}

/// "I am leaving."
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaveNotice {
    /// Who.
    pub peer: PeerId,
    /// Which process of it.
    pub epoch: u64,
    /// Over [`Farewell::signed`].
    pub signature: Signature,
}

/// What is told to everybody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gossip {
    /// What somebody holds has changed.
    Entry(LogEntry),
    /// Somebody is new, moved, or shows a new credential.
    Introduction(Introduction),
    /// Somebody does not answer.
    Suspicion(Suspicion),
    /// But it lives.
    Refutation(Refutation),
    /// Somebody leaves.
    Leave(LeaveNotice),
}

/// Where one member stands, as somebody knows it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberSummary {
    /// Which member.
    pub peer: PeerId,
    /// The epoch of its process.
    pub epoch: u64,
    /// The version of its introduction.
    pub version: u64,
    /// How often it refuted.
    pub incarnation: u64,
    /// Up to where its log is known.
    pub sequence: u64,
    /// It is held for dead.
    pub is_dead: bool,
}

/// What one neighbour asks another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SyncRequest {
    /// Which marks differ from mine? One hash for each bucket of members.
    Compare(Vec<u64>),
    /// Who are these?
    Introductions(Vec<PeerId>),
    /// What did this one say after this number?
    Entries {
        /// Whose log.
        publisher: PeerId,
        /// Which epoch of it.
        epoch: u64,
        /// The last number that the one who asks knows.
        after: u64,
    },
    /// What do these hold?
    Snapshot(Vec<PeerId>),
    /// I close our connection and live on. Nothing is asked; any reply will do.
    Disconnect,
}

/// What the neighbour answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SyncReply {
    /// The marks of those buckets that differ.
    Summaries(Vec<MemberSummary>),
    /// Those that are known, and what they last refuted.
    Introductions(Vec<Introduction>, Vec<Refutation>),
    /// In order, without a gap, as far as they are kept and fit.
    Entries(Vec<LogEntry>),
    /// Of those that are known, as many as fit.
    Snapshot(InventorySnapshot),
    /// Not now.
    Busy,
}

/// What several members hold. An item that many of them hold stands once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InventorySnapshot {
    /// Where their logs stand.
    pub heads: Vec<LogHead>,
    /// In order; a bit for each head, in the heads' order.
    pub items: Vec<(InventoryItem, Bits)>,
}

/// What comes before every signed text, so that a signature for one purpose is none for another.
fn purpose_prefix(purpose: &str) -> Vec<u8> {
    let mut text = b"lighterman/mesh/1/".to_vec();
    text.extend_from_slice(purpose.as_bytes());
    text.push(0);
    text
}

/// A text with its length, so that two texts in a row cannot be read in another way.
fn push_text(text: &mut Vec<u8>, part: &str) {
    text.extend_from_slice(&(part.len() as u64).to_be_bytes());
    text.extend_from_slice(part.as_bytes());
}

fn signed_text(purpose: &str, peers: &[PeerId], numbers: &[u64]) -> Vec<u8> {
    let mut text = purpose_prefix(purpose);
    peers.iter().for_each(|peer| text.extend_from_slice(peer.public_key()));
    numbers.iter().for_each(|number| text.extend_from_slice(&number.to_be_bytes()));
    text
}

impl LogHead {
    /// What its publisher signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { publisher, epoch, sequence, changes, state, signature: _ } = self;
        let mut text = signed_text("head", &[*publisher], &[*epoch, *sequence]);
        text.extend_from_slice(changes.as_bytes());
        text.extend_from_slice(state.as_bytes());
        text
    }
}

impl Introduction {
    /// What its subject signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { profile, credential, signature: _ } = self;
        let Profile { peer, epoch, version, node, zone, release, transfer, gossip } = profile;
        let mut text = signed_text("introduction", &[*peer], &[*epoch, *version]);
        push_text(&mut text, node.as_str());
        push_text(&mut text, zone.as_ref().map_or("", Zone::as_str));
        push_text(&mut text, release.as_str());
        push_text(&mut text, &transfer.to_string());
        push_text(&mut text, &gossip.to_string());
        push_text(&mut text, credential.expose());
        text
    }
}

impl Suspicion {
    /// What the one who suspects signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { suspect: accused, epoch, incarnation, witness: by, signature: _ } = self;
        signed_text("suspicion", &[*accused, *by], &[*epoch, *incarnation])
    }
}

impl Refutation {
    /// What the accused signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { peer, epoch, incarnation, signature: _ } = self;
        signed_text("refutation", &[*peer], &[*epoch, *incarnation])
    }
}

impl LeaveNotice {
    /// What the one who leaves signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { peer, epoch, signature: _ } = self;
        signed_text("farewell", &[*peer], &[*epoch])
    }
}

impl From<[u8; 64]> for Signature {
    fn from(bytes: [u8; 64]) -> Self {
        let (mut r, mut s) = ([0; 32], [0; 32]);
        r.copy_from_slice(&bytes[..32]);
        s.copy_from_slice(&bytes[32..]);
        Self(r, s)
    }
}

impl Signature {
    /// The 64 bytes.
    pub fn to_bytes(self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&self.0);
        bytes[32..].copy_from_slice(&self.1);
        bytes
    }
}
