//! The admin port over real TCP, with the default limits. Connections from 127.0.0.1 to 127.0.0.1
//! are the node's own; other loopback addresses stand for pods.

use std::sync::Arc;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpSocket;
use tokio::task::JoinHandle;

use super::*;
use crate::addresses::has_ipv6;
use crate::admin::AdminServer;
use crate::model::MeshStatus;
use crate::ports::MeshSource;

struct NoMesh;

#[async_trait]
impl MeshSource for NoMesh {
    async fn mesh(&self) -> Option<MeshStatus> {
        None
    }
}

struct TestAdminServer {
    address: SocketAddr,
    metrics: Metrics,
    stop: CancellationToken,
    running: JoinHandle<()>,
}

impl TestAdminServer {
    async fn open() -> Self {
        let metrics = Metrics::new();
        let listen = SocketAddr::from(([127, 0, 0, 1], 0));
        let admin = AdminServer::bind(listen, metrics.clone(), Vec::new(), Arc::new(NoMesh)).await.unwrap();
        let (address, stop) = (admin.local_addr().unwrap(), CancellationToken::new());
        let running = tokio::spawn(admin.run(stop.clone()));
        Self { address, metrics, stop, running }
    }

    async fn connect(&self, last: u8) -> TcpStream {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind(SocketAddr::from(([127, 0, 0, last], 0))).unwrap();
        socket.connect(self.address).await.unwrap()
    }

    /// The complete response to a request from 127.0.0.`last`; empty when the connection is
    /// rejected.
    async fn get(&self, last: u8, path: &str) -> String {
        let mut stream = self.connect(last).await;
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\n\r\n");
        let mut response = String::new();
        if stream.write_all(request.as_bytes()).await.is_ok() {
            // A rejected connection ends by a reset.
            let _ = stream.read_to_string(&mut response).await;
        }
        response
    }

    fn rejected(&self, reason: &str) -> u64 {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        let line = format!("lighterman_admin_connections_rejected_total{{reason=\"{reason}\"}} ");
        text.lines().find_map(|have| have.strip_prefix(&line)).map_or(0, |count| count.parse().unwrap())
    }

    async fn close(self) {
        self.stop.cancel();
        self.running.await.unwrap();
    }
}

/// The limit is shorter than the life of a connection, so no permit is released by the end of that
/// life.
async fn with_deadline<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(20), test).await.expect("the test is stuck")
}

#[tokio::test]
async fn three_hundred_idle_connections_of_a_pod_do_not_delay_a_probe_of_the_node() {
    let port = TestAdminServer::open().await;
    with_deadline(async {
        let mut idle = Vec::new();
        for _ in 0..300 {
            idle.push(port.connect(2).await);
        }
        assert!(port.get(1, "/healthz").await.ends_with("ok\n"));
        assert!(port.get(3, "/metrics").await.starts_with("HTTP/1.1 200"), "other pods have permits as well");
        assert_eq!(port.rejected("address"), 300 - LIMITS.address as u64);
    })
    .await;
    port.close().await;
}

#[tokio::test]
async fn idle_connections_of_many_pods_do_not_delay_a_probe_of_the_node() {
    let port = TestAdminServer::open().await;
    with_deadline(async {
        let mut idle = Vec::new();
        for last in 2..=33 {
            for _ in 0..10 {
                idle.push(port.connect(last).await);
            }
        }
        assert!(port.get(1, "/healthz").await.ends_with("ok\n"));
        assert_eq!(port.rejected("all"), 320 - LIMITS.elsewhere as u64);
    })
    .await;
    port.close().await;
}

#[tokio::test]
async fn a_closed_connection_makes_room_for_another_of_its_address() {
    let port = TestAdminServer::open().await;
    with_deadline(async {
        let mut idle = Vec::new();
        for _ in 0..LIMITS.address {
            idle.push(port.connect(2).await);
        }
        assert_eq!(port.get(2, "/healthz").await, "");
        idle.clear();
        while !port.get(2, "/healthz").await.ends_with("ok\n") {}
    })
    .await;
    port.close().await;
}

/// Under a paused clock, time passes only when no task can proceed.
#[tokio::test(start_paused = true)]
async fn a_head_that_arrives_byte_by_byte_ends_its_connection() {
    let port = TestAdminServer::open().await;
    let mut stream = port.connect(2).await;
    let mut seconds = 0;
    let head = std::iter::once(&b"GET / HTTP/1.1\r\nx: "[..]).chain(std::iter::repeat(&b"x"[..]));
    for byte in head {
        if stream.write_all(byte).await.is_err() {
            break;
        }
        tokio::time::sleep(Duration::from_secs(1)).await;
        seconds += 1;
        assert!(seconds < MAX_LIFETIME.as_secs() / 2, "the connection goes on");
    }
    assert!(seconds >= HEAD_TIMEOUT.as_secs());
    port.close().await;
}

#[tokio::test(start_paused = true)]
async fn an_idle_connection_of_the_node_ends_as_well() {
    let port = TestAdminServer::open().await;
    let mut stream = port.connect(1).await;
    let end = tokio::time::timeout(MAX_LIFETIME / 2, stream.read(&mut [0])).await;
    assert!(matches!(end.expect("the connection ends"), Ok(0) | Err(_)));
    port.close().await;
}

#[tokio::test]
async fn the_unspecified_ipv6_address_accepts_ipv4_too() {
    let listener = crate::admin::listener("[::]:0".parse().unwrap()).unwrap();
    let port = listener.local_addr().unwrap().port();
    let families = [IpAddr::from([127, 0, 0, 1]), std::net::Ipv6Addr::LOCALHOST.into()];
    for address in families.into_iter().take(1 + usize::from(has_ipv6())) {
        // The first error ends both waits: without the other family, `accept` never returns.
        let (connected, (_, peer)) = tokio::try_join!(TcpStream::connect((address, port)), listener.accept()).unwrap();
        assert_eq!(peer.ip().to_canonical(), connected.local_addr().unwrap().ip());
    }
}

#[test]
fn a_connection_from_another_address_is_not_of_the_node() {
    let [node, second, pod] = [[127, 0, 0, 1], [127, 0, 0, 2], [203, 0, 113, 1]].map(IpAddr::from);
    assert!(is_of_node(node, node));
    assert!(!is_of_node(second, node), "loopback addresses are compared alone");
    assert!(!is_of_node(pod, node));
}
