//! The one limiter: a stranger's connection gets one stream for its `Hello`, within a deadline, and nothing else until our
//! admission has said yes.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

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

/// Strangers at a time. One costs a handshake's CPU and some ten KiB; a thousand nodes that start together come through
/// in a few seconds, since the others try again.
const MAX_HANDSHAKES: usize = 32;

/// Strangers from one address at a time, so that a single pod cannot occupy the limiter. An agent needs one, or two when it
/// greets and fetches at once; the rest is for several agents on one machine, as in a demonstration.
const MAX_HANDSHAKES_PER_ADDRESS: usize = 8;

/// Strangers from one IPv6 subnet at a time, whose hosts may choose among 2^64 addresses. A quarter of the permits is left to other
/// subnets: pods and nodes have different ones as a rule. Nodes of one subnet that start together share the rest.
const MAX_HANDSHAKES_PER_SUBNET: usize = MAX_HANDSHAKES * 3 / 4;

/// With more strangers than this, an address has to prove itself by a round trip (RFC 9000, section 8.1.2) before it
/// costs us anything.
const RETRY_THRESHOLD: usize = 8;

/// The strangers that are being looked at.
#[derive(Default)]
pub(super) struct HandshakeLimiter {
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

/// A stranger's place at the limiter, free again when dropped.
pub(super) struct HandshakePermit {
    limiter: Arc<HandshakeLimiter>,
    address: IpAddr,
}

impl HandshakeLimiter {
    /// A place, if there is one for this address.
    pub(super) fn try_acquire(self: &Arc<Self>, address: IpAddr) -> Option<HandshakePermit> {
        let mut inside = self.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        let from_there = inside.get(&address).copied().unwrap_or(0);
        let is_near = |other: IpAddr| Subnet::of(other) == Subnet::of(address);
        let from_subnet: usize = inside.iter().filter(|(other, _)| is_near(**other)).map(|(_, count)| count).sum();
        if from_there >= MAX_HANDSHAKES_PER_ADDRESS || from_subnet >= MAX_HANDSHAKES_PER_SUBNET {
            return None;
        }
        if inside.values().sum::<usize>() >= MAX_HANDSHAKES {
            return None;
        }
        inside.insert(address, from_there + 1);
        Some(HandshakePermit { limiter: self.clone(), address })
    }

    /// Whether addresses have to be proved now.
    pub(super) fn is_retry_required(&self) -> bool {
        self.by_address.lock().unwrap_or_else(PoisonError::into_inner).values().sum::<usize>() >= RETRY_THRESHOLD
    }
}

impl Drop for HandshakePermit {
    fn drop(&mut self) {
        let mut inside = self.limiter.by_address.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = inside.get_mut(&self.address) {
            *count -= 1;
            if *count == 0 {
                inside.remove(&self.address);
            }
        }
    }
}

/// Why a stranger did not become a peer.
#[derive(Debug, thiserror::Error)]
enum AcceptError {
    #[error("no connection: {0}")]
    Handshake(String),
    #[error("no introduction: {0}")]
    NoHello(String),
    #[error(
        "peer {0} speaks no version of the transfer protocol that this agent speaks ({1}); \
         upgrade the older of the two, as agents are compatible across one MAJOR only"
    )]
    OtherVersion(PeerId, Versions),
    #[error("peer {0}: {1}")]
    Rejected(PeerId, Rejection),
    #[error("peer {0} left: {1}")]
    Left(PeerId, String),
    #[error("node {0} has the key of this node")]
    SharedKey(NodeName),
}

