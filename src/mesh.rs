//! The mesh: gossip between agents about content, membership and liveness, over libp2p.
//!
//! The mesh runs over TCP (noise, yamux) beside the QUIC that carries blobs, so that the two do not
//! fail together. Admission happens on the QUIC side: only PeerIds that were admitted there may
//! connect here. A connection of any other peer ends after the handshake, before a stream is open.
//!
//! Ranges of small blobs pass over the mesh too, for nodes between which UDP is blocked
//! ([`RangeServer`]).
//!
//! [`crate::decide::gossip`] decides what an agent sends, verifies, requests and answers. This
//! module only drives that protocol: libp2p's events, the agent's calls and the clock become calls
//! of the protocol, and the protocol's outputs become calls of libp2p. The module adds only the
//! work of an adapter: bounds on connections, streams, queues and time, and on the bytes that a
//! neighbor may send before the agent decodes anything.
//!
//! Deliberately not used:
//! - identify: a peer's port is part of its introduction.
//! - Kademlia: slow exactly when no peer has the image, and keeps stale providers.
//! - mDNS: any host on the segment could invent peers.
//! - relays, AutoNAT and hole punching: nodes reach each other.
//! - gossipsub's signatures: a message carries its author's signature, which survives a relay.
//! - gossipsub's peer exchange and scores: the protocol records faults.
//! - QUIC: see above.

mod codec;
mod gossip_crypto;
mod metered_stream;
mod neighbor_rates;
mod ranges;
mod shared_inventory;
mod stack;
mod task;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures::StreamExt;
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::{Multiaddr, Protocol};
use libp2p::swarm::SwarmEvent;
use parking_lot::RwLock;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use self::gossip_crypto::GossipCrypto;
use self::neighbor_rates::NeighborRateLimits;
use crate::decide::gossip::{self, LocalAgent};
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{Credential, InventoryChange, MeshStatus, NodeName, Peer, PeerId, Release, Zone};
use crate::ports::{Admission, MeshCommands};
use crate::util::clock;
use crate::wire::{Request, Versions};
pub use ranges::{RangeError, RangeResponse, RangeServer};
pub use shared_inventory::SharedInventory;
pub use task::MeshTask;

/// The options of the mesh.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The TCP address to listen on; port 0 takes any port.
    pub listen: SocketAddr,
}

/// The mesh cannot start.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// The address cannot be bound.
    #[error("gossip cannot listen on {address}: {reason}; is the port taken, or is the address of another node?")]
    Listen {
        /// The configured address.
        address: SocketAddr,
        /// The system's error.
        reason: String,
    },
    /// libp2p rejects its configuration, which is a bug.
    #[error("libp2p cannot be set up: {0}")]
    Stack(String),
}

/// Handle to the mesh task. Cheap to clone.
///
/// The results of calls arrive as [`crate::ports::MembershipEvent`]s. Once the task has ended,
/// calls do nothing.
#[derive(Debug, Clone)]
pub struct Mesh {
    commands: mpsc::Sender<Command>,
    connected: ConnectedPeers,
}

/// A call of [`Mesh`] on the way to the task.
#[derive(Debug)]
enum Command {
    Admit(Peer, Duration),
    RevokeAdmission(PeerId),
    Unreachable(PeerId),
    Rejected(PeerId),
    Suspect(PeerId),
    Announce(Vec<InventoryChange>),
    Introduce { credential: Credential, transfer: SocketAddr, gossip: SocketAddr, zone: Option<Zone> },
    Status(oneshot::Sender<MeshStatus>),
    Range(PeerId, Request, oneshot::Sender<Result<RangeResponse, RangeError>>),
}

/// The neighbors: peers with an open connection.
#[derive(Debug, Clone, Default)]
struct ConnectedPeers(Arc<RwLock<BTreeSet<PeerId>>>);

impl ConnectedPeers {
    fn contains(&self, peer: PeerId) -> bool {
        self.0.read().contains(&peer)
    }

    fn set(&self, peer: PeerId, is_connected: bool) {
        let mut peers = self.0.write();
        if is_connected {
            peers.insert(peer)
        } else {
            peers.remove(&peer)
        };
    }
}

/// Calls that wait for the task. The task takes calls even while its events are not received, so
/// the queue only spans one turn of the task's loop.
const MAX_COMMANDS: usize = 64;

impl Mesh {
    /// A fetch from this peer failed without an answer.
    pub async fn suspect(&self, peer: PeerId) {
        self.send(Command::Suspect(peer)).await;
    }

    /// The mesh as this agent sees it; `None` once the task has ended.
    pub async fn status(&self) -> Option<MeshStatus> {
        let (answer, status) = oneshot::channel();
        self.send(Command::Status(answer)).await;
        status.await.ok()
    }

    /// Whether a connection to this peer is open.
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.connected.contains(peer)
    }

    /// Sends a request for a range to a neighbor, and returns its answer. The caller bounds the
    /// number of requests.
    ///
    /// # Errors
    /// [`RangeError`].
    pub async fn request_range(&self, peer: PeerId, request: Request) -> Result<RangeResponse, RangeError> {
        let (answer, range) = oneshot::channel();
        self.send(Command::Range(peer, request, answer)).await;
        range.await.unwrap_or_else(|_| Err(RangeError::NoAnswer("the mesh has ended".into())))
    }

    async fn send(&self, command: Command) {
        // The send fails only after the end of the task, which the supervisor notices.
        let _ = self.commands.send(command).await;
    }
}

