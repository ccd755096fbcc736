//! The one door: a stranger's connection gets one stream for its `Hello`, within a deadline, and nothing else until our
//! admission has said yes.

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::{Connection, Incoming, SendStream, VarInt};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::codes::{DONE, OTHER_VERSION, PROTOCOL, REFUSED, close};
use super::peers::Standing;
use super::tls::{format_of, peer_of};
use super::tuning::MAX_STREAMS;
use super::{Shared, admission_result, canonical, peer_from, printable};
use crate::decide::subnet::Subnet;
use crate::model::{Credential, NodeName, Peer, PeerId};
use crate::ports::{Admitted, LEEWAY, Refusal};
use crate::wire::{self, Format, Hello, Versions, Welcome};

/// Strangers at a time. One costs a handshake's CPU and some ten KiB; a thousand nodes that start together come through
/// in a few seconds, since the others try again.
const STRANGERS: usize = 32;

/// Strangers from one address at a time, so that a single pod cannot occupy the door. An agent needs one, or two when it
/// greets and fetches at once; the rest is for several agents on one machine, as in a demonstration.
const STRANGERS_PER_ADDRESS: usize = 8;

/// Strangers from one IPv6 subnet at a time, whose hosts may choose among 2^64 addresses. A quarter of the places is left to other
/// subnets: pods and nodes have different ones as a rule. Nodes of one subnet that start together share the rest.
const STRANGERS_PER_SUBNET: usize = STRANGERS * 3 / 4;

/// With more strangers than this, an address has to prove itself by a round trip (RFC 9000, section 8.1.2) before it
/// costs us anything.
const CROWD: usize = 8;

/// The strangers that are being looked at.
#[derive(Default)]
pub(super) struct Door {
    inside: Mutex<HashMap<IpAddr, usize>>,
}

/// A stranger's place at the door, free again when dropped.
pub(super) struct Place {
    door: Arc<Door>,
    address: IpAddr,
}

impl Door {
    /// A place, if there is one for this address.
    pub(super) fn enter(self: &Arc<Self>, address: IpAddr) -> Option<Place> {
        let mut inside = self.inside.lock().unwrap_or_else(PoisonError::into_inner);
        let from_there = inside.get(&address).copied().unwrap_or(0);
        let is_near = |other: IpAddr| Subnet::of(other) == Subnet::of(address);
        let from_subnet: usize = inside.iter().filter(|(other, _)| is_near(**other)).map(|(_, count)| count).sum();
        if from_there >= STRANGERS_PER_ADDRESS || from_subnet >= STRANGERS_PER_SUBNET {
            return None;
        }
        if inside.values().sum::<usize>() >= STRANGERS {
            return None;
        }
        inside.insert(address, from_there + 1);
        Some(Place { door: self.clone(), address })
    }

    /// Whether addresses have to be proved now.
    pub(super) fn is_crowded(&self) -> bool {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner).values().sum::<usize>() >= CROWD
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut inside = self.door.inside.lock().unwrap_or_else(PoisonError::into_inner);
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
enum Turned {
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
    Refused(PeerId, Refusal),
    #[error("peer {0} left: {1}")]
    Left(PeerId, String),
    #[error("node {0} has the key of this node")]
    SharedKey(NodeName),
}

impl Shared {
    /// A whole inbound connection, from the first packet to the last stream served on it.
    pub(super) async fn host(self: Arc<Self>, incoming: Incoming, place: Place, stop: CancellationToken) {
        let address = canonical(incoming.remote_address());
        let met = tokio::select! {
            () = stop.cancelled() => return,
            met = self.meet(incoming) => met,
        };
        drop(place);
        match met {
            Ok((peer, connection)) => {
                tracing::debug!(peer = %peer.id, node = %peer.node, %address, "peer admitted");
                self.peers.keep_inbound(peer.id, &connection);
                self.attend(peer.id, &connection, stop).await;
                self.peers.drop_inbound(peer.id, &connection);
                close(&connection, DONE, b"done");
            }
            Err(turned) => self.log_turned(address, &turned),
        }
    }

    fn log_turned(&self, address: SocketAddr, turned: &Turned) {
        let is_news = match turned {
            Turned::Refused(_, refusal) => self.refusals.is_news(address.ip(), admission_result(Err(refusal))),
            Turned::OtherVersion(..) => self.refusals.is_news(address.ip(), "other_version"),
            _ => false,
        };
        match turned {
            _ if is_news => tracing::warn!(%address, reason = %turned, "peer refused"),
            Turned::Refused(..) | Turned::OtherVersion(..) => {
                tracing::debug!(%address, reason = %turned, "peer refused")
            }
            _ => tracing::debug!(%address, reason = %turned, "stranger turned away"),
        }
    }

