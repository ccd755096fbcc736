//! Choice of containerd's TCP connections that keep a pull from ending.
//!
//! Not here: listing and closing connections ([`crate::ports::PullConnections`]).

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::time::Duration;

/// Connections closed by one round: three layers, as many as containerd fetches of an image at a
/// time by default, of five images. A stall with more connections ends in the next round.
pub const MAX_ENDED: usize = 15;

/// Silence permitted to a server that was silent before. containerd repeats a request whose
/// connection ended before the response on a new connection; from 2.3 on, containerd waits as long
/// for the head of a response.
pub const RETRY_TIMEOUT: Duration = Duration::from_secs(30);

/// Time for which a server counts as silent: two tries with containerd's default timeout.
pub const SILENT_SERVER_LIFE: Duration = Duration::from_secs(600);

/// An established TCP connection of containerd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TcpConnection {
    /// containerd's end.
    pub local: SocketAddr,
    /// The server's end.
    pub remote: SocketAddr,
    /// The kernel's number of the socket, which no later socket gets.
    pub cookie: u64,
    /// Time since either end sent data. Keep-alive probes do not count.
    pub silent_for: Duration,
    /// Bytes received that containerd has not read.
    pub unread: u32,
}

/// containerd's TCP sockets.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct TcpConnections {
    /// Established connections.
    pub established: Vec<TcpConnection>,
    /// Ports that containerd listens on.
    pub listening: BTreeSet<u16>,
}

/// The connections that a stalled pull waits for: containerd opened them, and neither end sent data
/// for `after`, or for [`RETRY_TIMEOUT`] if the same server was silent before.
///
/// - A connection on a port that containerd listens on belongs to a client of containerd, such as
///   an idle `kubectl exec`.
/// - A connection to loopback may be an idle `kubectl port-forward` to a pod in the node's network.
/// - Unread bytes mean that containerd or its disk is slow.
/// - containerd closes connections without a request after 30 s (`IdleConnTimeout` of its HTTP
///   client), so a connection that is silent for longer has a request in flight.
/// - A slow response is never silent for long and is kept, because the pull makes progress.
pub fn stalled_connections(
    connections: &TcpConnections,
    after: Duration,
    silent_before: &BTreeSet<SocketAddr>,
) -> Vec<TcpConnection> {
    let TcpConnections { established, listening } = connections;
    let is_opened = |connection: &&TcpConnection| {
        !listening.contains(&connection.local.port()) && !connection.remote.ip().to_canonical().is_loopback()
    };
    let timeout = |remote: &SocketAddr| if silent_before.contains(remote) { after.min(RETRY_TIMEOUT) } else { after };
    let is_silent =
        |connection: &&TcpConnection| connection.silent_for >= timeout(&connection.remote) && connection.unread == 0;
    let mut silent: Vec<_> = established.iter().filter(is_opened).filter(is_silent).copied().collect();
    // The longest silence first, so the bound cuts off the youngest.
    silent.sort_by_key(|connection| std::cmp::Reverse(connection.silent_for));
    silent.truncate(MAX_ENDED);
    silent
}

#[cfg(test)]
mod tests {
    use super::*;

    const AFTER: Duration = Duration::from_secs(120);

    fn connection(port: u16, silent_for: u64) -> TcpConnection {
        TcpConnection {
            local: SocketAddr::from(([10, 0, 0, 7], port)),
            remote: SocketAddr::from(([192, 0, 2, 1], 443)),
            cookie: port.into(),
            silent_for: Duration::from_secs(silent_for),
            unread: 0,
        }
    }

    fn ended(established: Vec<TcpConnection>, listening: &[u16]) -> Vec<u64> {
        let connections = TcpConnections { established, listening: listening.iter().copied().collect() };
        stalled_connections(&connections, AFTER, &BTreeSet::new()).iter().map(|connection| connection.cookie).collect()
    }

    #[test]
    fn a_silent_connection_ends_and_a_slow_one_stays() {
        assert_eq!(ended(vec![connection(1, 119), connection(2, 120), connection(3, 0)], &[]), [2]);
    }

    #[test]
    fn a_server_that_was_silent_before_has_less_time() {
        let other = TcpConnection { remote: "192.0.2.2:443".parse().unwrap(), ..connection(3, 31) };
        let established = vec![connection(1, 29), connection(2, 30), other];
        let connections = TcpConnections { established, listening: BTreeSet::new() };
        let ended = stalled_connections(&connections, AFTER, &[connection(1, 0).remote].into());
        assert_eq!(ended.iter().map(|connection| connection.cookie).collect::<Vec<_>>(), [2]);
    }

    #[test]
    fn a_connection_that_a_client_of_containerd_opened_stays() {
        assert_eq!(ended(vec![connection(40_000, 3600), connection(40_001, 3600)], &[40_000]), [40_001]);
    }

    #[test]
    fn a_connection_to_loopback_stays() {
        for remote in ["127.0.0.1:8080", "[::1]:8080", "[::ffff:127.0.0.1]:8080"] {
            let forwarded = TcpConnection { remote: remote.parse().unwrap(), ..connection(1, 3600) };
            assert!(ended(vec![forwarded], &[]).is_empty(), "{remote}");
        }
    }

    #[test]
    fn a_connection_whose_bytes_containerd_does_not_read_stays() {
        assert!(ended(vec![TcpConnection { unread: 1, ..connection(1, 3600) }], &[]).is_empty());
    }

    #[test]
    fn a_round_ends_a_bounded_number_of_connections_the_longest_silent_first() {
        let many = (1..=100).map(|port| connection(port, 120 + u64::from(port))).collect();
        let ended = ended(many, &[]);
        assert_eq!((ended.len(), ended[0], ended[14]), (MAX_ENDED, 100, 86));
    }
}
