//! Blobs from peer to peer over QUIC, and the one door through which peers are admitted.
//!
//! One UDP socket dials and listens, so the address that a peer's packets come from is where it can be dialled. Whoever
//! dials shows a libp2p certificate and sends a [`Hello`]; both ends ask their [`Admission`] before
//! anything else happens on the connection. A connection carries requests one way only, from the dialler: two agents
//! that fetch from each other have two. A blob is hashed while it comes; that it is the right one is the fetcher's
//! business alone.
//!
//! Not here: who holds what, which peer to ask, and when to try again.

mod chains;
mod codes;
mod congestion;
mod door;
mod fetch;
mod greet;
mod peers;
mod refusals;
mod serve;
mod socket;
#[cfg(test)]
mod tests;
mod throttle;
mod tls;
mod tuning;
mod uploads;

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
pub use greet::GreetError;
pub use tls::TlsError;

use self::chains::Chains;
use self::door::Door;
use self::peers::Peers;
use self::refusals::Refusals;
use self::throttle::{InForce, Throttle};
use self::tuning::Limits;
use self::uploads::Uploads;
use crate::decide::rules::Rules;
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{NodeName, NodeNameError, Peer, PeerId};
use crate::oci::Chain;
use crate::ports::{Admission, Admitted, ContentStore, Partials, Refusal};
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
    pub max_serving: usize,
}

/// What a transfer works with.
pub struct Surroundings {
    /// Decides about peers.
    pub admission: Arc<dyn Admission>,
    /// The blobs that are served.
    pub store: Arc<dyn ContentStore>,
    /// Those that are being fetched, whose pieces are served.
    pub partials: Arc<dyn Partials>,
    /// Where bytes and failures are counted.
    pub metrics: Metrics,
    /// Hears of peers that dialled us and were admitted, before they are told so; the same peer comes again each time it connects.
    pub joined: mpsc::Sender<Peer>,
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
    me: PeerId,
    node: NodeName,
    gossip_port: u16,
    versions: Versions,
    local: SocketAddr,
    endpoint: Endpoint,
    client: quinn::ClientConfig,
    admission: Arc<dyn Admission>,
    store: Arc<dyn ContentStore>,
    partials: Arc<dyn Partials>,
    metrics: Metrics,
    joined: mpsc::Sender<Peer>,
    peers: Peers,
    /// Where a peer last saw us.
    seen: watch::Sender<Option<IpAddr>>,
    shared_key: watch::Sender<Option<NodeName>>,
    door: Arc<Door>,
    refusals: Refusals,
    /// Whole blobs.
    serving: Semaphore,
    /// Pieces.
    uploads: Uploads,
    chains: Chains,
    limits: Limits,
    /// Everything that comes.
    down: Throttle,
    /// Everything that goes.
    up: Throttle,
}

/// What a transfer keeps to.
struct Bounds {
    limits: Limits,
    rules: InForce,
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
    pub fn bind(config: Config, identity: &Identity, surroundings: Surroundings) -> Result<Self, BindError> {
        let bounds = Bounds { limits: Limits::DEFAULT, rules: None, versions: Versions::TRANSFER };
        Self::bind_with(config, identity, surroundings, bounds)
    }

    /// As [`Transfer::bind`], but what comes and what goes keeps to the rates of these rules, and to others as soon as they are sent.
    /// A rate is one for all peers together and counts the bytes of blobs.
    ///
    /// # Errors
    /// [`BindError`].
    ///
    /// # Panics
    /// As [`Transfer::bind`].
    pub fn bind_within(
        config: Config,
        identity: &Identity,
        surroundings: Surroundings,
        rules: watch::Receiver<Arc<Rules>>,
    ) -> Result<Self, BindError> {
        let bounds = Bounds { limits: Limits::DEFAULT, rules: Some(rules), versions: Versions::TRANSFER };
        Self::bind_with(config, identity, surroundings, bounds)
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
        surroundings: Surroundings,
        rules: watch::Receiver<Arc<Rules>>,
        versions: Versions,
    ) -> Result<Self, BindError> {
        let bounds = Bounds { limits: Limits::DEFAULT, rules: Some(rules), versions };
        Self::bind_with(config, identity, surroundings, bounds)
    }

