//! The server of the admin port: which connections it accepts, and for how long.
//!
//! The kubelet probes a pod in the node's network from the node itself, so connections from the
//! node's own addresses have places that no other connection takes. A second listener for probes
//! would need a second port of the node, and would be open to the same pods. These limits bound
//! descriptors and memory. A firewall decides which networks reach the port at all.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::addresses::is_local_address;
use crate::decide::connection_limit::{ConnectionLimits, ConnectionRejection, OpenConnections, Origin};
use crate::metrics::Metrics;

/// Elsewhere: a few Prometheus servers and people with curl, and many times that. Node: at most
/// two probes at a time, and collectors of metrics in the node's network. One address has its two
/// scrapes and several shells, one IPv6 subnet half of all. A connection costs some 20 KiB.
const LIMITS: ConnectionLimits = ConnectionLimits { node: 32, elsewhere: 128, address: 16, subnet: 64 };

/// A request's head arrives within this time. Clients of the node or the cluster send it at once.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// A connection lasts at most this long. Any scrape takes well under a second.
const MAX_LIFETIME: Duration = Duration::from_secs(30);

/// Heads of probes and scrapes have some 500 bytes; this is the least that hyper takes.
const MAX_HEAD_BYTES: usize = 8 << 10;

/// Responses that are being written when the agent stops have this long.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// The pause after `accept` failed, as when the process has no descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

pub(super) struct LimitedServer {
    pub(super) listener: TcpListener,
    pub(super) router: Router,
    pub(super) metrics: Metrics,
}

/// A place among the open connections, free again when dropped.
struct ConnectionPermit {
    connections: Arc<Mutex<OpenConnections>>,
    origin: Origin,
    address: IpAddr,
}

impl LimitedServer {
    /// Serves until stopped.
    pub(super) async fn run(self, stop: CancellationToken) {
        let Self { listener, router, metrics } = self;
        let connections = Arc::new(Mutex::new(OpenConnections::new(LIMITS)));
        let mut serving = JoinSet::new();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                Some(_) = serving.join_next() => {}
                accepted = listener.accept() => match accepted {
                    Ok((stream, peer)) => match acquire_permit(&connections, &stream, peer) {
                        Ok(place) => drop(serving.spawn(serve(stream, router.clone(), place))),
                        Err(rejected) => {
                            metrics.admin_connection_rejected(rejection_label(rejected));
                            tracing::debug!(%peer, reason = %rejected, "the admin port rejects a connection");
                        }
                    },
                    Err(error) => {
                        tracing::warn!(%error, "the admin port cannot accept a connection");
                        stop.run_until_cancelled(tokio::time::sleep(ACCEPT_BACKOFF)).await;
                    }
                },
            }
        }
        drop(listener);
        let drained = async { while serving.join_next().await.is_some() {} };
        // The rest is cancelled.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
        serving.shutdown().await;
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner).remove(self.origin, self.address);
    }
}

fn acquire_permit(
    connections: &Arc<Mutex<OpenConnections>>,
    stream: &TcpStream,
    peer: SocketAddr,
) -> Result<ConnectionPermit, ConnectionRejection> {
    let address = peer.ip().to_canonical();
    // A connection that ended already has no local address, and nothing to be served.
    let is_own = stream.local_addr().is_ok_and(|local| is_of_node(address, local.ip().to_canonical()));
    let origin = if is_own { Origin::Node } else { Origin::Elsewhere };
    connections.lock().unwrap_or_else(PoisonError::into_inner).insert(origin, address)?;
    Ok(ConnectionPermit { connections: Arc::clone(connections), origin, address })
}

/// Whether the address `peer` of a connection to `local` is one of this node's. Linux answers a
/// connection to an own address from the same address, or, where `local` is the second address of
/// its network, from the first. Loopback is left to the comparison, because every address of
/// 127.0.0.0/8 can be bound.
fn is_of_node(peer: IpAddr, local: IpAddr) -> bool {
    peer == local || (!peer.is_loopback() && is_local_address(peer))
}

fn rejection_label(rejected: ConnectionRejection) -> &'static str {
    match rejected {
        ConnectionRejection::Address => "address",
        ConnectionRejection::Subnet => "subnet",
        ConnectionRejection::Origin => "all",
    }
}

/// One request. A client opens another connection for the next one, so that idle clients hold no
/// place.
async fn serve(stream: TcpStream, router: Router, _place: ConnectionPermit) {
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIMEOUT)
        .max_buf_size(MAX_HEAD_BYTES)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let ended = tokio::time::timeout(MAX_LIFETIME, served).await;
    if let Err(error) = ended.map_err(io::Error::from).and_then(|served| served.map_err(io::Error::other)) {
        tracing::debug!(%error, "a connection to the admin port ended early");
    }
}

#[cfg(test)]
mod tests;
