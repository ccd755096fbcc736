//! The common part of `status` and `pull`: the agent's socket, and the advice when the agent does
//! not answer.

use std::path::PathBuf;

use clap::Args;

use crate::control::{Client, ClientError};

#[derive(Debug, Args)]
pub(super) struct SocketArgs {
    /// The agent's socket: agent.sock in its data folder
    #[arg(long, env = "LIGHTERMAN_SOCKET", value_name = "PATH", default_value = "/var/lib/lighterman/agent.sock")]
    socket: PathBuf,
}

impl SocketArgs {
    pub(super) fn client(&self) -> Client {
        Client::new(&self.socket)
    }
}

/// The error and its remedy, in one line.
pub(super) fn with_advice(error: &ClientError) -> String {
    let advice = match error {
        ClientError::NoAgent(_) => {
            "Check that an agent runs on this node: `crictl ps --name lighterman` here, or `kubectl get pods -A -o wide`. \
             With another --data-dir, name the socket with --socket."
        }
        ClientError::NotAllowed(_) => "Only root may open the socket: use sudo, or kubectl exec into the agent's pod.",
        ClientError::TimedOut(_) => "See the agent's log.",
        ClientError::Rejected(_) => {
            "If this binary and the agent are of different releases, use the agent's own binary: kubectl exec."
        }
        ClientError::Broken(_) => "The agent may have stopped; retry when the agent runs.",
    };
    format!("{error}. {advice}")
}

/// Replaces control characters: a message can contain text of a peer or registry, and a terminal
/// must not interpret the text.
pub(super) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_replaced_before_printing() {
        assert_eq!(printable("a\u{1b}[2Jb\n\u{9b}c"), "a\u{fffd}[2Jb\u{fffd}\u{fffd}c");
    }
}
