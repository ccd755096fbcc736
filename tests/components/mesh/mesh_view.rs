//! What one agent knows of the others, as it tells on its admin port.

use std::collections::BTreeMap;

use serde::Deserialize;

use crate::fleet::agent::Agent;

/// `/debug/mesh`, as far as it is looked at here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct MeshView {
    /// What this node announces.
    pub(super) items: usize,
    /// How many announcements it has made.
    pub(super) sequence: u64,
    /// Gossip that came, each message once.
    pub(super) messages_in: u64,
    members: Vec<MemberView>,
}

#[derive(Debug, Deserialize)]
struct MemberView {
    node: String,
    state: MemberState,
    /// What is known of its content.
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
    /// How the agent sees it now; `None` while it does not answer.
    pub(super) async fn of(agent: &Agent) -> Option<Self> {
        let body = agent.get("/debug/mesh").await?;
        Some(serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")))
    }

    /// The nodes that are alive here with the number of items that this agent has of each.
    pub(super) fn alive(&self) -> BTreeMap<&str, usize> {
        let alive = self.members.iter().filter(|member| member.state == MemberState::Alive);
        alive.map(|member| (member.node.as_str(), member.items)).collect()
    }

    /// Whether the node's content has been dropped: a suspected one's has not yet.
    pub(super) fn has_dropped(&self, node: &str) -> bool {
        self.members.iter().all(|member| member.node != node || member.state == MemberState::Down)
    }
}