    fn bind_with(
        config: Config,
        identity: &Identity,
        surroundings: Surroundings,
        bounds: Bounds,
    ) -> Result<Self, BindError> {
        let Config { listen, gossip_port, node, max_serving } = config;
        let Surroundings { admission, store, partials, metrics, joined } = surroundings;
        let Bounds { limits, rules, versions } = bounds;
        let tls = tls::Tls::new(identity, versions)?;
        let listening = || {
            let socket = socket::bind(listen)?;
            let server = tuning::server(&tls);
            let endpoint = Endpoint::new(tuning::endpoint(), Some(server), socket, Arc::new(TokioRuntime))?;
            Ok((endpoint.local_addr()?, endpoint))
        };
        let (local, endpoint) = listening().map_err(|source| BindError::Socket { address: listen, source })?;
        Ok(Self(Arc::new(Shared {
            me: identity.peer_id(),
            node,
            gossip_port,
            versions,
            local,
            endpoint,
            client: tuning::client(&tls),
            admission,
            store,
            partials,
            metrics,
            joined,
            peers: Peers::default(),
            seen: watch::Sender::new(None),
            shared_key: watch::Sender::new(None),
            door: Arc::default(),
            refusals: Refusals::default(),
            serving: Semaphore::new(max_serving),
            uploads: Uploads::new(max_serving),
            chains: Chains::new(limits.reader),
            limits,
            down: Throttle::new(rules.clone(), |budgets| budgets.max_download_rate),
            up: Throttle::new(rules, |budgets| budgets.max_upload_rate),
        })))
    }

