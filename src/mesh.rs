//! The mesh: agents tell each other what they hold, over libp2p.
//!
//! It runs over TCP (noise, yamux) beside the QUIC that carries blobs, so that the two do not fail together. Peers are admitted
//! elsewhere, at the QUIC door; here only the PeerIds that came in there may connect at all, and a stranger's connection ends after
//! its handshake, before any stream is open.
//!
//! # The simple form
//!
//! Every agent connects to every admitted peer. Each keeps a log of its own content (`log`): an epoch for its process, and a
//! number for each announcement. Gossipsub carries what changed, gathered for up to a second and signed by its publisher. Who
//! finds a gap (`follower`), a new epoch, or a peer it did not know, asks the publisher itself for a snapshot. After a batch,
//! after somebody subscribed, and once a minute anyway an empty announcement follows, so that a loss shows as a gap and mends
//! itself. Peers ping each other every second; one that answers over no connection for three seconds is down, its content is
//! forgotten, and it is dialled again for as long as it is admitted.
//!
//! This is fine for some dozens of nodes: connections grow with their square, the empty announcements with their number. What
//! larger clusters need is not here yet: a few random neighbours instead of everybody, comparing version vectors with one of
//! them instead of empty announcements, entries and snapshots that any neighbour can relay, and a second witness before a peer
//! is called dead.
//!
//! Deliberately not used: identify (the port comes with the admission), Kademlia (slow exactly when nobody has the image, and keeps
//! stale providers), mDNS (anybody on the segment could invent peers), relays, AutoNAT and hole punching (nodes reach
//! each other), gossipsub's peer exchange and scores (peers are authenticated one by one), QUIC (see above).

mod codec;
mod follower;
mod log;
mod member;
mod stack;
mod task;

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use libp2p::core::transport::TransportError;
use libp2p::multiaddr::{Multiaddr, Protocol};
use libp2p::swarm::SwarmEvent;
use tokio::sync::mpsc;
use tokio_util::task::TaskTracker;

use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{ContentChange, Peer, PeerId};
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

/// What the agent asks of the mesh. Cheap to clone.
///
/// Nothing is answered: what comes of it is told as [`crate::model::MeshEvent`]s. Once the task has ended, calls do nothing.
#[derive(Debug, Clone)]
pub struct Mesh {
    commands: mpsc::Sender<Command>,
}

/// A call of [`Mesh`], on its way to the task.
#[derive(Debug)]
enum Command {
    Admit(Peer),
    Dismiss(PeerId),
    Announce(Vec<ContentChange>),
}

/// Calls that wait for the task. It takes them even while nobody takes its events, so this need only span one turn of its loop.
const MAX_COMMANDS: usize = 64;

impl Mesh {
    /// Lets this peer connect, and connects to it, for as long as it is not dismissed. Admitted again it may have moved.
    pub async fn admit(&self, peer: Peer) {
        self.send(Command::Admit(peer)).await;
    }

    /// Lets this peer connect no more and ends its connections.
    pub async fn dismiss(&self, peer: PeerId) {
        self.send(Command::Dismiss(peer)).await;
    }

    /// This node's content changed. What changes nothing is not announced, so that it does no harm to say it twice.
    pub async fn announce(&self, changes: Vec<ContentChange>) {
        self.send(Command::Announce(changes)).await;
    }

    async fn send(&self, command: Command) {
        // The task ended, and its supervisor knows.
        let _ = self.commands.send(command).await;
    }
}

/// Begins to listen. Nothing else happens until the task runs. The address is the configured one with the port really bound.
///
/// # Errors
/// [`MeshError`].
pub async fn start(
    config: Config,
    identity: &Identity,
    metrics: Metrics,
) -> Result<(Mesh, MeshTask, SocketAddr), MeshError> {
    let Config { listen } = config;
    let connections = TaskTracker::new();
    let mut swarm = stack::build(&identity.keypair(), &connections)?;
    let port = bind(&mut swarm, listen).await?;
    if listen.ip() == IpAddr::V6(Ipv6Addr::UNSPECIFIED) {
        // libp2p's IPv6 listeners take no IPv4, unlike everybody else's.
        listen_on(&mut swarm, SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), port)).await?;
    }
    let (sender, commands) = mpsc::channel(MAX_COMMANDS);
    let task = MeshTask::new(swarm, connections, commands, identity.peer_id(), epoch(), metrics);
    Ok((Mesh { commands: sender }, task, SocketAddr::new(listen.ip(), port)))
}

/// Longest wait for the system's list of interfaces, which libp2p reads when it listens on all of them.
const BIND: Duration = Duration::from_secs(5);

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
    tokio::time::timeout(BIND, bound).await.map_err(|_| failed("no interface has an address of this kind".into()))
}

fn multiaddr(address: SocketAddr) -> Multiaddr {
    Multiaddr::from(address.ip()).with(Protocol::Tcp(address.port()))
}

/// Whether it is an IPv4 address, and the TCP port.
fn port_of(address: &Multiaddr) -> Option<(bool, u16)> {
    let is_ipv4 = matches!(address.iter().next(), Some(Protocol::Ip4(_)));
    address.iter().find_map(|part| if let Protocol::Tcp(port) = part { Some((is_ipv4, port)) } else { None })
}

/// This process's epoch: later starts have larger ones. (If the clock went back, peers find that out from our snapshot.)
fn epoch() -> u64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

/// The wait after so many failures in a row: 1 s, doubling to 30 s, less up to half by `jitter` (random, in 0..1), so that a
/// restarted node is not asked by everybody at once.
fn backoff(failures: u32, jitter: f64) -> Duration {
    let seconds = 1u32.checked_shl(failures).map_or(30, |doubled| doubled.clamp(1, 30));
    Duration::from_secs(seconds.into()).mul_f64(0.5 + jitter / 2.0)
}

#[cfg(test)]
mod tests;
