//! The mesh: agents tell each other what they hold, over libp2p.
//!
//! It runs over TCP (noise, yamux) beside the QUIC that carries blobs, so that the two do not fail together. Peers are admitted
//! elsewhere, at the QUIC door; here only the PeerIds that came in there may connect at all, and a stranger's connection ends after
//! its handshake, before any stream is open.
//!
//! Ranges of small blobs pass here too, for nodes between which UDP is blocked ([`RangeServer`]).
//!
//! What agents say, believe, ask and answer is [`crate::decide::gossip`]'s; this module only does what it says: it turns libp2p's
//! events, the agent's calls and the clock into calls of that protocol, and what comes of them into libp2p's. What it adds is what
//! only an adapter can: bounds on connections, streams, queues and time, and how much one neighbour may send before anything of it is
//! decoded.
//!
//! Deliberately not used: identify (the port comes with the admission), Kademlia (slow exactly when nobody has the image, and keeps
//! stale providers), mDNS (anybody on the segment could invent peers), relays, AutoNAT and hole punching (nodes reach
//! each other), gossipsub's signatures (what is passed on carries its author's, which outlives a relay), peer exchange and scores
//! (the protocol blames), QUIC (see above).

mod codec;
mod gossip_crypto;
mod metered_stream;
mod neighbour_budget;
mod ranges;
mod shared_inventory;
mod stack;
mod task;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, Instant, SystemTime};

use futures::StreamExt;
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::{Multiaddr, Protocol};
use libp2p::swarm::SwarmEvent;
use tokio::sync::{mpsc, oneshot};
use tokio_util::task::TaskTracker;

use self::gossip_crypto::GossipCrypto;
use self::neighbour_budget::NeighbourRateLimits;
use crate::decide::gossip::{self, LocalAgent};
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{Credential, InventoryChange, MeshStatus, NodeName, Peer, PeerId, Release, Zone};
use crate::ports::Admission;
use crate::wire::{Request, Versions};
pub use ranges::{RangeError, RangeResponse, RangeServer};
pub use shared_inventory::SharedInventory;
pub use task::MeshTask;

/// What the mesh needs to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Where to listen (TCP); port 0 takes any.
    pub listen: SocketAddr,
}

/// The mesh cannot start.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// Its port cannot be had.
    #[error("gossip cannot listen on {address}: {reason}; is the port taken, or the address not this node's?")]
    Listen {
        /// Where it should.
        address: SocketAddr,
        /// What the system said.
        reason: String,
    },
    /// libp2p refuses its configuration, which is a bug.
    #[error("libp2p cannot be set up: {0}")]
    Stack(String),
}

/// What the mesh tells the agent. Who holds what it writes into the [`Table`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MembershipEvent {
    /// This peer can be fetched from, from now on or at another address.
    Up(Peer),
    /// It cannot any more.
    Down(PeerId),
    /// It should be greeted at its door; then it is admitted, or reported as out of reach.
    Handshake(Peer),
    /// This node's agent has this agent's key.
    SharedKey(NodeName),
}

/// What the agent asks of the mesh. Cheap to clone.
///
/// What comes of a call is told as [`MeshNews`]. Once the task has ended, calls do nothing.
#[derive(Debug, Clone)]
pub struct Mesh {
    commands: mpsc::Sender<Command>,
    connected: ConnectedPeers,
}

/// A call of [`Mesh`], on its way to the task.
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

/// The neighbours: the peers with an open connection.
#[derive(Debug, Clone, Default)]
struct ConnectedPeers(Arc<RwLock<BTreeSet<PeerId>>>);

impl ConnectedPeers {
    fn contains(&self, peer: PeerId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(&peer)
    }

    fn set(&self, peer: PeerId, is_connected: bool) {
        let mut peers = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if is_connected {
            peers.insert(peer)
        } else {
            peers.remove(&peer)
        };
    }
}

/// Calls that wait for the task. It takes them even while nobody takes its news, so this need only span one turn of its loop.
const MAX_COMMANDS: usize = 64;

impl Mesh {
    /// The door let this peer in, for so long. Admitted again it may have moved.
    pub async fn admit(&self, peer: Peer, life: Duration) {
        self.send(Command::Admit(peer, life)).await;
    }

    /// Lets this peer connect no more and ends its connections, until it is admitted again.
    pub async fn revoke_admission(&self, peer: PeerId) {
        self.send(Command::RevokeAdmission(peer)).await;
    }

    /// Nothing came back from this peer's door.
    pub async fn report_unreachable(&self, peer: PeerId) {
        self.send(Command::Unreachable(peer)).await;
    }

    /// This peer was not met at its door, but somebody answered there.
    pub async fn report_rejection(&self, peer: PeerId) {
        self.send(Command::Rejected(peer)).await;
    }

