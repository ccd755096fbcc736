//! What one agent knows of the others, as it tells on its admin port.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// An agent that does not answer in this time is asked again.
const ANSWER_WAIT: Duration = Duration::from_secs(2);

/// `/debug/mesh`, as far as it is looked at here.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct View {
    /// What this node announces.
    pub(super) items: usize,
    /// How many announcements it has made.
    pub(super) sequence: u64,
    /// Gossip that came, each message once.
    pub(super) messages_in: u64,
    members: Vec<Member>,
}

#[derive(Debug, Deserialize)]
struct Member {
    node: String,
    state: State,
    /// What is known of its content.
    items: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Alive,
    Suspected,
    Down,
}

impl View {
    /// How the agent sees it now; `None` while it does not answer.
    pub(super) async fn of(admin: SocketAddr) -> Option<Self> {
        let body = tokio::time::timeout(ANSWER_WAIT, get(admin, "/debug/mesh")).await.ok()??;
        Some(serde_json::from_str(&body).unwrap_or_else(|error| panic!("{error}: {body}")))
    }

    /// The nodes that are alive here with the number of items that this agent has of each.
    pub(super) fn alive(&self) -> BTreeMap<&str, usize> {
        let alive = self.members.iter().filter(|member| member.state == State::Alive);
        alive.map(|member| (member.node.as_str(), member.items)).collect()
    }

    /// Whether the node's content has been dropped: a suspected one's has not yet.
    pub(super) fn has_dropped(&self, node: &str) -> bool {
        self.members.iter().all(|member| member.node != node || member.state == State::Down)
    }
}

/// The body of a good answer; `None` where there is none.
async fn get(address: SocketAddr, path: &str) -> Option<String> {
    let mut connection = TcpStream::connect(address).await.ok()?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: agent\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await.ok()?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).await.ok()?;
    let (head, body) = answer.split_once("\r\n\r\n")?;
    head.starts_with("HTTP/1.1 200 ").then(|| body.to_owned())
}
