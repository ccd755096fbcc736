//! The mesh as one agent sees it, for people. `/debug/mesh` and `lighterman status --json` print
//! the fields under these names, so users may rely on the names.

use serde::{Deserialize, Serialize};

/// The mesh as one agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshStatus {
    /// This agent's node.
    pub node: String,
    /// This agent's PeerId.
    pub peer_id: String,
    /// This agent's release.
    pub release: String,
    /// The node's zone; absent in a cluster without zones.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Epoch of this agent's log.
    pub epoch: u64,
    /// Number of the log's last entry.
    pub sequence: u64,
    /// Items that this node announces.
    pub items: usize,
    /// Members that are alive, without this one.
    pub alive: usize,
    /// Members that are suspected.
    pub suspected: usize,
    /// Dead members that are still in the membership table.
    pub down: usize,
    /// Members that are banned.
    pub banned: usize,
    /// Members that answer over a connection.
    pub neighbors: usize,
    /// Members rejected since the start, because the membership table was full
    /// ([`crate::model::MAX_MEMBERS`]).
    pub over_limit: u64,
    /// Different blobs of all peers that are up.
    pub inventory_blobs: usize,
    /// Estimated memory of the inventory, in bytes.
    pub inventory_bytes: usize,
    /// Gossip messages received since the start. Copies of a message from several neighbors count
    /// once.
    pub messages_in: u64,
    /// Gossip messages published or relayed since the start, each counted once.
    pub messages_out: u64,
    /// The other members, by node.
    pub members: Vec<MemberStatus>,
}

/// One other member.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MemberStatus {
    /// The member's node.
    pub node: String,
    /// The member's PeerId.
    pub peer_id: String,
    /// The node's zone, if the node has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// The member's release.
    pub release: String,
    /// Address of the blob server.
    pub address: String,
    /// Liveness of the member.
    pub state: MemberState,
    /// Whether the member answers this agent over a connection.
    pub neighbor: bool,
    /// Items of the member in the inventory; 0 unless the member is up.
    pub items: usize,
    /// Number up to which the log is complete here.
    pub sequence: u64,
    /// Known entries of the member's log that are missing here.
    pub behind: u64,
    /// Seconds until the member's ban ends.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub banned_s: Option<u64>,
}

/// Liveness of a member.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MemberState {
    /// The member is up, and no member suspects it.
    Alive,
    /// Another member suspects the member, or its credential or a ban keeps the member from being
    /// up.
    Suspected,
    /// The member is confirmed dead, or left.
    #[default]
    Down,
}
