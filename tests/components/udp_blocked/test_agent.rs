//! A whole agent with a store in memory, in a thread and a network namespace of its own.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc as threads;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use lighterman::admission::StaticAdmission;
use lighterman::agent::peers::inventory_view::PeerInventory;
use lighterman::agent::supervisor::Supervisor;
use lighterman::agent::{Agent, AgentPorts};
use lighterman::config::Settings;
use lighterman::control::Client;
use lighterman::control::PullProgress;
use lighterman::decide::fill::FetchFrom;
use lighterman::decide::policy::{Policy, RecoveryOptions, ResolveOptions};
use lighterman::decide::retain::{RetainBytes, RetainLayers, RetainOptions};
use lighterman::identity::Identity;
use lighterman::metrics::Metrics;
use lighterman::model::PeerId;
use lighterman::oci::{Digest, Reference};
use lighterman::ports::ImportPermission;
use lighterman::testing::{MemoryCluster, MemoryRegistry, MemoryStore};
use lighterman::{mesh, transfer};
use tokio::runtime::Builder;
use tokio::sync::{mpsc, oneshot, watch};

use crate::links::pair::{ADDRESSES, VethLink};

const PORT: u16 = 4701;

/// The keys and the cluster that both agents share.
pub(super) struct SharedCluster {
    folder: tempfile::TempDir,
    identities: [Identity; 2],
    cluster: MemoryCluster,
}

impl SharedCluster {
    pub(super) fn new() -> Self {
        let (folder, identities) = (tempfile::tempdir().unwrap(), [Identity::generate(), Identity::generate()]);
        Self { folder, identities, cluster: MemoryCluster::default() }
    }
}

