//! Moves blobs between peers over QUIC, and admits the peers.
//!
//! One UDP socket dials and listens, so a peer can be dialed at the address of its packets. The
//! dialer shows a libp2p certificate and sends a [`Hello`]. Both ends consult their [`Admission`]
//! before anything else happens on the connection. A connection carries requests of the dialer
//! only: two agents that fetch from each other have two connections. The fetching end hashes a blob
//! while the bytes arrive, and alone verifies the digest.
//!
//! Not here: the inventory of providers, the choice of a peer, and retries.

mod acceptor;
mod binding;
mod close_codes;
mod congestion;
mod dial;
mod fetch;
mod hash_chain_cache;
mod peers;
mod probe;
mod rate_limiter;
mod rejection_log;
mod serve;
mod socket;
#[cfg(test)]
mod tests;
mod tls;
mod tuning;
mod upload_queue;

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use quinn::{Endpoint, Incoming};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

pub use binding::{BindError, Config, TransferDependencies};
pub use congestion::DelayBounded;
pub use tls::TlsError;

use self::acceptor::HandshakeLimiter;
use self::hash_chain_cache::HashChainCache;
use self::peers::PeerTable;
use self::rate_limiter::RateLimiter;
use self::rejection_log::RejectionLog;
use self::tuning::Timeouts;
use self::upload_queue::UploadQueue;
use crate::metrics::Metrics;
use crate::model::{NodeName, NodeNameError, Peer, PeerId};
use crate::oci::HashChain;
use crate::ports::{Admission, AdmittedPeer, Blobs, DialError, Dialer, PartialBlobs, Rejection};
use crate::util::clock::unix_time;
use crate::wire::{Format, Hello, Versions};

/// The transfer adapter. Clones are cheap and share one endpoint.
#[derive(Clone)]
pub struct Transfer(Arc<Shared>);

struct Shared {
    own_id: PeerId,
    node: NodeName,
    gossip_port: u16,
    versions: Versions,
    local_address: SocketAddr,
    endpoint: Endpoint,
    client: quinn::ClientConfig,
    admission: Arc<dyn Admission>,
    store: Arc<dyn Blobs>,
    partials: Arc<dyn PartialBlobs>,
    metrics: Metrics,
    admitted_peers: mpsc::Sender<Peer>,
    peers: PeerTable,
    /// This node's address, as a peer last reported the address in `Hello`.
    observed_address: watch::Sender<Option<IpAddr>>,
    shared_key: watch::Sender<Option<NodeName>>,
    handshakes: Arc<HandshakeLimiter>,
    rejection_log: RejectionLog,
    /// Permits for uploads of whole blobs.
    serve_permits: Semaphore,
    /// Slots for uploads of pieces.
    uploads: UploadQueue,
    hash_chains: HashChainCache,
    timeouts: Timeouts,
    download_limiter: RateLimiter,
    upload_limiter: RateLimiter,
}

impl Transfer {
    /// The bound address; the port is the real port even when the configured port is 0.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local_address
    }

    /// Accepts connections and serves peers until `stop`. Open streams then get 3 seconds to end,
    /// and the rest is closed.
    pub async fn run(self, stop: CancellationToken) {
        let shared = self.0;
        let mut connections = JoinSet::new();
        let mut sweep = interval(SWEEP_INTERVAL);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut credential_changes = shared.admission.credential_changes();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                incoming = shared.endpoint.accept() => match incoming {
                    Some(incoming) => shared.accept(incoming, &mut connections, &stop),
                    None => break,
                },
                Some(ended) = connections.join_next() => report_panic(ended),
                Ok(()) = credential_changes.changed() => shared.peers.retire_outbound(),
                _ = sweep.tick() => {
                    shared.peers.close_unused(shared.timeouts.idle_connection);
                    shared.close_expired(unix_time());
                }
            }
        }
        shared.endpoint.set_server_config(None);
        let drained = async { while connections.join_next().await.is_some() {} };
        if timeout(shared.timeouts.drain, drained).await.is_err() {
            tracing::info!(connections = connections.len(), "the agent stops before all uploads ended");
        }
        shared.peers.close_all();
        shared.endpoint.close(close_codes::DONE, close_codes::AGENT_STOPS);
        connections.shutdown().await;
        // Lets the close frames leave. A peer that misses its frame runs into the idle timeout.
        let _ = timeout(CLOSE_TIMEOUT, shared.endpoint.wait_idle()).await;
    }

    /// This node's address, as an admitted peer last reported the address. The peer may be wrong.
    pub fn observed_address(&self) -> watch::Receiver<Option<IpAddr>> {
        self.0.observed_address.subscribe()
    }

    /// The node whose agent last proved this agent's own key.
    pub fn shared_key(&self) -> watch::Receiver<Option<NodeName>> {
        self.0.shared_key.subscribe()
    }

    /// Caches the hash chain of a blob that was fetched and verified here. A request for the chain
    /// then costs no hashing.
    pub fn add_hash_chain(&self, chain: Arc<HashChain>) {
        self.0.hash_chains.insert(chain);
    }
}

