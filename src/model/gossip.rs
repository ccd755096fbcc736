//! The messages of the gossip protocol. [`crate::wire`] encodes them, and `crate::decide::gossip`
//! acts on them.
//!
//! Every relayed message carries its author's signature, so any neighbor can relay a message and
//! none can forge one. The signed bytes are written by hand here, because the protocol fixes them:
//! the codec may change, the signed bytes may not.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::{Bits, Credential, InventoryChange, InventoryItem, NodeName, PeerId};
use crate::oci::Digest;

/// An ed25519 signature (RFC 8032): R and S.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Signature(pub [u8; 32], pub [u8; 32]);

/// Most members in an agent's membership table. Kubernetes supports 5000 nodes and some providers
/// 15 000. A member costs some 3 KiB.
pub const MAX_MEMBERS: usize = 16_384;

/// Longest name of a zone, in bytes: a label's value has at most 63.
const MAX_ZONE: usize = 63;

/// Longest name of a release, in bytes.
const MAX_RELEASE: usize = 32;

/// A failure domain: the value of the node's label `topology.kubernetes.io/zone`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Zone(String);

/// An agent's release, such as `0.1.0`. Only people read the text; the protocol ignores it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Release(String);

/// The text cannot be a zone or a release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a valid zone or release (1 to {1} of A-Z a-z 0-9 - _ . +)")]
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

            /// Accepts the characters of a label's value, and `+`. The check bounds what a peer can
            /// write into our logs.
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

/// An agent's description of itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Profile {
    /// The agent's key.
    pub peer: PeerId,
    /// Chosen at the start of the process. A later start of the same node has a larger epoch.
    pub epoch: u64,
    /// Counts the introductions of this epoch. A later version replaces an earlier one.
    pub version: u64,
    /// The agent's node.
    pub node: NodeName,
    /// Zone of the node; `None` in a cluster without zones.
    pub zone: Option<Zone>,
    /// The agent's release.
    pub release: Release,
    /// Address of the blob server (QUIC, UDP).
    pub transfer: SocketAddr,
    /// Address for gossip (libp2p, TCP).
    pub gossip: SocketAddr,
}

/// A [`Profile`] with the credential that admits the agent to the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    /// The introduced agent.
    pub profile: Profile,
    /// Good for the agent's key alone, so every member may relay the credential.
    pub credential: Credential,
    /// Over [`Introduction::signed_bytes`].
    pub signature: Signature,
}

/// The state of a publisher's log after one of its entries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogHead {
    /// The log's publisher.
    pub publisher: PeerId,
    /// As in [`Profile::epoch`]. A larger epoch voids the entries of earlier epochs.
    pub epoch: u64,
    /// Number of the entry within the epoch, from 1.
    pub sequence: u64,
    /// Digest of the entry's changes ([`super::changes_digest`]).
    pub changes: Digest,
    /// Digest of all items of the publisher after the entry ([`super::state_digest`]). Proves a
    /// relayed snapshot.
    pub state: Digest,
    /// Over [`LogHead::signed_bytes`].
    pub signature: Signature,
}

/// One entry of a publisher's log: changes of its inventory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Number and signature of the entry.
    pub head: LogHead,
    /// At most [`crate::model::MAX_CHANGES`].
    pub changes: Vec<InventoryChange>,
}

/// A neighbor does not answer, as in SWIM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Suspicion {
    /// The silent member.
    pub suspect: PeerId,
    /// Epoch of the silent process.
    pub epoch: u64,
    /// The suspect's incarnation, as the witness has it.
    pub incarnation: u64,
    /// The member that suspects.
    pub witness: PeerId,
    /// Over [`Suspicion::signed_bytes`], by the witness.
    pub signature: Signature,
}

/// A suspected member is alive, as in SWIM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refutation {
    /// The suspected member.
    pub peer: PeerId,
    /// Epoch of the member's process.
    pub epoch: u64,
    /// Larger than the incarnation of every refuted suspicion.
    pub incarnation: u64,
    /// Over [`Refutation::signed_bytes`].
    pub signature: Signature,
}

/// A member leaves the mesh.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaveNotice {
    /// The member that leaves.
    pub peer: PeerId,
    /// Epoch of the member's process.
    pub epoch: u64,
    /// Over [`LeaveNotice::signed_bytes`].
    pub signature: Signature,
}

