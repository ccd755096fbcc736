//! How the mesh looks from one agent, for people. The names of the fields are what `/debug/mesh` and `lighterman status --json` print,
//! so they are part of what users may rely on.

use serde::{Deserialize, Serialize};

/// The mesh as one agent sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MeshStatus {
    /// This agent's node.
    pub node: String,
    /// Its key.
    pub peer_id: String,
    /// Its release.
    pub release: String,
    /// Its zone, where the cluster has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Its log's epoch.
    pub epoch: u64,
    /// Its log's last number.
    pub sequence: u64,
    /// What it announces.
    pub items: usize,
    /// Members that are alive, without this one.
    pub alive: usize,
    /// Members that are suspected.
    pub suspected: usize,
    /// Members that are held for dead and not forgotten yet.
    pub down: usize,
    /// Members that misbehaved and are ignored for a while.
    pub banned: usize,
    /// Members that this agent is connected to.
    pub neighbours: usize,
    /// Times since the start that an agent was no member, because as many members are known as may be
    /// ([`crate::model::MAX_MEMBERS`]).
    pub over_limit: u64,
    /// Different blobs that others hold together.
    pub inventory_blobs: usize,
    /// What the table of who holds what takes, in bytes.
    pub inventory_bytes: usize,
    /// Gossip messages that came since the start, each counted once however many neighbours sent it.
    pub messages_in: u64,
    /// Gossip messages that were published or passed on since the start, each counted once.
    pub messages_out: u64,
    /// The others, by node.
    pub members: Vec<MemberStatus>,
}

/// One other member.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct MemberStatus {
    /// Its node.
    pub node: String,
    /// Its key.
    pub peer_id: String,
    /// Its zone, where it has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// Its release.
    pub release: String,
    /// Where it serves blobs.
    pub address: String,
    /// Whether it lives.
    pub state: MemberState,
    /// Whether this agent is connected to it.
    pub neighbour: bool,
    /// What it announces, as far as it is known.
    pub items: usize,
    /// Up to where its log is known.
    pub sequence: u64,
    /// How many entries of its log are known to be missing here.
    pub behind: u64,
    /// For how many more seconds it is ignored, if it misbehaved.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub banned_s: Option<u64>,
}

/// Whether a member lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub enum MemberState {
    /// It answers its neighbours.
    Alive,
    /// A neighbour says that it does not.
    Suspected,
    /// Two said so, or it said farewell.
    #[default]
    Down,
}