impl Shared {
    /// A whole inbound connection, from the first packet to the last stream served on it.
    pub(super) async fn handle_connection(
        self: Arc<Self>,
        incoming: Incoming,
        permit: HandshakePermit,
        stop: CancellationToken,
    ) {
        let address = canonical(incoming.remote_address());
        let met = tokio::select! {
            () = stop.cancelled() => return,
            met = self.authenticate(incoming) => met,
        };
        drop(permit);
        match met {
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
        let is_news = match error {
            AcceptError::Rejected(_, refusal) => {
                self.rejection_log.record(address.ip(), admission_result(Err(refusal)))
            }
            AcceptError::OtherVersion(..) => self.rejection_log.record(address.ip(), "other_version"),
            _ => false,
        };
        match error {
            _ if is_news => tracing::warn!(%address, reason = %error, "peer refused"),
            AcceptError::Rejected(..) | AcceptError::OtherVersion(..) => {
                tracing::debug!(%address, reason = %error, "peer refused")
            }
            _ => tracing::debug!(%address, reason = %error, "stranger turned away"),
        }
    }

    async fn authenticate(&self, incoming: Incoming) -> Result<(Peer, Connection), AcceptError> {
        let address = canonical(incoming.remote_address());
        let introduction = async {
            let accepted = incoming.accept().map_err(|error| AcceptError::Handshake(error.to_string()))?;
            let connection = accepted.await.map_err(|error| AcceptError::Handshake(error.to_string()))?;
            let id = peer_of(&connection).ok_or_else(|| AcceptError::Handshake("no peer's certificate".into()))?;
            let Some(format) = format_of(&connection, self.versions) else {
                close(&connection, OTHER_VERSION, self.versions.to_string().as_bytes());
                return Err(AcceptError::OtherVersion(id, self.versions));
            };
            self.read_hello(&connection)
                .await
                .map(|(hello, send)| (id, hello, WelcomeStream { send, format }, connection))
        };
        let late = |_| AcceptError::NoHello(format!("not in {:?}", self.timeouts.hello));
        let (id, hello, welcome_stream, connection) =
            timeout(self.timeouts.hello, introduction).await.map_err(late)??;
        if let Some(node) = self.other_node_with_this_key(id, &hello) {
            return Err(self.answer_shared_key(node, address, &connection, welcome_stream).await);
        }
        let decided = timeout(self.timeouts.admission, self.admit_dialler(id, address, &hello)).await;
        let decided = decided.unwrap_or_else(|_| Err(Rejection::Undecided("it takes too long".into())));
        self.metrics.admission_decided(admission_result(decided.as_ref().map(|(_, _, admitted)| admitted)));
        match decided {
            Ok((peer, ours, _)) => {
                connection.set_max_concurrent_bi_streams(VarInt::from_u32(MAX_STREAMS));
                // It is a peer now, but it may leave no room for the answer.
                let welcomed = timeout(self.timeouts.hello, welcome_stream.send_admitted(ours)).await;
                let welcomed = welcomed.unwrap_or_else(|_| Err("it does not take our answer".into()));
                welcomed.map_err(|error| AcceptError::Left(id, error))?;
                Ok((peer, connection))
            }
            Err(refusal) => {
                self.reject(&connection, welcome_stream, &refusal).await;
                Err(AcceptError::Rejected(id, refusal))
            }
        }
    }

    /// The node whose agent proved this agent's own key. This agent's own dials name this node.
    pub(super) fn other_node_with_this_key(&self, id: PeerId, hello: &Hello) -> Option<NodeName> {
        let node = hello.node.parse().ok()?;
        (id == self.own_id && node != self.node).then_some(node)
    }

    /// Tells the other agent this node's name, and no credential. The other agent needs the name to
    /// find out which of the two nodes makes a new key; it proved the key, so it may have it.
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

    /// The one message that a stranger may send. Whatever else it sends instead ends the connection.
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

    /// Whether this is a peer; and if so, what we say of ourselves.
    async fn admit_dialler(
        &self,
        id: PeerId,
        address: SocketAddr,
        hello: &Hello,
    ) -> Result<(Peer, Hello, AdmittedPeer), Rejection> {
        if id == self.own_id {
            return Err(Rejection::Denied("this agent has the same key; delete it on one of the two nodes".into()));
        }
        let admitted = self.admission.admit(id, &hello.credential).await?;
        let node = admitted.node.clone();
        let peer = peer_from(id, address, hello, node).map_err(|error| Rejection::Denied(error.to_string()))?;
        // Before anything is remembered: without a credential of our own the peer could not admit us.
        let ours = self.own_hello(self.admission.credential().await?, address.ip());
        let admission = PeerAdmission {
            credential: hello.credential.clone(),
            valid_until: admitted.valid_until,
            pod: admitted.pod.clone(),
        };
        self.peers.insert(&peer, admission).map_err(|full| Rejection::Undecided(full.to_string()))?;
        self.observed_address.send_replace(Some(hello.observed_address));
        // Told before the peer is: when it dials our gossip next, the list of those let in has it. A receiver that is
        // gone belongs to an agent that stops.
        let _ = self.admitted_peers.send(peer.clone()).await;
        Ok((peer, ours, admitted))
    }

    /// Ends what peers dialled whose verdict is over, unless the credential that they showed is still good, as it may be on grace. They
    /// may come back and show another.
    pub(super) fn close_expired(&self, now: Duration) {
        for (peer, PeerAdmission { credential, valid_until: until, pod: _ }) in self.peers.expired(now) {
            match self.admission.admit_relayed(peer, &credential) {
                Ok(admitted) if admitted.valid_until > now => {
                    self.peers.record_admission(
                        peer,
                        PeerAdmission { credential, valid_until: admitted.valid_until, pod: admitted.pod },
                    );
                }
                // It is being asked for; once more as long is enough for that.
                Err(Rejection::Undecided(_)) if now < until + LEEWAY + LEEWAY => {}
                ended => {
                    let reason = ended.err().map(|refusal| refusal.to_string());
                    tracing::debug!(%peer, reason, "a peer's verdict is over; its connections are closed");
                    self.peers.close_inbound(peer);
                }
            }
        }
    }

    /// The answer goes first; the connection's end, which would discard what is not delivered yet, waits for it.
    async fn reject(&self, connection: &Connection, welcome_stream: WelcomeStream, refusal: &Rejection) {
        let reason = printable(&refusal.to_string());
        let WelcomeStream { mut send, format } = welcome_stream;
        let answer = async {
            wire::write_in(&mut send, &Welcome::Rejected(reason.clone()), format).await.ok()?;
            send.finish().ok()?;
            send.stopped().await.ok()
        };
        // Delivered or not: the close says the same.
        let _ = timeout(self.timeouts.dial, answer).await;
        close(connection, REJECTED, reason.as_bytes());
    }
}

/// The way of the answer to a `Hello`.
struct WelcomeStream {
    send: SendStream,
    /// Of the connection.
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
        let enter = |last: u8| limiter.try_acquire(IpAddr::from([10, 0, 0, last]));
        let mut permits: Vec<_> = (0..MAX_HANDSHAKES_PER_ADDRESS).map(|_| enter(1).unwrap()).collect();
        assert!(enter(1).is_none());
        permits.push(enter(2).unwrap());
        permits.remove(0);
        assert!(enter(1).is_some(), "a place that was left is free");
    }

