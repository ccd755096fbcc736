//! The server of the admin port, with limits on connections and their duration.
//!
//! The kubelet probes a pod in the node's network from the node itself, so connections from the
//! node's own addresses have permits that no other connection uses. A second listener for probes
//! would need a second port of the node, and would be open to the same pods. These limits bound
//! descriptors and memory. A firewall decides which networks can reach the port.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::addresses::is_local_address;
use crate::decide::connection_limit::{ConnectionLimits, ConnectionRejection, OpenConnections, Origin};
use crate::metrics::Metrics;

/// Elsewhere: many times the connections of a few Prometheus servers and of operators with curl.
/// Node: at most two probes at a time, and metrics collectors in the node's network. One address:
/// two scrapes and several shells. One IPv6 subnet: half of all. A connection costs some 20 KiB.
const LIMITS: ConnectionLimits = ConnectionLimits { node: 32, elsewhere: 128, address: 16, subnet: 64 };

/// Deadline for a request's head. Clients in the node or the cluster send the head at once.
const HEAD_TIMEOUT: Duration = Duration::from_secs(5);

/// Longest life of a connection. Any scrape takes well under a second.
const MAX_LIFETIME: Duration = Duration::from_secs(30);

/// Bytes of a request's head at most. Probes and scrapes have some 500; hyper accepts no lower
/// limit than this.
const MAX_HEAD_BYTES: usize = 8 << 10;

/// Time for responses that are being written when the agent stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// Pause after `accept` failed, for example when the process has no descriptors left.
const ACCEPT_BACKOFF: Duration = Duration::from_secs(1);

pub(super) struct LimitedServer {
    pub(super) listener: TcpListener,
    pub(super) router: Router,
    pub(super) metrics: Metrics,
}

/// A permit among the open connections, released on drop.
struct ConnectionPermit {
    connections: Arc<Mutex<OpenConnections>>,
    origin: Origin,
    address: IpAddr,
}

impl LimitedServer {
    /// Serves until `stop`.
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
                        Ok(permit) => drop(serving.spawn(serve(stream, router.clone(), permit))),
                        Err(rejection) => {
                            metrics.admin_connection_rejected(rejection_label(rejection));
                            tracing::debug!(%peer, reason = %rejection, "the admin port rejects a connection");
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
        // Connections that are still open are cancelled.
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, drained).await;
        serving.shutdown().await;
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        self.connections.lock().remove(self.origin, self.address);
    }
}

fn acquire_permit(
    connections: &Arc<Mutex<OpenConnections>>,
    stream: &TcpStream,
    peer: SocketAddr,
) -> Result<ConnectionPermit, ConnectionRejection> {
    let address = peer.ip().to_canonical();
    // A connection that has already ended has no local address and needs no response.
    let is_own = stream.local_addr().is_ok_and(|local| is_of_node(address, local.ip().to_canonical()));
    let origin = if is_own { Origin::Node } else { Origin::Elsewhere };
    connections.lock().insert(origin, address)?;
    Ok(ConnectionPermit { connections: Arc::clone(connections), origin, address })
}

/// Whether `peer`, the client's address of a connection to `local`, is an address of this node.
/// Linux connects to an own address from the same address, or, where `local` is the second address
/// of its network, from the first. Loopback addresses are only compared, because a socket can bind
/// to every address of 127.0.0.0/8.
fn is_of_node(peer: IpAddr, local: IpAddr) -> bool {
    peer == local || (!peer.is_loopback() && is_local_address(peer))
}

fn rejection_label(rejection: ConnectionRejection) -> &'static str {
    match rejection {
        ConnectionRejection::Address => "address",
        ConnectionRejection::Subnet => "subnet",
        ConnectionRejection::Origin => "all",
    }
}

/// Serves one request. A client opens another connection for the next request, so idle clients
/// occupy no permit.
async fn serve(stream: TcpStream, router: Router, _permit: ConnectionPermit) {
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