#[async_trait]
impl MeshCommands for Mesh {
    async fn admit(&self, peer: Peer, life: Duration) {
        self.send(Command::Admit(peer, life)).await;
    }

    async fn revoke_admission(&self, peer: PeerId) {
        self.send(Command::RevokeAdmission(peer)).await;
    }

    async fn report_unreachable(&self, peer: PeerId) {
        self.send(Command::Unreachable(peer)).await;
    }

    async fn report_rejection(&self, peer: PeerId) {
        self.send(Command::Rejected(peer)).await;
    }

    async fn announce(&self, changes: Vec<InventoryChange>) {
        self.send(Command::Announce(changes)).await;
    }

    async fn introduce(&self, credential: Credential, transfer: SocketAddr, gossip: SocketAddr, zone: Option<Zone>) {
        self.send(Command::Introduce { credential, transfer, gossip, zone }).await;
    }
}

/// Starts to listen. Nothing else happens until the task runs, which then updates `table`. The
/// returned address is the configured address with the bound port.
///
/// # Errors
/// [`MeshError`].
pub async fn start(
    config: Config,
    node: NodeName,
    identity: &Identity,
    inventory: SharedInventory,
    admission: Arc<dyn Admission>,
    metrics: Metrics,
) -> Result<(Mesh, MeshTask, SocketAddr), MeshError> {
    start_with_options(config, node, identity, inventory, admission, metrics, MeshOptions::DEFAULT).await
}

/// Options that are equal for all agents of a release; tests change them.
#[derive(Debug, Clone, Copy)]
struct MeshOptions {
    rate_limits: NeighborRateLimits,
    versions: Versions,
}

impl MeshOptions {
    const DEFAULT: Self = Self { rate_limits: NeighborRateLimits::DEFAULT, versions: Versions::GOSSIP };
}

async fn start_with_options(
    config: Config,
    node: NodeName,
    identity: &Identity,
    inventory: SharedInventory,
    admission: Arc<dyn Admission>,
    metrics: Metrics,
    options: MeshOptions,
) -> Result<(Mesh, MeshTask, SocketAddr), MeshError> {
    let Config { listen } = config;
    let connections = TaskTracker::new();
    let mut swarm = stack::build(&identity.keypair(), &connections, &metrics, options.versions)?;
    let port = bind(&mut swarm, listen).await?;
    if listen.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        // libp2p's IPv6 listeners accept no IPv4 connections, unlike a listener with the kernel's
        // defaults.
        bind(&mut swarm, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)).await?;
    }
    let local_agent = LocalAgent { peer: identity.peer_id(), epoch: epoch(), node, release: release() };
    let crypto = GossipCrypto::new(identity.keypair(), admission);
    let protocol = gossip::Protocol::new(local_agent, crypto, rand::random(), clock::now());
    let (sender, commands) = mpsc::channel(MAX_COMMANDS);
    let connected = ConnectedPeers::default();
    let task = MeshTask::new(swarm, connections, commands, protocol, inventory, metrics, options, connected.clone());
    Ok((Mesh { commands: sender, connected }, task, SocketAddr::new(listen.ip(), port)))
}

fn release() -> Release {
    env!("CARGO_PKG_VERSION").parse().expect("a version of this crate is a release's name")
}

/// Longest wait for the system's list of interfaces, which libp2p reads to listen on all of them.
const BIND_TIMEOUT: Duration = Duration::from_secs(5);

async fn bind(swarm: &mut libp2p::Swarm<stack::Behaviour>, address: SocketAddr) -> Result<u16, MeshError> {
    // libp2p listens with SO_REUSEPORT, and would share the port with an agent that still runs:
    // each process would get some of the connections. The kernel rejects a plain listener in that
    // case.
    match TcpListener::bind(address) {
        Ok(probe) => drop(probe),
        Err(error) => return Err(MeshError::Listen { address, reason: error.to_string() }),
    }
    listen_on(swarm, address).await
}

async fn listen_on(swarm: &mut libp2p::Swarm<stack::Behaviour>, address: SocketAddr) -> Result<u16, MeshError> {
    let failed = |reason: String| MeshError::Listen { address, reason };
    swarm.listen_on(multiaddr(address)).map_err(|error: TransportError<io::Error>| failed(error.to_string()))?;
    let wanted_ipv4 = address.is_ipv4();
    let bound = async {
        loop {
            if let SwarmEvent::NewListenAddr { address, .. } = swarm.select_next_some().await
                && let Some((is_ipv4, port)) = port_of(&address)
                && is_ipv4 == wanted_ipv4
            {
                return port;
            }
        }
    };
    tokio::time::timeout(BIND_TIMEOUT, bound)
        .await
        .map_err(|_| failed("no interface has an address of this family".into()))
}

fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// Whether the address is IPv4, and the TCP port.
fn port_of(address: &Multiaddr) -> Option<(bool, u16)> {
    let is_ipv4 = matches!(address.iter().next(), Some(Protocol::Ip4(_)));
    address.iter().find_map(|part| if let Protocol::Tcp(port) = part { Some((is_ipv4, port)) } else { None })
}

/// The epoch of this process: later starts have larger epochs, unless the clock went back.
fn epoch() -> u64 {
    let since = clock::unix_time();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
