//! One node of the demo: an agent with its own content store on disk.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::DemoError;
use crate::admission::StaticAdmission;
use crate::agent::peers::inventory_view::PeerInventory;
use crate::agent::recovery::progress::RecoveryTracker;
use crate::agent::supervisor::{Supervisor, TaskEnded};
use crate::agent::{Agent, AgentPorts};
use crate::config::{Settings, loopback};
use crate::decide::fill::FetchFrom;
use crate::decide::policy::{Policy, RecoveryOptions, ResolveOptions};
use crate::decide::retain::{RetainBytes, RetainLayers, RetainOptions};
use crate::identity::Identity;
use crate::layout::LayoutStore;
use crate::metrics::Metrics;
use crate::model::{PeerId, PodEvent};
use crate::oci::{Digest, Reference};
use crate::ports::ImportPermission;
use crate::simulated::{MemoryCluster, MemoryRegistry};
use crate::{mesh, transfer};

const GRACE: Duration = Duration::from_secs(5);

pub(super) struct DemoNode {
    pub(super) name: String,
    pub(super) peer: PeerId,
    pub(super) store: Arc<LayoutStore>,
    pub(super) tracker: RecoveryTracker,
    pub(super) transfer: SocketAddr,
    pub(super) admin: SocketAddr,
    inventory: PeerInventory,
    pods: Option<mpsc::Sender<PodEvent>>,
    shutdown: oneshot::Sender<()>,
    running: JoinHandle<Result<(), TaskEnded>>,
}

impl DemoNode {
    pub(super) async fn start(
        name: &str,
        folder: &Path,
        identity: Identity,
        admitted: &[PeerId],
        join_addresses: Vec<String>,
        cluster: &MemoryCluster,
    ) -> Result<Self, DemoError> {
        let node = name.parse()?;
        let peer = identity.peer_id();
        let store = Arc::new(LayoutStore::open(folder)?);
        let (pod_sender, pods) = mpsc::channel(8);
        let ports = AgentPorts {
            store: Arc::clone(&store) as _,
            // The store is a plain folder without a snapshotter.
            unpacker: None,
            layer_leases: None,
            own_image: None,
            cluster: Arc::new(cluster.clone()),
            claims: Arc::new(cluster.claims_of(name.parse()?)),
            admission: Arc::new(StaticAdmission::new(admitted.iter().copied())),
            registry: Arc::new(MemoryRegistry::default()),
            pull_connections: None,
            notifier: None,
            imports: watch::channel(ImportPermission::Allowed).1,
            containerd: None,
            pods,
            readiness_checks: Vec::new(),
        };
        let mut policy = Policy::default();
        policy.budgets.min_free_bytes = 0;
        policy.budgets.image_gc_percent = 100;
        policy.budgets.eviction_percent = 0;
        let settings = Settings {
            node,
            admin_listen: loopback(),
            join_addresses,
            advertise: None,
            zone: None,
            key_file: folder.join("unused"),
            peers_file: folder.join("peers.json"),
            policy,
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
            grace: GRACE,
        };
        let transfer =
            transfer::Config { listen: loopback(), gossip_port: 0, node: name.parse()?, concurrent_uploads: 16 };
        let mesh = mesh::Config { listen: loopback() };
        let agent =
            Agent::start(settings, transfer, mesh, identity, ports, Metrics::new(), Supervisor::default()).await?;
        let Agent { supervisor, inventory, tracker, transfer, admin } = agent;
        let (shutdown, stopping) = oneshot::channel();
        let running = tokio::spawn(supervisor.run(async { drop(stopping.await) }, GRACE));
        Ok(Self {
            name: name.into(),
            peer,
            store,
            tracker,
            transfer,
            admin,
            inventory,
            pods: Some(pod_sender),
            shutdown,
            running,
        })
    }

    /// The sending end of this node's pod watch, for the node's one kubelet.
    pub(super) fn take_pods(&mut self) -> Option<mpsc::Sender<PodEvent>> {
        self.pods.take()
    }

    /// Waits for `peers` connected peers.
    pub(super) async fn wait_for_peers(&self, peers: usize) -> Result<(), DemoError> {
        self.wait_until(|inventory| inventory.peers().len() >= peers).await
    }

    /// Waits until a peer announces the image.
    pub(super) async fn wait_for_provider(&self, reference: &Reference, digest: Digest) -> Result<(), DemoError> {
        self.wait_until(|inventory| !inventory.image_providers(reference.repository(), digest).is_empty()).await
    }

    async fn wait_until(&self, condition: impl Fn(&PeerInventory) -> bool) -> Result<(), DemoError> {
        let mut changes = self.inventory.changes();
        while !condition(&self.inventory) {
            changes.changed().await?;
        }
        Ok(())
    }

    /// Stops the agent and waits for its end.
    pub(super) async fn stop(self) -> Result<(), DemoError> {
        // The receiver is gone if a task of the agent ended; then the join returns the error.
        let _ = self.shutdown.send(());
        Ok(self.running.await??)
    }
}
