//! Blobs from peer to peer over QUIC, and the one door through which peers are admitted.
//!
//! One UDP socket dials and listens, so the address that a peer's packets come from is where it can be dialled. Whoever
//! dials shows a libp2p certificate and sends a [`Hello`]; both ends ask their [`Admission`] before
//! anything else happens on the connection. A connection carries requests one way only, from the dialler: two agents
//! that fetch from each other have two. A blob is hashed while it comes; that it is the right one is the fetcher's
//! business alone.
//!
//! Not here: who holds what, which peer to ask, and when to try again.

mod acceptor;
mod close_codes;
mod congestion;
mod dial;
mod fetch;
mod hash_chain_cache;
mod peers;
mod rate_limiter;
mod rejection_log;
mod serve;
mod socket;
#[cfg(test)]
mod tests;
mod tls;
mod tuning;
mod upload_queue;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use quinn::{Endpoint, Incoming, TokioRuntime};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinError, JoinSet};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

pub use congestion::DelayBounded;
pub use dial::DialError;
pub use tls::TlsError;

use self::acceptor::HandshakeLimiter;
use self::hash_chain_cache::HashChainCache;
use self::peers::PeerTable;
use self::rate_limiter::{PolicyReceiver, RateLimiter};
use self::rejection_log::RejectionLog;
use self::tuning::Timeouts;
use self::upload_queue::UploadQueue;
use crate::decide::policy::Policy;
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{NodeName, NodeNameError, Peer, PeerId};
use crate::oci::HashChain;
use crate::ports::{Admission, AdmittedPeer, ContentStore, PartialBlobs, Rejection};
use crate::wire::{Format, Hello, Versions};

/// What is set from outside.
#[derive(Debug, Clone)]
pub struct Config {
    /// The UDP address to listen on and to dial from; `[::]` takes IPv4 too.
    pub listen: SocketAddr,
    /// The TCP port where this agent gossips, for others to know.
    pub gossip_port: u16,
    /// This node's name, for others' logs.
    pub node: NodeName,
    /// Orders of pieces that are sent at a time, the others queue; and so many whole blobs beside them, beyond which peers are told to ask
    /// elsewhere. Each costs up to 512 KiB of reads and, where the link or the reader is slow, 4 MiB under way.
    pub concurrent_uploads: usize,
}

/// What a transfer works with.
pub struct TransferDependencies {
    /// Decides about peers.
    pub admission: Arc<dyn Admission>,
    /// The blobs that are served.
    pub store: Arc<dyn ContentStore>,
    /// Those that are being fetched, whose pieces are served.
    pub partials: Arc<dyn PartialBlobs>,
    /// Where bytes and failures are counted.
    pub metrics: Metrics,
    /// Hears of peers that dialled us and were admitted, before they are told so; the same peer comes again each time it connects.
    pub admitted_peers: mpsc::Sender<Peer>,
}

/// The transfer could not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The address cannot be had.
    #[error("cannot listen for transfers on {address} (UDP): {source}")]
    Socket {
        /// The address that was set.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The certificate or the TLS configuration failed.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

/// The transfer adapter. Cheap to clone; clones are the same endpoint.
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
    store: Arc<dyn ContentStore>,
    partials: Arc<dyn PartialBlobs>,
    metrics: Metrics,
    admitted_peers: mpsc::Sender<Peer>,
    peers: PeerTable,
    /// Where a peer last saw us.
    observed_address: watch::Sender<Option<IpAddr>>,
    shared_key: watch::Sender<Option<NodeName>>,
    handshakes: Arc<HandshakeLimiter>,
    rejection_log: RejectionLog,
    /// Whole blobs.
    serve_permits: Semaphore,
    /// Pieces.
    uploads: UploadQueue,
    hash_chains: HashChainCache,
    timeouts: Timeouts,
    /// Everything that comes.
    download_limiter: RateLimiter,
    /// Everything that goes.
    upload_limiter: RateLimiter,
}

/// What a transfer keeps to.
struct TransferOptions {
    timeouts: Timeouts,
    policy: PolicyReceiver,
    versions: Versions,
}

impl Transfer {
    /// Binds the socket; nobody is let in before [`Transfer::run`]. No rate is kept.
    ///
    /// # Errors
    /// [`BindError`].
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time: the endpoint lives on the one that calls this.
    pub fn bind(config: Config, identity: &Identity, surroundings: TransferDependencies) -> Result<Self, BindError> {
        let bounds = TransferOptions { timeouts: Timeouts::DEFAULT, policy: None, versions: Versions::TRANSFER };
        Self::bind_with_options(config, identity, surroundings, bounds)
    }

