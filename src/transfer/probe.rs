//! Probes of one address over UDP and over TCP. A firewall may block one of the two.

use std::net::SocketAddr;
use std::time::Duration;

use async_trait::async_trait;
use quinn::ConnectionError;
use tokio::net::TcpStream;
use tokio::time::timeout;

use super::close_codes::{DONE, close};
use super::{Transfer, canonical};
use crate::ports::{ProbeError, Prober};
use crate::util::clock::unix_time;

/// A TCP connection to a node of the same cluster is open within milliseconds.
const TCP_TIMEOUT: Duration = Duration::from_secs(2);

#[async_trait]
impl Prober for Transfer {
    /// Starts a handshake and closes the connection at once.
    async fn answers_udp(&self, address: SocketAddr) -> Result<bool, ProbeError> {
        let (shared, address) = (&self.0, canonical(address));
        if shared.peers.connected_at(address, unix_time()).is_some() {
            return Ok(true);
        }
        let dialed = shared.endpoint.connect_with(shared.client.clone(), address, "lighterman");
        let connecting = dialed.map_err(|error| ProbeError(error.to_string()))?;
        Ok(match timeout(shared.timeouts.dial, connecting).await {
            Ok(Ok(connection)) => {
                close(&connection, DONE, b"probe");
                true
            }
            // A refusal, or an answer in another protocol.
            Ok(Err(error)) => error != ConnectionError::TimedOut,
            Err(_) => false,
        })
    }

    /// The other node sees a handshake that never begins.
    async fn accepts_tcp(&self, address: SocketAddr) -> bool {
        timeout(TCP_TIMEOUT, TcpStream::connect(address)).await.is_ok_and(|connected| connected.is_ok())
    }
}
