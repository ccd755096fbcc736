//! DNS queries of the join task, counted by a fake resolver under a paused clock.

use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::membership::joiner::{DnsResolver, Joiner};
use crate::config::loopback;
use crate::identity::Identity;
use crate::mesh::{self, SharedInventory};
use crate::model::MeshStatus;
use crate::ports::{MembershipEvent, MeshSource, NoPartialBlobs};
use crate::transfer::{self, Transfer, TransferDependencies};

const BOOTSTRAP_NAME: &str = "lighterman-peers.lighterman.svc:4701";
const POD_RESOLV_CONF: &str =
    "nameserver 10.96.0.10\nsearch lighterman.svc.cluster.local svc.cluster.local cluster.local\noptions ndots:5\n";

/// An agent resolves often after its start. Ten minutes later the agent has converged.
const CONVERGED: Duration = Duration::from_secs(600);
const HOUR: Duration = Duration::from_secs(3600);

/// Resolves every name to the same addresses, and records the names.
struct CountingResolver {
    answer: Vec<SocketAddr>,
    names: Mutex<Vec<String>>,
}

#[async_trait]
impl DnsResolver for CountingResolver {
    fn resolv_conf(&self) -> String {
        POD_RESOLV_CONF.to_owned()
    }

    async fn resolve(&self, name: &str) -> Option<Vec<SocketAddr>> {
        self.names.lock().unwrap().push(name.to_owned());
        Some(self.answer.clone())
    }
}

impl CountingResolver {
    /// Removes the recorded names, and returns the number of their queries: A and AAAA for each
    /// name. A name without a final dot is also queried below each search domain.
    fn take_queries(&self) -> usize {
        let names = std::mem::take(&mut *self.names.lock().unwrap());
        let queries_of = |name: &String| {
            let host = name.split(':').next().unwrap_or_default();
            let search_domains =
                POD_RESOLV_CONF.lines().find_map(|line| line.strip_prefix("search")).unwrap_or_default();
            let below = if host.ends_with('.') { 0 } else { search_domains.split_whitespace().count() };
            2 * (below + 1)
        };
        names.iter().map(queries_of).sum()
    }
}

struct NoMesh;

#[async_trait]
impl MeshSource for NoMesh {
    async fn mesh(&self) -> Option<MeshStatus> {
        None
    }
}

/// Runs the join task, and returns the number of DNS queries in the hour after convergence. DNS
/// lists `listed` peers, and `up` of these peers are members of the mesh.
async fn queries_of_an_hour(listed: u8, up: u8) -> usize {
    let (identity, admission) = (Identity::generate(), Arc::new(StaticAdmission::new([])));
    let node: NodeName = "here".parse().unwrap();
    let (shared_inventory, metrics, folder) =
        (SharedInventory::default(), Metrics::new(), tempfile::tempdir().unwrap());
    let config = mesh::Config { listen: loopback() };
    let started =
        mesh::start(config, node.clone(), &identity, shared_inventory.clone(), admission.clone(), metrics.clone());
    // The mesh task does not run: the test itself sends the membership events.
    let (mesh, _task, _) = started.await.unwrap();
    let (admitted_in, admitted) = mpsc::channel(1);
    let dependencies = TransferDependencies {
        admission,
        store: Arc::new(MemoryStore::new()),
        partials: Arc::new(NoPartialBlobs),
        metrics: metrics.clone(),
        admitted_peers: admitted_in,
    };
    let config = transfer::Config { listen: loopback(), gossip_port: 1, node, concurrent_uploads: 1 };
    let transfer = Transfer::bind(config, &identity, dependencies).unwrap();
    // Closed ports on loopback: no packet leaves this machine, and every dial fails.
    let address = |number: u8| SocketAddr::from(([127, 0, 0, 1 + number], 9));
    let answer = (0..listed).map(address).collect();
    let resolver = Arc::new(CountingResolver { answer, names: Mutex::default() });
    let (events_in, events) = mpsc::channel(up.max(1).into());
    let inventory = PeerInventory::new(shared_inventory);
    for number in 0..up {
        let node = format!("node-{number}").parse().unwrap();
        let (transfer, gossip) = (address(number), address(number));
        let peer = Peer { id: peer(number), node, zone: None, transfer, gossip };
        inventory.apply(MeshEvent::Up(peer.clone()));
        events_in.send(MembershipEvent::Up(peer)).await.unwrap();
    }
    let joiner = Joiner {
        bootstrap_names: vec![BOOTSTRAP_NAME.to_owned()],
        resolver: resolver.clone(),
        peers_file: folder.path().join("peers.json"),
        transfer_port: transfer.local_addr().port(),
        dialer: Arc::new(transfer),
        mesh: Arc::new(mesh),
        mesh_status: Arc::new(NoMesh),
        inventory,
        metrics,
        bootstrap_addresses: watch::channel(Vec::new()).0,
        shared_key: watch::channel(None).0,
    };
    let stop = CancellationToken::new();
    let running = tokio::spawn(joiner.run(admitted, events, stop.clone()));
    tokio::time::sleep(CONVERGED).await;
    assert!(resolver.take_queries() > 0, "the agent resolves at its start");
    tokio::time::sleep(HOUR).await;
    stop.cancel();
    running.await.unwrap();
    resolver.take_queries()
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_knows_its_peers_sends_at_most_twelve_queries_an_hour() {
    let queries = queries_of_an_hour(20, 20).await;
    println!("figure dns_queries_per_agent_hour {queries} (the join task, an hour after convergence, paused clock)");
    assert!((1..=12).contains(&queries), "{queries}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_with_an_unreachable_peer_sends_at_most_twelve_queries_an_hour() {
    let queries = queries_of_an_hour(3, 2).await;
    println!("figure dns_queries_per_agent_hour_one_away {queries} (one of three listed peers is down)");
    assert!((1..=12).contains(&queries), "{queries}");
}