    async fn meet(&self, incoming: Incoming) -> Result<(Peer, Connection), Turned> {
        let address = canonical(incoming.remote_address());
        let introduction = async {
            let accepted = incoming.accept().map_err(|error| Turned::Handshake(error.to_string()))?;
            let connection = accepted.await.map_err(|error| Turned::Handshake(error.to_string()))?;
            let id = peer_of(&connection).ok_or_else(|| Turned::Handshake("no peer's certificate".into()))?;
            let Some(format) = format_of(&connection, self.versions) else {
                close(&connection, OTHER_VERSION, self.versions.to_string().as_bytes());
                return Err(Turned::OtherVersion(id, self.versions));
            };
            self.hear(&connection).await.map(|(hello, send)| (id, hello, Greeted { send, format }, connection))
        };
        let late = |_| Turned::NoHello(format!("not in {:?}", self.limits.hello));
        let (id, hello, greeted, connection) = timeout(self.limits.hello, introduction).await.map_err(late)??;
        if let Some(node) = self.other_node_with_this_key(id, &hello) {
            return Err(self.meet_shared_key(node, address, &connection, greeted).await);
        }
        let decided = timeout(self.limits.decide, self.decide(id, address, &hello)).await;
        let decided = decided.unwrap_or_else(|_| Err(Refusal::CannotTell("it takes too long".into())));
        self.metrics.admission_decided(admission_result(decided.as_ref().map(|(_, _, admitted)| admitted)));
        match decided {
            Ok((peer, ours, _)) => {
                connection.set_max_concurrent_bi_streams(VarInt::from_u32(MAX_STREAMS));
                // It is a peer now, but it may leave no room for the answer.
                let welcomed = timeout(self.limits.hello, greeted.welcome(ours)).await;
                let welcomed = welcomed.unwrap_or_else(|_| Err("it does not take our answer".into()));
                welcomed.map_err(|error| Turned::Left(id, error))?;
                Ok((peer, connection))
            }
            Err(refusal) => {
                self.turn_away(&connection, greeted, &refusal).await;
                Err(Turned::Refused(id, refusal))
            }
        }
    }

    /// The node whose agent proved this agent's own key. This agent's own dials name this node.
    pub(super) fn other_node_with_this_key(&self, id: PeerId, hello: &Hello) -> Option<NodeName> {
        let node = hello.node.parse().ok()?;
        (id == self.me && node != self.node).then_some(node)
    }

    /// Tells the other agent this node's name, and no credential. The other agent needs the name to
    /// find out which of the two nodes makes a new key; it proved the key, so it may have it.
    async fn meet_shared_key(
        &self,
        node: NodeName,
        address: SocketAddr,
        connection: &Connection,
        greeted: Greeted,
    ) -> Turned {
        self.shared_key.send_replace(Some(node.clone()));
        let answer = async {
            let ours = self.hello(Credential::default(), address.ip());
            let Greeted { mut send, format } = greeted;
            wire::write_in(&mut send, &Welcome::Admitted(ours), format).await.ok()?;
            send.finish().ok()?;
            send.stopped().await.ok()
        };
        let _ = timeout(self.limits.dial, answer).await;
        close(connection, REFUSED, b"another node has this key");
        Turned::SharedKey(node)
    }

    /// The one message that a stranger may send. Whatever else it sends instead ends the connection.
    async fn hear(&self, connection: &Connection) -> Result<(Hello, SendStream), Turned> {
        let stream = connection.accept_bi().await;
        let (send, mut recv) = stream.map_err(|error| Turned::NoHello(error.to_string()))?;
        match wire::read_in::<Hello>(&mut recv, self.versions).await {
            Ok(hello) => Ok((hello, send)),
            Err(error) => {
                close(connection, PROTOCOL, printable(&error.to_string()).as_bytes());
                Err(Turned::NoHello(error.to_string()))
            }
        }
    }

