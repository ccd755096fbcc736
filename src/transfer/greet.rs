//! Dialling: whose key answers, our `Hello`, its answer, and our own decision about it. Nothing uses a connection before.

use std::net::{IpAddr, SocketAddr};

use quinn::{ConnectError, Connection, ConnectionError};
use tokio::time::timeout;

use super::codes::{DONE, OTHER_VERSION, PROTOCOL, REFUSED, close};
use super::peers::Standing;
use super::tls::{format_of, peer_of};
use super::{Shared, admission_result, peer_from, printable};
use crate::model::{Credential, NodeName, NodeNameError, Peer, PeerId};
use crate::ports::{Admitted, Refusal};
use crate::wire::{self, Format, Hello, Versions, Welcome, WireError};

/// Why nobody was met at an address.
#[derive(Debug, Clone, thiserror::Error)]
pub enum GreetError {
    /// The address leads back to this agent.
    #[error("{0} is this agent itself")]
    Myself(SocketAddr),
    /// Another node's agent has this agent's key.
    #[error("node {node} at {address} has the key of this node, as after a copy of a node's disk")]
    SharedKey {
        /// The dialled address.
        address: SocketAddr,
        /// The name that the other agent gives.
        node: NodeName,
    },
    /// Nobody answers, or not in our protocol.
    #[error("{address} cannot be reached: {reason}")]
    Unreachable {
        /// Who was called.
        address: SocketAddr,
        /// Nothing at all came back.
        silent: bool,
        /// What the transport said.
        reason: String,
    },
    /// Somebody else answers than the peer that was meant.
    #[error("{found} answers at {address} where {expected} was expected")]
    AnotherKey {
        /// Who was called.
        address: SocketAddr,
        /// The peer that was meant.
        expected: PeerId,
        /// The peer that proved its key.
        found: PeerId,
    },
    /// The peer does not admit us.
    #[error("peer {peer} at {address} refuses this agent: {reason}")]
    Refused {
        /// Who refuses.
        peer: PeerId,
        /// Where.
        address: SocketAddr,
        /// Its words.
        reason: String,
    },
    /// We do not admit the peer.
    #[error("peer {peer} at {address}: {refusal}")]
    NotAdmitted {
        /// Who it is about.
        peer: PeerId,
        /// Where.
        address: SocketAddr,
        /// Our admission's words.
        refusal: Refusal,
    },
    /// It speaks no MAJOR of the transfer protocol that we speak.
    #[error(
        "peer {peer} at {address} speaks version {theirs} of the transfer protocol and this agent {ours}; \
         upgrade the older of the two, as agents are compatible across one MAJOR only"
    )]
    OtherVersion {
        /// Who.
        peer: PeerId,
        /// Where.
        address: SocketAddr,
        /// What it says that it speaks.
        theirs: String,
        /// What this agent speaks.
        ours: Versions,
    },
    /// We have nothing to show.
    #[error("this agent has no credential to show: {0}")]
    NoCredential(Refusal),
    /// The peer did not keep to the protocol, or speaks another version of it.
    #[error("peer {peer} at {address} broke the protocol: {reason}")]
    Protocol {
        /// Who.
        peer: PeerId,
        /// Where.
        address: SocketAddr,
        /// How.
        reason: String,
    },
}

impl GreetError {
    /// Whether nothing at all came back, as from a host that is gone. Any answer, a refusal too, is a sign of life.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable { silent: true, .. })
    }
}

impl Shared {
    /// Opens a connection to whoever is at `address`. Cancelled half-way it is closed.
    pub(super) async fn dial(
        &self,
        address: SocketAddr,
        expect: Option<PeerId>,
    ) -> Result<(Peer, Connection, Standing), GreetError> {
        let unreachable = |silent, reason: String| GreetError::Unreachable { address, silent, reason };
        // The name is asked for by TLS and checked by nobody: peers are known by their keys.
        let dialled = self.endpoint.connect_with(self.client.clone(), address, "lighterman");
        let connecting = dialled.map_err(|error| unreachable(false, error.to_string()))?;
        let connection = timeout(self.limits.dial, connecting)
            .await
            .map_err(|_| unreachable(true, format!("no answer in {:?}", self.limits.dial)))?
            .map_err(|error| unreachable(error == ConnectionError::TimedOut, error.to_string()))?;
        let found = peer_of(&connection).ok_or_else(|| unreachable(false, "it has no peer's certificate".into()))?;
        if found == self.me {
            let node = timeout(self.limits.welcome(), self.node_behind_own_key(address, &connection)).await;
            close(&connection, DONE, b"myself");
            return Err(match node.ok().flatten() {
                Some(node) => GreetError::SharedKey { address, node },
                None => GreetError::Myself(address),
            });
        }
        if let Some(expected) = expect.filter(|expected| *expected != found) {
            close(&connection, DONE, b"another was expected");
            return Err(GreetError::AnotherKey { address, expected, found });
        }
        let Some(format) = format_of(&connection, self.versions) else {
            let theirs = self.versions_of(&connection).await;
            return Err(GreetError::OtherVersion { peer: found, address, theirs, ours: self.versions });
        };
        match timeout(self.limits.welcome(), self.introduce(address, found, &connection, format)).await {
            Ok(Ok((peer, standing))) => Ok((peer, connection, standing)),
            Ok(Err(error)) => {
                close(&connection, close_code(&error), b"not welcome");
                Err(error)
            }
            Err(_) => {
                close(&connection, DONE, b"no answer");
                Err(unreachable(false, format!("no answer to our introduction in {:?}", self.limits.welcome())))
            }
        }
    }

