//! Dials a peer: compares the key, exchanges `Hello` and answer, and gets our own verdict. Nothing
//! uses the connection before the verdict.

use std::net::{IpAddr, SocketAddr};

use quinn::{Connection, ConnectionError};
use tokio::time::timeout;

use super::close_codes::{DONE, OTHER_VERSION, PROTOCOL, REJECTED, close};
use super::peers::PeerAdmission;
use super::tls::{format_of, peer_of};
use super::{Shared, admission_result, peer_from, printable};
use crate::model::{Credential, NodeName, NodeNameError, Peer, PeerId};
use crate::ports::{AdmittedPeer, DialError};
use crate::wire::{self, Format, Hello, Welcome, WireError};

impl Shared {
    /// Opens a connection to the agent at `address`. Cancellation closes the connection.
    pub(super) async fn dial(
        &self,
        address: SocketAddr,
        expect: Option<PeerId>,
    ) -> Result<(Peer, Connection, PeerAdmission), DialError> {
        let unreachable = |silent, reason: String| DialError::Unreachable { address, silent, reason };
        // TLS requires a name, and nothing verifies the name: peers are identified by their keys.
        let dialed = self.endpoint.connect_with(self.client.clone(), address, "lighterman");
        let connecting = dialed.map_err(|error| unreachable(false, error.to_string()))?;
        let connection = timeout(self.timeouts.dial, connecting)
            .await
            .map_err(|_| unreachable(true, format!("no answer in {:?}", self.timeouts.dial)))?
            .map_err(|error| unreachable(error == ConnectionError::TimedOut, error.to_string()))?;
        let found =
            peer_of(&connection).ok_or_else(|| unreachable(false, "the listener has no libp2p certificate".into()))?;
        if found == self.own_id {
            let node = timeout(self.timeouts.handshake(), self.node_with_own_key(address, &connection)).await;
            close(&connection, DONE, b"myself");
            return Err(match node.ok().flatten() {
                Some(node) => DialError::SharedKey { address, node },
                None => DialError::OwnAddress(address),
            });
        }
        if let Some(expected) = expect.filter(|expected| *expected != found) {
            close(&connection, DONE, b"another was expected");
            return Err(DialError::AnotherKey { address, expected, found });
        }
        let Some(format) = format_of(&connection, self.versions) else {
            let theirs = self.versions_of(&connection).await;
            return Err(DialError::OtherVersion { peer: found, address, theirs, ours: self.versions.to_string() });
        };
        match timeout(self.timeouts.handshake(), self.exchange_credentials(address, found, &connection, format)).await {
            Ok(Ok((peer, admission))) => Ok((peer, connection, admission)),
            Ok(Err(error)) => {
                close(&connection, close_code(&error), b"not welcome");
                Err(error)
            }
            Err(_) => {
                close(&connection, DONE, b"no answer");
                Err(unreachable(false, format!("no answer to our Hello within {:?}", self.timeouts.handshake())))
            }
        }
    }

    /// The versions that the listener reports when it closes a connection without a common MAJOR.
    async fn versions_of(&self, connection: &Connection) -> String {
        let versions = match timeout(self.timeouts.dial, connection.closed()).await {
            Ok(ConnectionError::ApplicationClosed(end)) if end.error_code == OTHER_VERSION => {
                printable(&String::from_utf8_lossy(&end.reason))
            }
            _ => String::new(),
        };
        close(connection, DONE, b"no common version");
        if versions.is_empty() { "another".to_owned() } else { versions }
    }

    /// The name of the other node at an address where this agent's own key answers. `None` where
    /// the address leads back to this agent: our acceptor rejects a `Hello` with our own key and
    /// node name. An agent that cannot decode the `Hello` counts as this agent.
    async fn node_with_own_key(&self, address: SocketAddr, connection: &Connection) -> Option<NodeName> {
        let format = format_of(connection, self.versions)?;
        let answer = self.send_hello(address, connection, format, Credential::default()).await.ok()?;
        let Welcome::Admitted(hello) = answer else { return None };
        let node = self.other_node_with_this_key(self.own_id, &hello)?;
        self.shared_key.send_replace(Some(node.clone()));
        Some(node)
    }

    async fn exchange_credentials(
        &self,
        address: SocketAddr,
        peer: PeerId,
        connection: &Connection,
        format: Format,
    ) -> Result<(Peer, PeerAdmission), DialError> {
        let credential = self.admission.credential().await.map_err(DialError::NoCredential)?;
        let theirs = match self.send_hello(address, connection, format, credential).await {
            Ok(Welcome::Admitted(hello)) => hello,
            Ok(Welcome::Rejected(reason)) => {
                return Err(DialError::Rejected { peer, address, reason: printable(&reason) });
            }
            Err(error) => return Err(handshake_error(address, peer, connection, &error)),
        };
        let verdict = self.admission.admit(peer, &theirs.credential).await;
        self.metrics.admission_decided(admission_result(verdict.as_ref()));
        let AdmittedPeer { node, pod, valid_until, is_in_grace: _ } =
            verdict.map_err(|rejection| DialError::NotAdmitted { peer, address, refusal: rejection })?;
        let protocol_error = |error: NodeNameError| DialError::Protocol { peer, address, reason: error.to_string() };
        self.observed_address.send_replace(Some(theirs.observed_address));
        let dialed_peer = peer_from(peer, address, &theirs, node).map_err(protocol_error)?;
        Ok((dialed_peer, PeerAdmission { credential: theirs.credential, valid_until, pod }))
    }

    async fn send_hello(
        &self,
        address: SocketAddr,
        connection: &Connection,
        format: Format,
        credential: Credential,
    ) -> Result<Welcome, WireError> {
        let (mut send, mut recv) = connection.open_bi().await.map_err(std::io::Error::from)?;
        wire::write_in(&mut send, &self.own_hello(credential, address.ip()), format).await?;
        // A stream that was just opened can be finished.
        let _ = send.finish();
        wire::read_in(&mut recv, self.versions).await
    }

    /// Our `Hello` for a peer whose address is `seen` from here.
    pub(super) fn own_hello(&self, credential: Credential, observed_address: IpAddr) -> Hello {
        Hello { credential, node: self.node.to_string(), gossip_port: self.gossip_port, observed_address }
    }
}

fn close_code(error: &DialError) -> quinn::VarInt {
    match error {
        DialError::NotAdmitted { .. } => REJECTED,
        DialError::Protocol { .. } => PROTOCOL,
        _ => DONE,
    }
}

/// A rejection may arrive as the close of the connection alone. The close reason says more than the
/// error of the stream.
fn handshake_error(address: SocketAddr, peer: PeerId, connection: &Connection, error: &WireError) -> DialError {
    let protocol = || DialError::Protocol { peer, address, reason: error.to_string() };
    if !matches!(error, WireError::Io(_)) {
        return protocol();
    }
    match connection.close_reason() {
        Some(ConnectionError::ApplicationClosed(close)) if close.error_code == REJECTED => {
            let reason = printable(&String::from_utf8_lossy(&close.reason));
            DialError::Rejected { peer, address, reason }
        }
        Some(ended) => DialError::Unreachable { address, silent: false, reason: ended.to_string() },
        None => protocol(),
    }
}