    /// Whether this is a peer; and if so, what we say of ourselves.
    async fn decide(&self, id: PeerId, address: SocketAddr, hello: &Hello) -> Result<(Peer, Hello, Admitted), Refusal> {
        if id == self.me {
            return Err(Refusal::Denied("this agent has the same key; delete it on one of the two nodes".into()));
        }
        let admitted = self.admission.admit(id, &hello.credential).await?;
        let node = admitted.node.clone();
        let peer = peer_from(id, address, hello, node).map_err(|error| Refusal::Denied(error.to_string()))?;
        // Before anything is remembered: without a credential of our own the peer could not admit us.
        let ours = self.hello(self.admission.credential().await?, address.ip());
        let standing =
            Standing { credential: hello.credential.clone(), until: admitted.until, pod: admitted.pod.clone() };
        self.peers.remember(&peer, standing).map_err(|full| Refusal::CannotTell(full.to_string()))?;
        self.seen.send_replace(Some(hello.seen));
        // Told before the peer is: when it dials our gossip next, the list of those let in has it. A receiver that is
        // gone belongs to an agent that stops.
        let _ = self.joined.send(peer.clone()).await;
        Ok((peer, ours, admitted))
    }

    /// Ends what peers dialled whose verdict is over, unless the credential that they showed is still good, as it may be on grace. They
    /// may come back and show another.
    pub(super) fn end_verdicts(&self, now: Duration) {
        for (peer, Standing { credential, until, pod: _ }) in self.peers.overdue(now) {
            match self.admission.vouch(peer, &credential) {
                Ok(admitted) if admitted.until > now => {
                    self.peers.stands(peer, Standing { credential, until: admitted.until, pod: admitted.pod });
                }
                // It is being asked for; once more as long is enough for that.
                Err(Refusal::CannotTell(_)) if now < until + LEEWAY + LEEWAY => {}
                ended => {
                    let reason = ended.err().map(|refusal| refusal.to_string());
                    tracing::debug!(%peer, reason, "a peer's verdict is over; its connections are closed");
                    self.peers.end_inbound(peer);
                }
            }
        }
    }

    /// The answer goes first; the connection's end, which would discard what is not delivered yet, waits for it.
    async fn turn_away(&self, connection: &Connection, greeted: Greeted, refusal: &Refusal) {
        let reason = printable(&refusal.to_string());
        let Greeted { mut send, format } = greeted;
        let answer = async {
            wire::write_in(&mut send, &Welcome::Refused(reason.clone()), format).await.ok()?;
            send.finish().ok()?;
            send.stopped().await.ok()
        };
        // Delivered or not: the close says the same.
        let _ = timeout(self.limits.dial, answer).await;
        close(connection, REFUSED, reason.as_bytes());
    }
}

/// The way of the answer to a `Hello`.
struct Greeted {
    send: SendStream,
    /// Of the connection.
    format: Format,
}

impl Greeted {
    async fn welcome(mut self, ours: Hello) -> Result<(), String> {
        let welcome = Welcome::Admitted(ours);
        wire::write_in(&mut self.send, &welcome, self.format).await.map_err(|error| error.to_string())?;
        self.send.finish().map_err(|error| error.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_cannot_occupy_the_door() {
        let door = Arc::new(Door::default());
        let enter = |last: u8| door.enter(IpAddr::from([10, 0, 0, last]));
        let mut places: Vec<_> = (0..STRANGERS_PER_ADDRESS).map(|_| enter(1).unwrap()).collect();
        assert!(enter(1).is_none());
        places.push(enter(2).unwrap());
        places.remove(0);
        assert!(enter(1).is_some(), "a place that was left is free");
    }

    #[test]
    fn one_ipv6_subnet_cannot_occupy_the_door() {
        let door = Arc::new(Door::default());
        let enter = |subnet: u16, host: u16| door.enter(IpAddr::from([0xfd77, 0, 0, subnet, 0, 0, 0, host]));
        let mut places: Vec<_> = (0..99).filter_map(|host| enter(1, host)).collect();
        assert_eq!(places.len(), STRANGERS_PER_SUBNET);
        places.push(enter(2, 1).unwrap());
        places.remove(0);
        assert!(enter(1, 200).is_some(), "a place that was left is free");
    }

    #[test]
    fn the_door_has_a_bound_and_asks_for_proof_before_it() {
        let door = Arc::new(Door::default());
        let enter = |last: usize| door.enter(IpAddr::from([10, 0, 0, last as u8]));
        let mut places: Vec<_> = (0..CROWD - 1).map(|last| enter(last).unwrap()).collect();
        assert!(!door.is_crowded());
        places.extend((CROWD..=STRANGERS).map(|last| enter(last).unwrap()));
        assert!(door.is_crowded());
        assert!(enter(200).is_none());
        places.clear();
        assert!(enter(200).is_some() && !door.is_crowded());
    }
}
