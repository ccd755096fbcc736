//! A firewall that blocks UDP and not TCP: sockets of this machine stand for the other nodes.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::recover_error::RecoverError;
use crate::agent::tell::Tell;
use crate::agent::udp_watch::UdpWatch;
use crate::config::loopback;
use crate::identity::Identity;
use crate::model::MeshStatus;
use crate::ports::{MeshSource, NoPartials, UdpStatus};
use crate::transfer::{self, Surroundings, Transfer};

struct NoNeighbours;

#[async_trait]
impl MeshSource for NoNeighbours {
    async fn mesh(&self) -> Option<MeshStatus> {
        Some(MeshStatus::default())
    }
}

fn transfer() -> Transfer {
    let identity = Identity::generate();
    let admission = Arc::new(StaticAdmission::new([identity.peer_id()]));
    let node = "n".parse().unwrap();
    let config = transfer::Config { listen: loopback(), gossip_port: 0, node, max_serving: 1 };
    let surroundings = Surroundings {
        admission,
        store: Arc::new(MemoryStore::new()),
        partials: Arc::new(NoPartials),
        metrics: Metrics::new(),
        joined: mpsc::channel(8).0,
    };
    Transfer::bind(config, &identity, surroundings).unwrap()
}

/// TCP is open there and UDP is not answered.
async fn half_open() -> (TcpListener, UdpSocket, SocketAddr) {
    loop {
        let tcp = TcpListener::bind(loopback()).await.unwrap();
        let address = tcp.local_addr().unwrap();
        // Another process may have the port.
        if let Ok(udp) = UdpSocket::bind(address) {
            return (tcp, udp, address);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_peers_answer_over_tcp_alone_names_udp() {
    let others = [half_open().await, half_open().await, half_open().await, half_open().await];
    let addresses = others.iter().map(|(_, _, address)| *address).collect();
    let harbour = Harbour::new();
    let (ready_in, mut ready) = watch::channel(true);
    let transfer = transfer();
    let port = transfer.local_addr().port();
    let watch = UdpWatch {
        transfer,
        status: Arc::new(NoNeighbours),
        holders: harbour.holders.clone(),
        listed: watch::channel(addresses).1,
        ready: ready_in,
        metrics: harbour.metrics.clone(),
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(watch.run(stop.clone()));
    let found = tokio::time::timeout(Duration::from_secs(60), ready.wait_for(|ready| !ready)).await;
    found.expect("within a minute").unwrap();
    assert!(harbour.counted("lighterman_udp_blocked 1"));
    let status = harbour.holders.udp().status();
    assert!(status.blocked_since.is_some_and(|since| since > 0), "{status:?}");
    assert_eq!((status.port, status.nodes), (port, 3));
    let tell = Tell::new(Arc::new(harbour.cluster.clone()), harbour.holders.clone(), harbour.metrics.clone());
    let note = tell.failed_note(&RecoverError::NoProvider { reference: IMAGE.parse().unwrap() });
    assert!(note.contains(&format!("UDP port {port} is blocked: 3 nodes answer")), "{note}");
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn a_note_does_not_name_udp_where_it_is_open() {
    let harbour = Harbour::new();
    let tell = Tell::new(Arc::new(harbour.cluster.clone()), harbour.holders.clone(), harbour.metrics.clone());
    let note = tell.failed_note(&RecoverError::NoProvider { reference: IMAGE.parse().unwrap() });
    assert!(!note.contains("UDP"), "{note}");
    assert_eq!(harbour.holders.udp().status(), UdpStatus::default());
}

#[tokio::test]
async fn a_listening_agent_answers_a_probe_and_a_silent_socket_does_not() {
    let (ours, theirs, stop) = (transfer(), transfer(), CancellationToken::new());
    let running = tokio::spawn(theirs.clone().run(stop.clone()));
    let probes = async {
        assert!(ours.answers(theirs.local_addr()).await.unwrap());
        let (_tcp, _udp, silent) = half_open().await;
        assert!(!ours.answers(silent).await.unwrap());
    };
    tokio::time::timeout(Duration::from_secs(60), probes).await.expect("the test is stuck");
    stop.cancel();
    running.await.unwrap();
}
