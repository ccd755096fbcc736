//! The binding of the transfer adapter to its UDP socket, with the options and dependencies of the
//! adapter.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{Endpoint, TokioRuntime};
use tokio::sync::{Semaphore, mpsc, watch};

use super::hash_chain_cache::HashChainCache;
use super::peers::PeerTable;
use super::rate_limiter::{PolicyReceiver, RateLimiter};
use super::rejection_log::RejectionLog;
use super::tls::{Tls, TlsError};
use super::tuning::{self, Timeouts};
use super::upload_queue::UploadQueue;
use super::{Shared, Transfer, socket};
use crate::decide::policy::Policy;
use crate::identity::Identity;
use crate::metrics::Metrics;
use crate::model::{NodeName, Peer};
use crate::ports::{Admission, Blobs, PartialBlobs};
use crate::wire::Versions;

/// Options that are fixed at start.
#[derive(Debug, Clone)]
pub struct Config {
    /// The UDP address to listen on and to dial from; `[::]` takes IPv4 too.
    pub listen: SocketAddr,
    /// The TCP port of this agent's gossip, sent to peers in `Hello`.
    pub gossip_port: u16,
    /// This node's name, sent to peers in `Hello`.
    pub node: NodeName,
    /// Uploads of pieces at a time; further requests queue. As many uploads of whole blobs run
    /// beside them, and further requests are answered with `Busy`. Each upload costs up to 512 KiB
    /// of reads and, where the link or the reader is slow, 4 MiB in flight.
    pub concurrent_uploads: usize,
}

/// The other parts of the agent that the transfer adapter uses.
pub struct TransferDependencies {
    /// Decides which peers are admitted.
    pub admission: Arc<dyn Admission>,
    /// Holds the blobs that are served.
    pub store: Arc<dyn Blobs>,
    /// Holds the blobs that are being fetched; their verified pieces are served.
    pub partials: Arc<dyn PartialBlobs>,
    /// Counts bytes and failures.
    pub metrics: Metrics,
    /// Receives each peer that dialed this agent and was admitted, before the peer gets the answer.
    /// The same peer is sent again with each of its connections.
    pub admitted_peers: mpsc::Sender<Peer>,
}

/// The transfer adapter could not start.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The socket could not be opened, configured or bound.
    #[error("cannot listen for transfers on {address} (UDP): {source}")]
    Socket {
        /// The configured address.
        address: SocketAddr,
        /// The error of the operating system.
        source: io::Error,
    },
    /// The certificate or the TLS configuration failed.
    #[error(transparent)]
    Tls(#[from] TlsError),
}

pub(super) struct TransferOptions {
    pub(super) timeouts: Timeouts,
    pub(super) policy: PolicyReceiver,
    pub(super) versions: Versions,
}

impl Transfer {
    /// Binds the socket, without rate limits. [`Transfer::run`] accepts the first connection.
    ///
    /// # Errors
    /// [`BindError`].
    ///
    /// # Panics
    /// Outside of a tokio runtime with I/O and time: the endpoint's tasks run on the calling
    /// runtime.
    pub fn bind(config: Config, identity: &Identity, dependencies: TransferDependencies) -> Result<Self, BindError> {
        let options = TransferOptions { timeouts: Timeouts::DEFAULT, policy: None, versions: Versions::TRANSFER };
        Self::bind_with_options(config, identity, dependencies, options)
    }

    /// Like [`Transfer::bind`], with the rate limits of a policy. A new policy takes effect at
    /// once. Each rate applies to all peers together and counts the bytes of blobs.
    ///
    /// # Errors
    /// [`BindError`].
    ///
    /// # Panics
    /// As [`Transfer::bind`].
    pub fn bind_with_policy(
        config: Config,
        identity: &Identity,
        dependencies: TransferDependencies,
        policy: watch::Receiver<Arc<Policy>>,
    ) -> Result<Self, BindError> {
        let options =
            TransferOptions { timeouts: Timeouts::DEFAULT, policy: Some(policy), versions: Versions::TRANSFER };
        Self::bind_with_options(config, identity, dependencies, options)
    }

    /// Like [`Transfer::bind_with_policy`], with the protocol versions of another release. Tests
    /// run two releases side by side.
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
        dependencies: TransferDependencies,
        policy: watch::Receiver<Arc<Policy>>,
        versions: Versions,
    ) -> Result<Self, BindError> {
        let options = TransferOptions { timeouts: Timeouts::DEFAULT, policy: Some(policy), versions };
        Self::bind_with_options(config, identity, dependencies, options)
    }

    pub(super) fn bind_with_options(
        config: Config,
        identity: &Identity,
        dependencies: TransferDependencies,
        options: TransferOptions,
    ) -> Result<Self, BindError> {
        let Config { listen, gossip_port, node, concurrent_uploads } = config;
        let TransferDependencies { admission, store, partials, metrics, admitted_peers } = dependencies;
        let TransferOptions { timeouts, policy, versions } = options;
        let tls = Tls::new(identity, versions)?;
        let open_endpoint = || {
            let socket = socket::bind(listen)?;
            let server = tuning::server(&tls);
            let endpoint = Endpoint::new(tuning::endpoint(), Some(server), socket, Arc::new(TokioRuntime))?;
            Ok((endpoint.local_addr()?, endpoint))
        };
        let (local_address, endpoint) =
            open_endpoint().map_err(|source| BindError::Socket { address: listen, source })?;
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
            admitted_peers,
            peers: PeerTable::default(),
            observed_address: watch::Sender::new(None),
            shared_key: watch::Sender::new(None),
            handshakes: Arc::default(),
            rejection_log: RejectionLog::default(),
            serve_permits: Semaphore::new(concurrent_uploads),
            uploads: UploadQueue::new(concurrent_uploads),
            hash_chains: HashChainCache::new(timeouts.slow_reader),
            timeouts,
            download_limiter: RateLimiter::new(policy.clone(), |budgets| budgets.max_download_rate),
            upload_limiter: RateLimiter::new(policy, |budgets| budgets.max_upload_rate),
        })))
    }
}
