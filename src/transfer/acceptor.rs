//! Admits connections. An unauthenticated connection gets one stream for its `Hello`, within a
//! deadline, and nothing else until our admission accepts the credential.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use quinn::{Connection, Incoming, SendStream, VarInt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::close_codes::{DONE, OTHER_VERSION, PROTOCOL, REJECTED, close};
use super::peers::PeerAdmission;
use super::tls::{format_of, peer_of};
use super::tuning::MAX_STREAMS;
use super::{Shared, admission_result, canonical, peer_from, printable};
use crate::decide::subnet::Subnet;
use crate::model::{Credential, NodeName, Peer, PeerId};
use crate::ports::{AdmittedPeer, LEEWAY, Rejection};
use crate::wire::{self, Format, Hello, Versions, Welcome};

/// Unauthenticated connections at a time. Each costs a handshake's CPU and some ten KiB. A thousand
/// nodes that start together are admitted within a few seconds, since refused dialers try again.
const MAX_HANDSHAKES: usize = 32;

/// Unauthenticated connections from one address at a time, so that one pod cannot take all permits.
/// An agent needs one, or two when a dial of the joiner and a fetch coincide. The rest is for
/// several agents on one machine, as in a demonstration.
const MAX_HANDSHAKES_PER_ADDRESS: usize = 8;

/// Unauthenticated connections from one IPv6 subnet at a time; a host there may choose among 2^64
/// addresses. A quarter of the permits is left to other subnets: pods and nodes have different
/// subnets as a rule. Nodes of one subnet that start together share the rest.
const MAX_HANDSHAKES_PER_SUBNET: usize = MAX_HANDSHAKES * 3 / 4;

/// From this number of unauthenticated connections on, an address is validated by a round trip (RFC
/// 9000, section 8.1.2) before its packets cost anything.
const RETRY_THRESHOLD: usize = 8;

/// Bounds the unauthenticated connections, by address, by subnet and in all.
#[derive(Default)]
pub(super) struct HandshakeLimiter {
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

/// The permit of one unauthenticated connection; released when dropped.
pub(super) struct HandshakePermit {
    limiter: Arc<HandshakeLimiter>,
    address: IpAddr,
}

impl HandshakeLimiter {
    /// `None` when the address, its subnet or the whole limiter has no permit left.
    pub(super) fn try_acquire(self: &Arc<Self>, address: IpAddr) -> Option<HandshakePermit> {
        let mut handshakes = self.by_address.lock();
        let from_address = handshakes.get(&address).copied().unwrap_or(0);
        let is_same_subnet = |other: IpAddr| Subnet::of(other) == Subnet::of(address);
        let from_subnet: usize =
            handshakes.iter().filter(|(other, _)| is_same_subnet(**other)).map(|(_, count)| count).sum();
        if from_address >= MAX_HANDSHAKES_PER_ADDRESS || from_subnet >= MAX_HANDSHAKES_PER_SUBNET {
            return None;
        }
        if handshakes.values().sum::<usize>() >= MAX_HANDSHAKES {
            return None;
        }
        handshakes.insert(address, from_address + 1);
        Some(HandshakePermit { limiter: self.clone(), address })
    }

    /// Whether an unvalidated address has to be validated now.
    pub(super) fn is_retry_required(&self) -> bool {
        self.by_address.lock().values().sum::<usize>() >= RETRY_THRESHOLD
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        let mut handshakes = self.limiter.by_address.lock();
        if let Some(count) = handshakes.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                handshakes.remove(&self.address);
            }
        }
    }
}

