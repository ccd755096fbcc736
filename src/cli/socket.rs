//! What every question to the agent of this node has in common: where its socket is, and what to do when it does not answer.

use std::path::PathBuf;

use clap::Args;

use crate::control::{Client, ClientError};

/// Where the agent listens.
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

/// What happened, and what to do about it.
pub(super) fn with_advice(error: &ClientError) -> String {
    let advice = match error {
        ClientError::NoAgent(_) => {
            "Is it running on this node? `crictl ps --name lighterman` here, or `kubectl get pods -A -o wide` from anywhere, shows it. \
             With another --data-dir, name the socket with --socket."
        }
        ClientError::NotAllowed(_) => "It is for root alone: use sudo, or kubectl exec into the agent's pod.",
        ClientError::TimedOut(_) => "Its log says more.",
        ClientError::Rejected(_) => {
            "If this binary and the agent are of different releases, use the agent's own: kubectl exec."
        }
        ClientError::Broken(_) => "The agent may have been stopped; try again when it runs.",
    };
    format!("{error}. {advice}")
}

/// What others said may end up in a message; a terminal must not obey it.
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