    #[test]
    fn one_ipv6_subnet_cannot_take_all_handshakes() {
        let limiter = Arc::new(HandshakeLimiter::default());
        let enter = |subnet: u16, host: u16| limiter.try_acquire(IpAddr::from([0xfd77, 0, 0, subnet, 0, 0, 0, host]));
        let mut permits: Vec<_> = (0..99).filter_map(|host| enter(1, host)).collect();
        assert_eq!(permits.len(), MAX_HANDSHAKES_PER_SUBNET);
        permits.push(enter(2, 1).unwrap());
        permits.remove(0);
        assert!(enter(1, 200).is_some(), "a place that was left is free");
    }

    #[test]
    fn handshakes_are_bounded_and_addresses_are_validated_before_the_bound() {
        let limiter = Arc::new(HandshakeLimiter::default());
        let enter = |last: usize| limiter.try_acquire(IpAddr::from([10, 0, 0, last as u8]));
        let mut permits: Vec<_> = (0..RETRY_THRESHOLD - 1).map(|last| enter(last).unwrap()).collect();
        assert!(!limiter.is_retry_required());
        permits.extend((RETRY_THRESHOLD..=MAX_HANDSHAKES).map(|last| enter(last).unwrap()));
        assert!(limiter.is_retry_required());
        assert!(enter(200).is_none());
        permits.clear();
        assert!(enter(200).is_some() && !limiter.is_retry_required());
    }
}
