//! Detection of a firewall that blocks UDP and not TCP. Sockets on loopback stand for the other
//! nodes.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use async_trait::async_trait;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::membership::udp_watch::UdpWatch;
use crate::agent::pods::pod_notifier::PodNotifier;
use crate::agent::recovery::recover_error::RecoverError;
use crate::config::loopback;
use crate::control::UdpStatus;
use crate::identity::Identity;
use crate::model::MeshStatus;
use crate::ports::{MeshSource, NoPartialBlobs, Prober};
use crate::transfer::{self, Transfer, TransferDependencies};

struct EmptyMesh;

#[async_trait]
impl MeshSource for EmptyMesh {
    async fn mesh(&self) -> Option<MeshStatus> {
        Some(MeshStatus::default())
    }
}

fn transfer() -> Transfer {
    let identity = Identity::generate();
    let admission = Arc::new(StaticAdmission::new([identity.peer_id()]));
    let node = "n".parse().unwrap();
    let config = transfer::Config { listen: loopback(), gossip_port: 0, node, concurrent_uploads: 1 };
    let dependencies = TransferDependencies {
        admission,
        store: Arc::new(MemoryStore::new()),
        partials: Arc::new(NoPartialBlobs),
        metrics: Metrics::new(),
        admitted_peers: mpsc::channel(8).0,
    };
    Transfer::bind(config, &identity, dependencies).unwrap()
}

/// Binds a TCP and a UDP socket to one port. TCP connections open, and UDP gets no answer.
async fn tcp_only_socket() -> (TcpListener, UdpSocket, SocketAddr) {
    loop {
        let tcp = TcpListener::bind(loopback()).await.unwrap();
        let address = tcp.local_addr().unwrap();
        // Another process may use the UDP port.
        if let Ok(udp) = UdpSocket::bind(address) {
            return (tcp, udp, address);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn an_agent_whose_peers_answer_over_tcp_alone_names_udp() {
    let others = [tcp_only_socket().await, tcp_only_socket().await, tcp_only_socket().await, tcp_only_socket().await];
    let addresses = others.iter().map(|(_, _, address)| *address).collect();
    let test_node = TestNode::new();
    let (ready_in, mut ready) = watch::channel(true);
    let transfer = transfer();
    let port = transfer.local_addr().port();
    let watch = UdpWatch {
        prober: Arc::new(transfer),
        transfer_port: port,
        mesh_status: Arc::new(EmptyMesh),
        inventory: test_node.inventory.clone(),
        bootstrap_addresses: watch::channel(addresses).1,
        ready: ready_in,
        metrics: test_node.metrics.clone(),
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(watch.run(stop.clone()));
    let found = tokio::time::timeout(Duration::from_secs(60), ready.wait_for(|ready| !ready)).await;
    found.expect("within a minute").unwrap();
    assert!(test_node.has_metric("lighterman_udp_blocked 1"));
    let status = test_node.inventory.udp().status();
    assert!(status.blocked_since.is_some_and(|since| since > 0), "{status:?}");
    assert_eq!((status.port, status.nodes), (port, 3));
    let notifier =
        PodNotifier::new(Arc::new(test_node.cluster.clone()), test_node.inventory.clone(), test_node.metrics.clone());
    let note = notifier.failed_note(&RecoverError::NoProvider { reference: IMAGE.parse().unwrap() });
    assert!(note.contains(&format!("UDP port {port} is blocked: 3 nodes answer")), "{note}");
    stop.cancel();
    running.await.unwrap();
}

#[tokio::test]
async fn the_note_does_not_name_udp_if_udp_is_open() {
    let test_node = TestNode::new();
    let notifier =
        PodNotifier::new(Arc::new(test_node.cluster.clone()), test_node.inventory.clone(), test_node.metrics.clone());
    let note = notifier.failed_note(&RecoverError::NoProvider { reference: IMAGE.parse().unwrap() });
    assert!(!note.contains("UDP"), "{note}");
    assert_eq!(test_node.inventory.udp().status(), UdpStatus::default());
}

#[tokio::test]
async fn a_listening_agent_answers_a_probe_and_a_silent_socket_does_not() {
    let (ours, theirs, stop) = (transfer(), transfer(), CancellationToken::new());
    let running = tokio::spawn(theirs.clone().run(stop.clone()));
    let probes = async {
        assert!(ours.answers_udp(theirs.local_addr()).await.unwrap());
        let (_tcp, _udp, silent) = tcp_only_socket().await;
        assert!(!ours.answers_udp(silent).await.unwrap());
    };
    tokio::time::timeout(Duration::from_secs(60), probes).await.expect("the test is stuck");
    stop.cancel();
    running.await.unwrap();
}