    /// Nothing came back from it to fetch from.
    pub async fn suspect(&self, peer: PeerId) {
        self.send(Command::Suspect(peer)).await;
    }

    /// This node's content changed. What changes nothing is not announced, so that it does no harm to say it twice.
    pub async fn announce(&self, changes: Vec<InventoryChange>) {
        self.send(Command::Announce(changes)).await;
    }

    /// What others are told of this agent: why they should believe it, where it serves blobs, where it gossips, and its zone where the
    /// cluster has any. Before the first call it cannot join; to be called again when something of it changes.
    pub async fn introduce(
        &self,
        credential: Credential,
        transfer: SocketAddr,
        gossip: SocketAddr,
        zone: Option<Zone>,
    ) {
        self.send(Command::Introduce { credential, transfer, gossip, zone }).await;
    }

    /// How the mesh looks from here; `None` once the task has ended.
    pub async fn status(&self) -> Option<MeshStatus> {
        let (answer, status) = oneshot::channel();
        self.send(Command::Status(answer)).await;
        status.await.ok()
    }

    /// Whether there is a connection to this peer.
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.connected.contains(peer)
    }

    /// Sends a request for a range to a neighbour, and returns its answer. The caller bounds the
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
        // The task ended, and its supervisor knows.
        let _ = self.commands.send(command).await;
    }
}

/// Begins to listen. Nothing else happens until the task runs, which then keeps `table`. The address is the configured one with the
/// port really bound.
///
/// # Errors
/// [`MeshError`].
pub async fn start(
    config: Config,
    node: NodeName,
    identity: &Identity,
    table: SharedInventory,
    admission: Arc<dyn Admission>,
    metrics: Metrics,
) -> Result<(Mesh, MeshTask, SocketAddr), MeshError> {
    start_with_options(config, node, identity, table, admission, metrics, MeshOptions::DEFAULT).await
}

/// What is the same for all agents of a release; tests set it otherwise.
#[derive(Debug, Clone, Copy)]
struct MeshOptions {
    rate_limits: NeighbourRateLimits,
    versions: Versions,
}

impl MeshOptions {
    const DEFAULT: Self = Self { rate_limits: NeighbourRateLimits::DEFAULT, versions: Versions::GOSSIP };
}

async fn start_with_options(
    config: Config,
    node: NodeName,
    identity: &Identity,
    table: SharedInventory,
    admission: Arc<dyn Admission>,
    metrics: Metrics,
    terms: MeshOptions,
) -> Result<(Mesh, MeshTask, SocketAddr), MeshError> {
    let Config { listen } = config;
    let connections = TaskTracker::new();
    let mut swarm = stack::build(&identity.keypair(), &connections, &metrics, terms.versions)?;
    let port = bind(&mut swarm, listen).await?;
    if listen.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        // libp2p's IPv6 listeners take no IPv4, unlike everybody else's.
        bind(&mut swarm, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)).await?;
    }
    let own = LocalAgent { peer: identity.peer_id(), epoch: epoch(), node, release: release() };
    let keys = GossipCrypto::new(identity.keypair(), admission);
    let protocol = gossip::Protocol::new(own, keys, rand::random(), Instant::now());
    let (sender, commands) = mpsc::channel(MAX_COMMANDS);
    let connected = ConnectedPeers::default();
    let task = MeshTask::new(swarm, connections, commands, protocol, table, metrics, terms, connected.clone());
    Ok((Mesh { commands: sender, connected }, task, SocketAddr::new(listen.ip(), port)))
}

/// What this agent runs.
fn release() -> Release {
    env!("CARGO_PKG_VERSION").parse().expect("a version of this crate is a release's name")
}

/// Longest wait for the system's list of interfaces, which libp2p reads when it listens on all of them.
const BIND_TIMEOUT: Duration = Duration::from_secs(5);

async fn bind(swarm: &mut libp2p::Swarm<stack::Behaviour>, address: SocketAddr) -> Result<u16, MeshError> {
    // libp2p listens with SO_REUSEPORT, and would share the port with an agent that still runs: each would get some of
    // the connections. A plain listener is refused then.
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
        .map_err(|_| failed("no interface has an address of this kind".into()))
}

fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// Whether it is an IPv4 address, and the TCP port.
fn port_of(address: &Multiaddr) -> Option<(bool, u16)> {
    let is_ipv4 = matches!(address.iter().next(), Some(Protocol::Ip4(_)));
    address.iter().find_map(|part| if let Protocol::Tcp(port) = part { Some((is_ipv4, port)) } else { None })
}

/// This process's epoch: later starts have larger ones, unless the clock went back.
fn epoch() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