    /// Whether anything comes back from there.
    pub(super) async fn answers(&self, address: SocketAddr) -> Result<bool, ConnectError> {
        let connecting = self.endpoint.connect_with(self.client.clone(), address, "lighterman")?;
        Ok(match timeout(self.limits.dial, connecting).await {
            Ok(Ok(connection)) => {
                close(&connection, DONE, b"probe");
                true
            }
            // A refusal, or another protocol.
            Ok(Err(error)) => error != ConnectionError::TimedOut,
            Err(_) => false,
        })
    }

    /// What the listener says that it speaks, when it closes a connection without a common MAJOR.
    async fn versions_of(&self, connection: &Connection) -> String {
        let said = match timeout(self.limits.dial, connection.closed()).await {
            Ok(ConnectionError::ApplicationClosed(end)) if end.error_code == OTHER_VERSION => {
                printable(&String::from_utf8_lossy(&end.reason))
            }
            _ => String::new(),
        };
        close(connection, DONE, b"no common version");
        if said.is_empty() { "another".to_owned() } else { said }
    }

    /// The name of the other node at an address where this agent's own key answers; `None` where
    /// the address leads back here. This agent's own door refuses a `Hello` of this node. An agent
    /// that cannot make sense of the `Hello` is taken for this one, as before.
    async fn node_behind_own_key(&self, address: SocketAddr, connection: &Connection) -> Option<NodeName> {
        let format = format_of(connection, self.versions)?;
        let answer = self.exchange(address, connection, format, Credential::default()).await.ok()?;
        let Welcome::Admitted(hello) = answer else { return None };
        let node = self.other_node_with_this_key(self.me, &hello)?;
        self.shared_key.send_replace(Some(node.clone()));
        Some(node)
    }

    async fn introduce(
        &self,
        address: SocketAddr,
        peer: PeerId,
        connection: &Connection,
        format: Format,
    ) -> Result<(Peer, Standing), GreetError> {
        let credential = self.admission.credential().await.map_err(GreetError::NoCredential)?;
        let theirs = match self.exchange(address, connection, format, credential).await {
            Ok(Welcome::Admitted(hello)) => hello,
            Ok(Welcome::Refused(reason)) => {
                return Err(GreetError::Refused { peer, address, reason: printable(&reason) });
            }
            Err(error) => return Err(why_no_welcome(address, peer, connection, &error)),
        };
        let decided = self.admission.admit(peer, &theirs.credential).await;
        self.metrics.admission_decided(admission_result(decided.as_ref()));
        let Admitted { node, pod, until, on_grace: _ } =
            decided.map_err(|refusal| GreetError::NotAdmitted { peer, address, refusal })?;
        let broken = |error: NodeNameError| GreetError::Protocol { peer, address, reason: error.to_string() };
        self.seen.send_replace(Some(theirs.seen));
        let met = peer_from(peer, address, &theirs, node).map_err(broken)?;
        Ok((met, Standing { credential: theirs.credential, until, pod }))
    }

    async fn exchange(
        &self,
        address: SocketAddr,
        connection: &Connection,
        format: Format,
        credential: Credential,
    ) -> Result<Welcome, WireError> {
        let (mut send, mut recv) = connection.open_bi().await.map_err(std::io::Error::from)?;
        wire::write_in(&mut send, &self.hello(credential, address.ip()), format).await?;
        // It was just opened, so it can be finished.
        let _ = send.finish();
        wire::read_in(&mut recv, self.versions).await
    }

    /// What we say of ourselves to whom we see at this address.
    pub(super) fn hello(&self, credential: Credential, seen: IpAddr) -> Hello {
        Hello { credential, node: self.node.to_string(), gossip_port: self.gossip_port, seen }
    }
}

fn close_code(error: &GreetError) -> quinn::VarInt {
    match error {
        GreetError::NotAdmitted { .. } => REFUSED,
        GreetError::Protocol { .. } => PROTOCOL,
        _ => DONE,
    }
}

/// A refusal may arrive as the connection's end alone; what ended the connection says more than the broken stream.
fn why_no_welcome(address: SocketAddr, peer: PeerId, connection: &Connection, error: &WireError) -> GreetError {
    let protocol = || GreetError::Protocol { peer, address, reason: error.to_string() };
    if !matches!(error, WireError::Io(_)) {
        return protocol();
    }
    match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close)) if close.error_code == REFUSED => {
            let reason = printable(&String::from_utf8_lossy(&close.reason));
            GreetError::Refused { peer, address, reason }
        }
        Some(ended) => GreetError::Unreachable { address, silent: false, reason: ended.to_string() },
        None => protocol(),
    }
}
