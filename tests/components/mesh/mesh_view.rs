//! Mesh view of one agent from the admin port: the other members and their items.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::fleet::agent::Agent;

/// The fields of `/debug/mesh` that the tests read.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct MeshView {
    /// Items that this node announces.
    pub(super) items: usize,
    /// Announcements of this node so far.
    pub(super) sequence: u64,
    /// Gossip messages received, each counted once.
    pub(super) messages_in: u64,
    members: Vec<MemberView>,
}

#[derive(Debug, Deserialize)]
struct MemberView {
    node: String,
    state: MemberState,
    /// Items that this agent has recorded for the member.
    items: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum MemberState {
    Alive,
    Suspected,
    Down,
}

impl MeshView {
    /// Reads the current view. `None` while the agent does not answer.
    pub(super) async fn of(agent: &Agent) -> Option<Self> {
        let body = agent.get("/debug/mesh").await?;
        Some(serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")))
    }

    /// Alive nodes, each with the number of items that this agent has recorded.
    pub(super) fn alive(&self) -> BTreeMap<&str, usize> {
        let alive = self.members.iter().filter(|member| member.state == MemberState::Alive);
        alive.map(|member| (member.node.as_str(), member.items)).collect()
    }

    /// Whether the node's items are dropped. A suspected node keeps its items.
    pub(super) fn has_dropped(&self, node: &str) -> bool {
        self.members.iter().all(|member| member.node != node || member.state == MemberState::Down)
    }
}