    /// As [`Transfer::bind`], but what comes and what goes keeps to the rates of these rules, and to others as soon as they are sent.
    /// A rate is one for all peers together and counts the bytes of blobs.
    ///
    /// # Errors
    /// [`BindError`].
    ///
    /// # Panics
    /// As [`Transfer::bind`].
    pub fn bind_with_policy(
        config: Config,
        identity: &Identity,
        surroundings: TransferDependencies,
        rules: watch::Receiver<Arc<Policy>>,
    ) -> Result<Self, BindError> {
        let bounds = TransferOptions { timeouts: Timeouts::DEFAULT, policy: Some(rules), versions: Versions::TRANSFER };
        Self::bind_with_options(config, identity, surroundings, bounds)
    }

    /// As [`Transfer::bind_within`], as a release with other versions would: for tests of two releases side by side.
    ///
    /// # Errors
    /// [`BindError`].
    ///
    /// # Panics
    /// As [`Transfer::bind`].
    #[cfg(any(test, feature = "testing"))]
    pub fn bind_with_versions(
        config: Config,
        identity: &Identity,
        surroundings: TransferDependencies,
        rules: watch::Receiver<Arc<Policy>>,
        versions: Versions,
    ) -> Result<Self, BindError> {
        let bounds = TransferOptions { timeouts: Timeouts::DEFAULT, policy: Some(rules), versions };
        Self::bind_with_options(config, identity, surroundings, bounds)
    }

    fn bind_with_options(
        config: Config,
        identity: &Identity,
        surroundings: TransferDependencies,
        bounds: TransferOptions,
    ) -> Result<Self, BindError> {
        let Config { listen, gossip_port, node, concurrent_uploads } = config;
        let TransferDependencies { admission, store, partials, metrics, admitted_peers: joined } = surroundings;
        let TransferOptions { timeouts, policy: rules, versions } = bounds;
        let tls = tls::Tls::new(identity, versions)?;
        let listening = || {
            let socket = socket::bind(listen)?;
            let server = tuning::server(&tls);
            let endpoint = Endpoint::new(tuning::endpoint(), Some(server), socket, Arc::new(TokioRuntime))?;
            Ok((endpoint.local_addr()?, endpoint))
        };
        let (local_address, endpoint) = listening().map_err(|source| BindError::Socket { address: listen, source })?;
        Ok(Self(Arc::new(Shared {
            own_id: identity.peer_id(),
            node,
            gossip_port,
            versions,
            local_address,
            endpoint,
            client: tuning::client(&tls),
            admission,
            store,
            partials,
            metrics,
            admitted_peers: joined,
            peers: PeerTable::default(),
            observed_address: watch::Sender::new(None),
            shared_key: watch::Sender::new(None),
            handshakes: Arc::default(),
            rejection_log: RejectionLog::default(),
            serve_permits: Semaphore::new(concurrent_uploads),
            uploads: UploadQueue::new(concurrent_uploads),
            hash_chains: HashChainCache::new(timeouts.slow_reader),
            timeouts,
            download_limiter: RateLimiter::new(rules.clone(), |budgets| budgets.max_download_rate),
            upload_limiter: RateLimiter::new(rules, |budgets| budgets.max_upload_rate),
        })))
    }