#[async_trait]
impl Dialer for Transfer {
    async fn dial(&self, address: SocketAddr, expect: Option<PeerId>) -> Result<Peer, DialError> {
        let address = canonical(address);
        let known = self.0.peers.connected_at(address, unix_time());
        if let Some(peer) = known.filter(|peer| expect.is_none_or(|expected| expected == peer.id)) {
            return Ok(peer);
        }
        let (peer, connection, admission) = self.0.dial(address, expect).await?;
        self.0.peers.insert(&peer, admission).map_err(|error| DialError::NotAdmitted {
            peer: peer.id,
            address,
            refusal: Rejection::Undecided(error.to_string()),
        })?;
        if let Some((_, outbound)) = self.0.peers.find(peer.id) {
            outbound.insert(connection);
        }
        Ok(peer)
    }

    fn admitted_for(&self, peer: PeerId) -> Duration {
        self.0.peers.admitted_until(peer).saturating_sub(unix_time())
    }

    fn add_peer_address(&self, peer: &Peer) {
        if let Err(error) = self.0.peers.insert_address(peer) {
            tracing::debug!(peer = %peer.id, %error, "peer address not recorded");
        }
    }

    fn peers(&self) -> Vec<Peer> {
        self.0.peers.all()
    }

    fn peer(&self, peer: PeerId) -> Option<Peer> {
        self.0.peers.get(peer)
    }

    fn remove_peer(&self, peer: PeerId) {
        self.0.peers.remove(peer);
    }
}

/// Interval between searches for unused connections and expired verdicts.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// Time for the last packets: a close needs one way, and up to three timeouts when packets are
/// lost.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

impl Shared {
    /// The format of messages on a connection. [`Shared::dial`] and [`Shared::authenticate`] close
    /// a connection without a common format.
    fn format_on(&self, connection: &quinn::Connection) -> Format {
        tls::format_of(connection, self.versions).unwrap_or(self.versions.current())
    }

    /// Refuses or validates a connection attempt before the handshake costs anything.
    fn accept(self: &Arc<Self>, incoming: Incoming, connections: &mut JoinSet<()>, stop: &CancellationToken) {
        if self.handshakes.is_retry_required() && !incoming.remote_address_validated() {
            // `retry` cannot fail here: the address is not validated yet.
            let _ = incoming.retry();
            return;
        }
        match self.handshakes.try_acquire(canonical(incoming.remote_address()).ip()) {
            Some(permit) => drop(connections.spawn(self.clone().handle_connection(incoming, permit, stop.clone()))),
            None => incoming.refuse(),
        }
    }
}

/// The plain form of an IPv4-mapped address. A dual-stack socket reports mapped addresses for IPv4
/// peers; logs and the other adapters use the plain form.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            SocketAddr::new(address.ip().to_canonical(), address.port())
        }
        other => other,
    }
}

/// The node name in a verified credential takes precedence over the name in `Hello`.
fn peer_from(
    id: PeerId,
    address: SocketAddr,
    hello: &Hello,
    verified_node: Option<NodeName>,
) -> Result<Peer, NodeNameError> {
    let node = verified_node.map_or_else(|| hello.node.parse(), Ok)?;
    let mut gossip = address;
    gossip.set_port(hello.gossip_port);
    Ok(Peer { id, node, zone: None, transfer: address, gossip })
}

/// A peer's text for a log line or a reason: no control characters, at most 256 characters.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(256).collect()
}

/// The label value of the admission metric.
fn admission_result(verdict: Result<&AdmittedPeer, &Rejection>) -> &'static str {
    match verdict {
        Ok(admitted) if admitted.is_in_grace => "on_grace",
        Ok(_) => "admitted",
        Err(Rejection::Denied(_)) => "denied",
        Err(Rejection::Undecided(_)) => "cannot_tell",
    }
}

fn report_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task panicked");
    }
}