/// Why a dialer was not admitted.
#[derive(Debug, thiserror::Error)]
enum AcceptError {
    #[error("the QUIC handshake failed: {0}")]
    Handshake(String),
    #[error("no valid Hello: {0}")]
    NoHello(String),
    #[error(
        "peer {0} speaks no version of the transfer protocol that this agent speaks ({1}); \
         upgrade the older of the two, as agents are compatible across one MAJOR only"
    )]
    OtherVersion(PeerId, Versions),
    #[error("peer {0}: {1}")]
    Rejected(PeerId, Rejection),
    #[error("peer {0} closed the connection: {1}")]
    Left(PeerId, String),
    #[error("node {0} has the key of this node")]
    SharedKey(NodeName),
}

impl Shared {
    /// Handles an inbound connection, from the first packet to the last stream served on it.
    pub(super) async fn handle_connection(
        self: Arc<Self>,
        incoming: Incoming,
        permit: HandshakePermit,
        stop: CancellationToken,
    ) {
        let address = canonical(incoming.remote_address());
        let authenticated = tokio::select! {
            () = stop.cancelled() => return,
            authenticated = self.authenticate(incoming) => authenticated,
        };
        drop(permit);
        match authenticated {
            Ok((peer, connection)) => {
                tracing::debug!(peer = %peer.id, node = %peer.node, %address, "peer admitted");
                self.peers.add_inbound(peer.id, &connection);
                self.serve_connection(peer.id, &connection, stop).await;
                self.peers.remove_inbound(peer.id, &connection);
                close(&connection, DONE, b"done");
            }
            Err(error) => self.log_accept_error(address, &error),
        }
    }

    fn log_accept_error(&self, address: SocketAddr, error: &AcceptError) {
        let is_new = match error {
            AcceptError::Rejected(_, rejection) => {
                self.rejection_log.record(address.ip(), admission_result(Err(rejection)))
            }
            AcceptError::OtherVersion(..) => self.rejection_log.record(address.ip(), "other_version"),
            _ => false,
        };
        match error {
            _ if is_new => tracing::warn!(%address, reason = %error, "peer refused"),
            AcceptError::Rejected(..) | AcceptError::OtherVersion(..) => {
                tracing::debug!(%address, reason = %error, "peer refused")
            }
            _ => tracing::debug!(%address, reason = %error, "connection not admitted"),
        }
    }

    async fn authenticate(&self, incoming: Incoming) -> Result<(Peer, Connection), AcceptError> {
        let address = canonical(incoming.remote_address());
        let handshake = async {
            let accepted = incoming.accept().map_err(|error| AcceptError::Handshake(error.to_string()))?;
            let connection = accepted.await.map_err(|error| AcceptError::Handshake(error.to_string()))?;
            let id = peer_of(&connection).ok_or_else(|| AcceptError::Handshake("no libp2p certificate".into()))?;
            let Some(format) = format_of(&connection, self.versions) else {
                close(&connection, OTHER_VERSION, self.versions.to_string().as_bytes());
                return Err(AcceptError::OtherVersion(id, self.versions));
            };
            self.read_hello(&connection)
                .await
                .map(|(hello, send)| (id, hello, WelcomeStream { send, format }, connection))
        };
        let on_timeout = |_| AcceptError::NoHello(format!("timed out after {:?}", self.timeouts.hello));
        let (id, hello, welcome_stream, connection) =
            timeout(self.timeouts.hello, handshake).await.map_err(on_timeout)??;
        if let Some(node) = self.other_node_with_this_key(id, &hello) {
            return Err(self.answer_shared_key(node, address, &connection, welcome_stream).await);
        }
        let verdict = timeout(self.timeouts.admission, self.admit_dialer(id, address, &hello)).await;
        let verdict = verdict.unwrap_or_else(|_| Err(Rejection::Undecided("the verdict takes too long".into())));
        self.metrics.admission_decided(admission_result(verdict.as_ref().map(|(_, _, admitted)| admitted)));
        match verdict {
            Ok((peer, ours, _)) => {
                connection.set_max_concurrent_bi_streams(VarInt::from_u32(MAX_STREAMS));
                // The peer is admitted, but its stream may have no room for the answer.
                let welcomed = timeout(self.timeouts.hello, welcome_stream.send_admitted(ours)).await;
                let welcomed = welcomed.unwrap_or_else(|_| Err("the peer does not read the answer".into()));
                welcomed.map_err(|error| AcceptError::Left(id, error))?;
                Ok((peer, connection))
            }
            Err(rejection) => {
                self.reject(&connection, welcome_stream, &rejection).await;
                Err(AcceptError::Rejected(id, rejection))
            }
        }
    }