    /// The address that the socket has; its port is known even when 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local_address
    }

    /// Lets peers in and serves them until `stop`, then lets streams end for a few seconds and closes what is left.
    pub async fn run(self, stop: CancellationToken) {
        let shared = self.0;
        let mut connections = JoinSet::new();
        let mut sweep = interval(SWEEP_INTERVAL);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut renewed = shared.admission.credential_changes();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                incoming = shared.endpoint.accept() => match incoming {
                    Some(incoming) => shared.accept(incoming, &mut connections, &stop),
                    None => break,
                },
                Some(ended) = connections.join_next() => report_panic(ended),
                Ok(()) = renewed.changed() => shared.peers.retire_outbound(),
                _ = sweep.tick() => {
                    shared.peers.close_unused(shared.timeouts.idle_connection);
                    shared.close_expired(since_1970());
                }
            }
        }
        shared.endpoint.set_server_config(None);
        let drained = async { while connections.join_next().await.is_some() {} };
        if timeout(shared.timeouts.drain, drained).await.is_err() {
            tracing::info!(connections = connections.len(), "stopping in the middle of serving");
        }
        shared.peers.close_all();
        shared.endpoint.close(close_codes::DONE, close_codes::AGENT_STOPS);
        connections.shutdown().await;
        // So that peers hear of it; they need not.
        let _ = timeout(CLOSE_TIMEOUT, shared.endpoint.wait_idle()).await;
    }

    /// Meets whoever is at `address`, and keeps the connection and the address. With `expect`, nobody else will do. A
    /// peer to which there is a connection is not greeted again while our admission's verdict about it lasts.
    ///
    /// # Errors
    /// [`GreetError`].
    pub async fn dial(&self, address: SocketAddr, expect: Option<PeerId>) -> Result<Peer, DialError> {
        let address = canonical(address);
        let known = self.0.peers.connected_at(address, since_1970());
        if let Some(peer) = known.filter(|peer| expect.is_none_or(|expected| expected == peer.id)) {
            return Ok(peer);
        }
        let (peer, connection, admission) = self.0.dial(address, expect).await?;
        self.0.peers.insert(&peer, admission).map_err(|full| DialError::NotAdmitted {
            peer: peer.id,
            address,
            refusal: Rejection::Undecided(full.to_string()),
        })?;
        if let Some((_, outbound)) = self.0.peers.find(peer.id) {
            outbound.insert(connection);
        }
        Ok(peer)
    }

    /// Whether anything comes back over UDP from whoever listens at `address`: a handshake that is closed at once. A
    /// connection that exists is an answer.
    ///
    /// # Errors
    /// [`quinn::ConnectError`] where no packet was sent.
    pub async fn probe(&self, address: SocketAddr) -> Result<bool, quinn::ConnectError> {
        let address = canonical(address);
        if self.0.peers.connected_at(address, since_1970()).is_some() {
            return Ok(true);
        }
        self.0.probe(address).await
    }

    /// Where a peer is that never came through this door, so that it can be fetched from: it is dialled when it is needed, and
    /// admitted then like any other. One that is known already has moved.
    pub fn add_peer_address(&self, peer: &Peer) {
        if let Err(full) = self.0.peers.insert_address(peer) {
            tracing::debug!(peer = %peer.id, %full, "not remembered");
        }
    }

    /// The peers that were admitted, on either side, or are known, and not forgotten.
    pub fn peers(&self) -> Vec<Peer> {
        self.0.peers.all()
    }

    /// One of them.
    pub fn peer(&self, peer: PeerId) -> Option<Peer> {
        self.0.peers.get(peer)
    }

    /// For how much longer our admission's last verdict about the peer is good; zero where there is none.
    pub fn admitted_for(&self, peer: PeerId) -> Duration {
        self.0.peers.admitted_until(peer).saturating_sub(since_1970())
    }

    /// Where a peer last said that it sees this agent. It was admitted, and may be wrong all the same.
    pub fn observed_address(&self) -> watch::Receiver<Option<IpAddr>> {
        self.0.observed_address.subscribe()
    }

    /// The node whose agent last proved this agent's own key.
    pub fn shared_key(&self) -> watch::Receiver<Option<NodeName>> {
        self.0.shared_key.subscribe()
    }

    /// The list of states of a blob that was fetched and proved here, so that it needs not be made again for those who ask for it.
    pub fn add_hash_chain(&self, chain: Arc<HashChain>) {
        self.0.hash_chains.insert(chain);
    }

    /// Drops the peer's address and its connections; what is fetched from it ends as unreachable. It may come back
    /// through the door.
    pub fn remove_peer(&self, peer: PeerId) {
        self.0.peers.remove(peer);
    }
}

/// How often unused connections are looked for.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// For the last packets: closing needs one way, and up to three timeouts when packets are lost.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

impl Shared {
    /// The format of messages on a connection. [`Shared::dial`] and [`Shared::meet`] have closed those without one.
    fn format_on(&self, connection: &quinn::Connection) -> Format {
        tls::format_of(connection, self.versions).unwrap_or(self.versions.current())
    }

    /// Decides about a connection attempt before it costs anything.
    fn accept(self: &Arc<Self>, incoming: Incoming, connections: &mut JoinSet<()>, stop: &CancellationToken) {
        if self.handshakes.is_retry_required() && !incoming.remote_address_validated() {
            // It can be: the address is not validated yet.
            let _ = incoming.retry();
            return;
        }
        match self.handshakes.try_acquire(canonical(incoming.remote_address()).ip()) {
            Some(permit) => drop(connections.spawn(self.clone().handle_connection(incoming, permit, stop.clone()))),
            None => incoming.refuse(),
        }
    }
}

/// A dual-stack socket sees IPv4 peers under mapped addresses; people and the other adapters know them by the plain ones.
fn canonical(address: SocketAddr) -> SocketAddr {
    match address {
        SocketAddr::V6(v6) if v6.ip().to_ipv4_mapped().is_some() => {
            SocketAddr::new(address.ip().to_canonical(), address.port())
        }
        other => other,
    }
}

fn since_1970() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

/// What is known of a peer after its introduction: the credential's word on the node's name goes before its own.
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

/// A peer's words, fit for a log line and a reason: no control characters, and no longer than a sentence.
fn printable(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).take(256).collect()
}

/// The metric's label.
fn admission_result(decided: Result<&AdmittedPeer, &Rejection>) -> &'static str {
    match decided {
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
        tracing::error!(%error, "a connection's task failed");
    }
}
