//! Connections to peers: dials, and probes of the way to a peer.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;

use super::Rejection;
use crate::model::{NodeName, Peer, PeerId};

/// Dials peers, and keeps the admitted peers.
#[async_trait]
pub trait Dialer: Send + Sync + 'static {
    /// Dials `address`, and keeps the connection and the peer's address. With `expect`, any other
    /// peer is an error. A connected peer is not dialed again while our verdict about the peer
    /// lasts.
    ///
    /// # Errors
    /// [`DialError`].
    async fn dial(&self, address: SocketAddr, expect: Option<PeerId>) -> Result<Peer, DialError>;

    /// Remaining validity of our last verdict about the peer; zero without a verdict.
    fn admitted_for(&self, peer: PeerId) -> Duration;

    /// Records the address of a peer that never dialed this agent. The peer is dialed and admitted
    /// when a fetch needs the connection. The recorded address of a known peer is replaced.
    fn add_peer_address(&self, peer: &Peer);

    /// The peers that were admitted in either direction, or whose address was added.
    fn peers(&self) -> Vec<Peer>;

    /// The peer's entry; `None` for an unknown or removed peer.
    fn peer(&self, peer: PeerId) -> Option<Peer>;

    /// Drops the peer's address and connections; fetches from the peer end as unreachable. The peer
    /// may dial this agent again.
    fn remove_peer(&self, peer: PeerId);
}

/// Probes whether a firewall between two nodes blocks UDP.
#[async_trait]
pub trait Prober: Send + Sync + 'static {
    /// Whether any UDP packet comes back from `address`. An open connection counts as an answer.
    ///
    /// # Errors
    /// [`ProbeError`] when no packet was sent.
    async fn answers_udp(&self, address: SocketAddr) -> Result<bool, ProbeError>;

    /// Whether a TCP connection to `address` can be opened.
    async fn accepts_tcp(&self, address: SocketAddr) -> bool;
}

/// No packet was sent.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{0}")]
pub struct ProbeError(pub String);

/// Why a dial failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum DialError {
    /// The address leads back to this agent.
    #[error("{0} is this agent itself")]
    OwnAddress(SocketAddr),
    /// Another node's agent has this agent's key.
    #[error("node {node} at {address} has the key of this node, as after a copy of a node's disk")]
    SharedKey {
        /// The dialed address.
        address: SocketAddr,
        /// The name that the other agent gives.
        node: NodeName,
    },
    /// No answer arrived, or the answer is not in our protocol.
    #[error("{address} cannot be reached: {reason}")]
    Unreachable {
        /// The dialed address.
        address: SocketAddr,
        /// Not a single packet came back.
        silent: bool,
        /// The error of the transport.
        reason: String,
    },
    /// Another peer answers than the expected one.
    #[error("{found} answers at {address} where {expected} was expected")]
    AnotherKey {
        /// The dialed address.
        address: SocketAddr,
        /// The expected peer.
        expected: PeerId,
        /// The peer that proved its key.
        found: PeerId,
    },
    /// The peer rejects this agent.
    #[error("peer {peer} at {address} rejects this agent: {reason}")]
    Rejected {
        /// The peer that rejects this agent.
        peer: PeerId,
        /// The dialed address.
        address: SocketAddr,
        /// The reason that the peer gives.
        reason: String,
    },
    /// This agent rejects the peer.
    #[error("peer {peer} at {address}: {refusal}")]
    NotAdmitted {
        /// The rejected peer.
        peer: PeerId,
        /// The dialed address.
        address: SocketAddr,
        /// The verdict of our admission.
        refusal: Rejection,
    },
    /// The peer speaks no MAJOR of the transfer protocol that this agent speaks.
    #[error(
        "peer {peer} at {address} speaks version {theirs} of the transfer protocol and this agent {ours}; \
         upgrade the older of the two, as agents are compatible across one MAJOR only"
    )]
    OtherVersion {
        /// The peer that answers.
        peer: PeerId,
        /// The dialed address.
        address: SocketAddr,
        /// The versions that the peer reports.
        theirs: String,
        /// The versions that this agent speaks.
        ours: String,
    },
    /// This agent has no credential.
    #[error("this agent has no credential to show: {0}")]
    NoCredential(Rejection),
    /// The peer violated the protocol.
    #[error("peer {peer} at {address} broke the protocol: {reason}")]
    Protocol {
        /// The peer that answers.
        peer: PeerId,
        /// The dialed address.
        address: SocketAddr,
        /// The violation.
        reason: String,
    },
}

impl DialError {
    /// Whether not a single packet came back, as from a host that is gone. Any answer shows a live
    /// host, also a rejection.
    pub fn is_silence(&self) -> bool {
        matches!(self, Self::Unreachable { silent: true, .. })
    }
}