    /// The address that the socket has; its port is known even when 0 was asked for.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local
    }

    /// Lets peers in and serves them until `stop`, then lets streams end for a few seconds and closes what is left.
    pub async fn run(self, stop: CancellationToken) {
        let shared = self.0;
        let mut connections = JoinSet::new();
        let mut sweep = interval(SWEEP);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut renewed = shared.admission.renewed();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                incoming = shared.endpoint.accept() => match incoming {
                    Some(incoming) => shared.knock(incoming, &mut connections, &stop),
                    None => break,
                },
                Some(ended) = connections.join_next() => report_panic(ended),
                Ok(()) = renewed.changed() => shared.peers.retire_outbound(),
                _ = sweep.tick() => {
                    shared.peers.sweep(shared.limits.unused);
                    shared.end_verdicts(since_1970());
                }
            }
        }
        shared.endpoint.set_server_config(None);
        let drained = async { while connections.join_next().await.is_some() {} };
        if timeout(shared.limits.drain, drained).await.is_err() {
            tracing::info!(connections = connections.len(), "stopping in the middle of serving");
        }
        shared.peers.leave();
        shared.endpoint.close(codes::DONE, codes::LEAVING);
        connections.shutdown().await;
        // So that peers hear of it; they need not.
        let _ = timeout(FAREWELL, shared.endpoint.wait_idle()).await;
    }

    /// Meets whoever is at `address`, and keeps the connection and the address. With `expect`, nobody else will do. A
    /// peer to which there is a connection is not greeted again while our admission's verdict about it lasts.
    ///
    /// # Errors
    /// [`GreetError`].
    pub async fn greet(&self, address: SocketAddr, expect: Option<PeerId>) -> Result<Peer, GreetError> {
        let address = canonical(address);
        let known = self.0.peers.connected_at(address, since_1970());
        if let Some(peer) = known.filter(|peer| expect.is_none_or(|expected| expected == peer.id)) {
            return Ok(peer);
        }
        let (peer, connection, standing) = self.0.dial(address, expect).await?;
        self.0.peers.remember(&peer, standing).map_err(|full| GreetError::NotAdmitted {
            peer: peer.id,
            address,
            refusal: Refusal::CannotTell(full.to_string()),
        })?;
        if let Some((_, outbound)) = self.0.peers.find(peer.id) {
            outbound.keep(connection);
        }
        Ok(peer)
    }

    /// Whether anything comes back over UDP from whoever listens at `address`: a handshake that is closed at once. A
    /// connection that exists is an answer.
    ///
    /// # Errors
    /// [`quinn::ConnectError`] where no packet was sent.
    pub async fn answers(&self, address: SocketAddr) -> Result<bool, quinn::ConnectError> {
        let address = canonical(address);
        if self.0.peers.connected_at(address, since_1970()).is_some() {
            return Ok(true);
        }
        self.0.answers(address).await
    }

    /// Where a peer is that never came through this door, so that it can be fetched from: it is dialled when it is needed, and
    /// admitted then like any other. One that is known already has moved.
    pub fn know(&self, peer: &Peer) {
        if let Err(full) = self.0.peers.know(peer) {
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
    pub fn seen(&self) -> watch::Receiver<Option<IpAddr>> {
        self.0.seen.subscribe()
    }

    /// The node whose agent last proved this agent's own key.
    pub fn shared_key(&self) -> watch::Receiver<Option<NodeName>> {
        self.0.shared_key.subscribe()
    }

    /// The list of states of a blob that was fetched and proved here, so that it needs not be made again for those who ask for it.
    pub fn knows_chain(&self, chain: Arc<Chain>) {
        self.0.chains.know(chain);
    }

    /// Drops the peer's address and its connections; what is fetched from it ends as unreachable. It may come back
    /// through the door.
    pub fn forget(&self, peer: PeerId) {
        self.0.peers.forget(peer);
    }
}

/// How often unused connections are looked for.
const SWEEP: Duration = Duration::from_secs(5);

/// For the last packets: closing needs one way, and up to three timeouts when packets are lost.
const FAREWELL: Duration = Duration::from_secs(1);

impl Shared {
    /// The format of messages on a connection. [`Shared::dial`] and [`Shared::meet`] have closed those without one.
    fn format_on(&self, connection: &quinn::Connection) -> Format {
        tls::format_of(connection, self.versions).unwrap_or(self.versions.current())
    }

    /// Decides about a connection attempt before it costs anything.
    fn knock(self: &Arc<Self>, incoming: Incoming, connections: &mut JoinSet<()>, stop: &CancellationToken) {
        if self.door.is_crowded() && !incoming.remote_address_validated() {
            // It can be: the address is not validated yet.
            let _ = incoming.retry();
            return;
        }
        match self.door.enter(canonical(incoming.remote_address()).ip()) {
            Some(place) => drop(connections.spawn(self.clone().host(incoming, place, stop.clone()))),
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
fn peer_from(id: PeerId, address: SocketAddr, hello: &Hello, vouched: Option<NodeName>) -> Result<Peer, NodeNameError> {
    let node = vouched.map_or_else(|| hello.node.parse(), Ok)?;
    let mut gossip = address;
    gossip.set_port(hello.gossip_port);
    Ok(Peer { id, node, zone: None, transfer: address, gossip })
}

/// A peer's words, fit for a log line and a reason: no control characters, and no longer than a sentence.
fn printable(words: &str) -> String {
    words.chars().filter(|c| !c.is_control()).take(256).collect()
}

/// The metric's label.
fn admission_result(decided: Result<&Admitted, &Refusal>) -> &'static str {
    match decided {
        Ok(admitted) if admitted.on_grace => "on_grace",
        Ok(_) => "admitted",
        Err(Refusal::Denied(_)) => "denied",
        Err(Refusal::CannotTell(_)) => "cannot_tell",
    }
}

fn report_panic(ended: Result<(), JoinError>) {
    if let Err(error) = ended
        && error.is_panic()
    {
        tracing::error!(%error, "a connection's task failed");
    }
}