pub(super) struct TestAgent {
    pub(super) name: String,
    pub(super) peer: PeerId,
    pub(super) store: Arc<MemoryStore>,
    inventory: PeerInventory,
    metrics: Metrics,
    socket: PathBuf,
    shutdown: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl TestAgent {
    /// Starts the agent at one end of the link.
    pub(super) fn start(link: &Arc<VethLink>, shared_cluster: &SharedCluster, end: usize) -> Self {
        let (name, store, metrics) = (format!("node-{end}"), Arc::new(MemoryStore::new()), Metrics::new());
        let folder = shared_cluster.folder.path().join(&name);
        std::fs::create_dir(&folder).unwrap();
        let settings = settings(&name, &folder, end);
        let ports = agent_ports(shared_cluster, &name, &store);
        let (identity, socket) = (shared_cluster.identities[end].clone(), settings.control_socket.clone());
        let peer = identity.peer_id();
        let ((inventory_sender, inventory_receiver), (shutdown, stopping)) =
            (threads::channel(), oneshot::channel::<()>());
        let (link, agent_metrics, node) = (Arc::clone(link), metrics.clone(), name.clone());
        let thread = thread::spawn(move || {
            link.enter(end);
            let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
            runtime.block_on(async {
                let listen = listen(end);
                let transfer =
                    transfer::Config { listen, gossip_port: 0, node: node.parse().unwrap(), concurrent_uploads: 16 };
                let mesh = mesh::Config { listen };
                let (pods_in, pods) = mpsc::channel(1);
                let ports = AgentPorts { pods, ..ports };
                let supervisor = Supervisor::default();
                let agent = Agent::start(settings, transfer, mesh, identity, ports, agent_metrics, supervisor).await;
                let Agent { supervisor, inventory, .. } = agent.unwrap();
                inventory_sender.send(inventory).unwrap();
                supervisor.run(async { drop(stopping.await) }, Duration::from_secs(10)).await.unwrap();
                drop(pods_in);
            });
        });
        let inventory = inventory_receiver.recv().unwrap();
        Self { name, peer, store, inventory, metrics, socket, shutdown: Some(shutdown), thread: Some(thread) }
    }

    /// Waits until the other agent is a peer.
    pub(super) async fn wait_connected(&self, peer: PeerId) {
        self.wait_until(|inventory| inventory.peers().iter().any(|known| known.id == peer)).await;
    }

    /// Waits until the other agent is a provider of the blob.
    pub(super) async fn wait_provider(&self, blob: Digest, peer: PeerId) {
        self.wait_until(|inventory| inventory.blob_providers(blob).contains(&peer)).await;
    }

    /// Waits until the other agent is no peer any more.
    pub(super) async fn wait_disconnected(&self, peer: PeerId) {
        self.wait_until(|inventory| inventory.peers().iter().all(|known| known.id != peer)).await;
    }

    async fn wait_until(&self, condition: impl Fn(&PeerInventory) -> bool) {
        let mut changes = self.inventory.changes();
        changes.wait_for(|_| condition(&self.inventory)).await.unwrap();
    }

    /// No channel reports the state, so the test polls.
    pub(super) async fn wait_udp_blocked(&self, is_blocked: bool) {
        while self.inventory.udp().is_blocked() != is_blocked {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Pulls an image by hand once a provider is listed, and returns the last progress message.
    pub(super) async fn pull(&self, image: &str) -> PullProgress {
        let reference: Reference = image.parse().unwrap();
        let Reference::Tag(repository, tag) = &reference else { panic!("{image} has a tag") };
        self.wait_until(|inventory| !inventory.tag_digests(repository, tag).is_empty()).await;
        let mut pulling = Client::new(&self.socket).pull(&reference, false).await.unwrap();
        loop {
            let last = pulling.next().await.unwrap();
            if matches!(last, PullProgress::Done { .. } | PullProgress::Failed { .. }) {
                return last;
            }
        }
    }

    /// A metric without labels; 0 where the metric is absent.
    pub(super) fn metric(&self, metric: &str) -> u64 {
        let text = String::from_utf8(self.metrics.render()).unwrap();
        text.lines().find_map(|line| line.strip_prefix(metric)?.trim().parse().ok()).unwrap_or_default()
    }
}

impl Drop for TestAgent {
    fn drop(&mut self) {
        drop(self.shutdown.take());
        // A panic was printed already.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

fn listen(end: usize) -> std::net::SocketAddr {
    (ADDRESSES[end].parse::<std::net::IpAddr>().unwrap(), PORT).into()
}

fn agent_ports(shared_cluster: &SharedCluster, name: &str, store: &Arc<MemoryStore>) -> AgentPorts {
    AgentPorts {
        store: store.clone(),
        unpacker: None,
        layer_leases: None,
        cluster: Arc::new(shared_cluster.cluster.clone()),
        claims: Arc::new(shared_cluster.cluster.claims_of(name.parse().unwrap())),
        admission: Arc::new(StaticAdmission::new(shared_cluster.identities.iter().map(Identity::peer_id))),
        registry: Arc::new(MemoryRegistry::default()),
        pull_connections: None,
        own_image: None,
        notifier: None,
        imports: watch::channel(ImportPermission::Allowed).1,
        containerd: None,
        pods: mpsc::channel(1).1,
        readiness_checks: Vec::new(),
    }
}

fn settings(name: &str, folder: &Path, end: usize) -> Settings {
    Settings {
        node: name.parse().unwrap(),
        admin_listen: (ADDRESSES[end].parse::<std::net::IpAddr>().unwrap(), 0).into(),
        join_addresses: vec![listen(1 - end).to_string()],
        advertise: None,
        zone: None,
        key_file: folder.join("unused"),
        peers_file: folder.join("peers.json"),
        policy: Policy::default(),
        policy_file: None,
        control_socket: folder.join("agent.sock"),
        resolve: ResolveOptions::default(),
        options: RecoveryOptions::default(),
        probe_registries: false,
        image_verifier_dir: folder.join("unused"),
        import_past_verifiers: false,
        unpack_layers: false,
        own_image: false,
        retain: RetainOptions {
            layers: RetainLayers::None,
            bytes: RetainBytes::Percent(0),
            fetch: FetchFrom::None,
            fetch_rate: 0,
        },
        grace: Duration::from_secs(10),
    }
}