/// A message that members relay to all members.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Gossip {
    /// A publisher's inventory changed.
    Entry(LogEntry),
    /// A member is new, moved, or has a new credential.
    Introduction(Introduction),
    /// A member does not answer.
    Suspicion(Suspicion),
    /// A suspected member is alive.
    Refutation(Refutation),
    /// A member leaves.
    Leave(LeaveNotice),
}

/// The state of one member, as another agent has it. Neighbors compare their summaries.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberSummary {
    /// The summarized member.
    pub peer: PeerId,
    /// Epoch of the member's process.
    pub epoch: u64,
    /// Version of the member's latest introduction.
    pub version: u64,
    /// Incarnation of the member's latest refutation; 0 without a refutation.
    pub incarnation: u64,
    /// Number up to which the log is complete.
    pub sequence: u64,
    /// The member is dead, or has not refuted its death yet.
    pub is_dead: bool,
}

/// A request to one neighbor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SyncRequest {
    /// Requests the summaries of the buckets that differ from these hashes, one hash per bucket.
    Compare(Vec<u64>),
    /// Requests the introductions of these members.
    Introductions(Vec<PeerId>),
    /// Requests the entries of one log after a number.
    Entries {
        /// The log's publisher.
        publisher: PeerId,
        /// The log's epoch.
        epoch: u64,
        /// Number of the last entry that the requester has.
        after: u64,
    },
    /// Requests all items of these members.
    Snapshot(Vec<PeerId>),
    /// The requester closes the connection and stays a member. Every reply will do.
    Disconnect,
}

/// A neighbor's reply.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum SyncReply {
    /// Summaries of the members in the buckets that differ.
    Summaries(Vec<MemberSummary>),
    /// Introductions of the requested members that have a valid credential, as many as fit, and the
    /// latest refutations of these members.
    Introductions(Vec<Introduction>, Vec<Refutation>),
    /// Entries in order and without a gap, as many as are kept and fit.
    Entries(Vec<LogEntry>),
    /// Items of the requested members whose logs can be proved, as many as fit.
    Snapshot(InventorySnapshot),
    /// No answer: the requester is not a member, is banned, or is over the rate limit.
    Busy,
}

/// The items of several members. An item that many members have is listed once.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct InventorySnapshot {
    /// Heads of the members' logs.
    pub heads: Vec<LogHead>,
    /// Sorted items. Bit `i` is set when the publisher of head `i` has the item.
    pub items: Vec<(InventoryItem, Bits)>,
}

/// Prefix of every signed text. A signature for one purpose never verifies for another.
fn purpose_prefix(purpose: &str) -> Vec<u8> {
    let mut text = b"lighterman/mesh/1/".to_vec();
    text.extend_from_slice(purpose.as_bytes());
    text.push(0);
    text
}

/// Appends the length before the text, so two texts in a row have one reading.
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
    /// The bytes that the publisher signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { publisher, epoch, sequence, changes, state, signature: _ } = self;
        let mut text = signed_text("head", &[*publisher], &[*epoch, *sequence]);
        text.extend_from_slice(changes.as_bytes());
        text.extend_from_slice(state.as_bytes());
        text
    }
}

impl Introduction {
    /// The bytes that the introduced agent signs.
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
    /// The bytes that the witness signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { suspect, epoch, incarnation, witness, signature: _ } = self;
        signed_text("suspicion", &[*suspect, *witness], &[*epoch, *incarnation])
    }
}

impl Refutation {
    /// The bytes that the suspected member signs.
    pub fn signed_bytes(&self) -> Vec<u8> {
        let Self { peer, epoch, incarnation, signature: _ } = self;
        signed_text("refutation", &[*peer], &[*epoch, *incarnation])
    }
}

impl LeaveNotice {
    /// The bytes that the leaving member signs.
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
    /// R and S, 64 bytes.
    pub fn to_bytes(self) -> [u8; 64] {
        let mut bytes = [0; 64];
        bytes[..32].copy_from_slice(&self.0);
        bytes[32..].copy_from_slice(&self.1);
        bytes
    }
}