    /// The other node whose agent proved this agent's own key. This agent's own dials name this
    /// node.
    pub(super) fn other_node_with_this_key(&self, id: PeerId, hello: &Hello) -> Option<NodeName> {
        let node = hello.node.parse().ok()?;
        (id == self.own_id && node != self.node).then_some(node)
    }

    /// Sends this node's name, and no credential. The two agents need both names to find out which
    /// node makes a new key. The other agent proved the key, so the name may be sent.
    async fn answer_shared_key(
        &self,
        node: NodeName,
        address: SocketAddr,
        connection: &Connection,
        welcome_stream: WelcomeStream,
    ) -> AcceptError {
        self.shared_key.send_replace(Some(node.clone()));
        let answer = async {
            let ours = self.own_hello(Credential::default(), address.ip());
            let WelcomeStream { mut send, format } = welcome_stream;
            wire::write_in(&mut send, &Welcome::Admitted(ours), format).await.ok()?;
            send.finish().ok()?;
            send.stopped().await.ok()
        };
        let _ = timeout(self.timeouts.dial, answer).await;
        close(connection, REJECTED, b"another node has this key");
        AcceptError::SharedKey(node)
    }

    /// Reads the only message that an unauthenticated connection may send. Any other message closes
    /// the connection.
    async fn read_hello(&self, connection: &Connection) -> Result<(Hello, SendStream), AcceptError> {
        let stream = connection.accept_bi().await;
        let (send, mut recv) = stream.map_err(|error| AcceptError::NoHello(error.to_string()))?;
        match wire::read_in::<Hello>(&mut recv, self.versions).await {
            Ok(hello) => Ok((hello, send)),
            Err(error) => {
                close(connection, PROTOCOL, printable(&error.to_string()).as_bytes());
                Err(AcceptError::NoHello(error.to_string()))
            }
        }
    }

    /// Gets the verdict of our admission. Returns the admitted peer, and our `Hello` for the
    /// answer.
    async fn admit_dialer(
        &self,
        id: PeerId,
        address: SocketAddr,
        hello: &Hello,
    ) -> Result<(Peer, Hello, AdmittedPeer), Rejection> {
        if id == self.own_id {
            return Err(Rejection::Denied(
                "this agent has the same key; delete the key on one of the two nodes".into(),
            ));
        }
        let admitted = self.admission.admit(id, &hello.credential).await?;
        let node = admitted.node.clone();
        let peer = peer_from(id, address, hello, node).map_err(|error| Rejection::Denied(error.to_string()))?;
        // Read before anything is recorded: without our own credential the peer could not admit us.
        let ours = self.own_hello(self.admission.credential().await?, address.ip());
        let admission = PeerAdmission {
            credential: hello.credential.clone(),
            valid_until: admitted.valid_until,
            pod: admitted.pod.clone(),
        };
        self.peers.insert(&peer, admission).map_err(|error| Rejection::Undecided(error.to_string()))?;
        self.observed_address.send_replace(Some(hello.observed_address));
        // Sent before the peer gets the answer: the peer dials our gossip next, and gossip accepts
        // only admitted peers. A closed receiver means that the agent stops.
        let _ = self.admitted_peers.send(peer.clone()).await;
        Ok((peer, ours, admitted))
    }

    /// Closes the inbound connections of peers whose verdict has expired. A credential that is
    /// still accepted, as in a grace period, renews the verdict. The peer may dial again with a new
    /// credential.
    pub(super) fn close_expired(&self, now: Duration) {
        for (peer, PeerAdmission { credential, valid_until: until, pod: _ }) in self.peers.expired(now) {
            match self.admission.admit_relayed(peer, &credential) {
                Ok(admitted) if admitted.valid_until > now => {
                    self.peers.record_admission(
                        peer,
                        PeerAdmission { credential, valid_until: admitted.valid_until, pod: admitted.pod },
                    );
                }
                // The verdict is pending; a second leeway is enough time.
                Err(Rejection::Undecided(_)) if now < until + LEEWAY + LEEWAY => {}
                ended => {
                    let reason = ended.err().map(|rejection| rejection.to_string());
                    tracing::debug!(%peer, reason, "the verdict about a peer has expired; its connections are closed");
                    self.peers.close_inbound(peer);
                }
            }
        }
    }

    /// Delivers the answer before the connection closes: a close discards undelivered data.
    async fn reject(&self, connection: &Connection, welcome_stream: WelcomeStream, rejection: &Rejection) {
        let reason = printable(&rejection.to_string());
        let WelcomeStream { mut send, format } = welcome_stream;
        let answer = async {
            wire::write_in(&mut send, &Welcome::Rejected(reason.clone()), format).await.ok()?;
            send.finish().ok()?;
            send.stopped().await.ok()
        };
        // The close carries the same reason, so an undelivered answer is no error.
        let _ = timeout(self.timeouts.dial, answer).await;
        close(connection, REJECTED, reason.as_bytes());
    }
}

/// The stream of the answer to a `Hello`.
struct WelcomeStream {
    send: SendStream,
    format: Format,
}

impl WelcomeStream {
    async fn send_admitted(mut self, ours: Hello) -> Result<(), String> {
        let welcome = Welcome::Admitted(ours);
        wire::write_in(&mut self.send, &welcome, self.format).await.map_err(|error| error.to_string())?;
        self.send.finish().map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_take_all_handshakes() {
        let limiter = Arc::new(HandshakeLimiter::default());
        let acquire = |last: u8| limiter.try_acquire(IpAddr::from([10, 0, 0, last]));
        let mut permits: Vec<_> = (0..MAX_HANDSHAKES_PER_ADDRESS).map(|_| acquire(1).unwrap()).collect();
        assert!(acquire(1).is_none());
        permits.push(acquire(2).unwrap());
        permits.remove(0);
        assert!(acquire(1).is_some(), "a released permit is free again");
    }

    #[test]
    fn one_ipv6_subnet_cannot_take_all_handshakes() {
        let limiter = Arc::new(HandshakeLimiter::default());
        let acquire = |subnet: u16, host: u16| limiter.try_acquire(IpAddr::from([0xfd77, 0, 0, subnet, 0, 0, 0, host]));
        let mut permits: Vec<_> = (0..99).filter_map(|host| acquire(1, host)).collect();
        assert_eq!(permits.len(), MAX_HANDSHAKES_PER_SUBNET);
        permits.push(acquire(2, 1).unwrap());
        permits.remove(0);
        assert!(acquire(1, 200).is_some(), "a released permit is free again");
    }

    #[test]
    fn handshakes_are_bounded_and_addresses_are_validated_before_the_bound() {
        let limiter = Arc::new(HandshakeLimiter::default());
        let acquire = |last: usize| limiter.try_acquire(IpAddr::from([10, 0, 0, last as u8]));
        let mut permits: Vec<_> = (0..RETRY_THRESHOLD - 1).map(|last| acquire(last).unwrap()).collect();
        assert!(!limiter.is_retry_required());
        permits.extend((RETRY_THRESHOLD..=MAX_HANDSHAKES).map(|last| acquire(last).unwrap()));
        assert!(limiter.is_retry_required());
        assert!(acquire(200).is_none());
        permits.clear();
        assert!(acquire(200).is_some() && !limiter.is_retry_required());
    }
}
