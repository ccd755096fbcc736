//! Whole agents on loopback, with real gossip and real handshakes: joining, the status of the mesh,
//! and renewed credentials.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;

use super::*;
use crate::admission::StaticAdmission;
use crate::agent::supervisor::{Supervisor, TaskEnded};
use crate::agent::{Agent, AgentPorts};
use crate::config::{Settings, loopback};
use crate::decide::fill::FetchFrom;
use crate::decide::policy::RecoveryOptions;
use crate::decide::retain::{RetainBytes, RetainLayers, RetainOptions};
use crate::identity::Identity;
use crate::model::{Credential, MeshStatus, PodEvent};
use crate::ports::{Admission, AdmittedPeer, Rejection};
use crate::{control, mesh, transfer};

const GRACE: Duration = Duration::from_secs(10);

/// Fails after 120 s, far more than any test here needs.
async fn within<T>(test: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(120), test).await.expect("the test is stuck")
}

struct RunningAgent {
    inventory: PeerInventory,
    transfer: SocketAddr,
    admin: SocketAddr,
    socket: PathBuf,
    _pods: mpsc::Sender<PodEvent>,
    shutdown: oneshot::Sender<()>,
    running: JoinHandle<Result<(), TaskEnded>>,
}

/// Agents that admit each other.
struct Fleet {
    folder: tempfile::TempDir,
    identities: Vec<Identity>,
    cluster: MemoryCluster,
}

impl Fleet {
    fn of(agents: usize) -> Self {
        let cluster = MemoryCluster::default();
        cluster.put_zone("eu-1a".parse().unwrap());
        let identities = (0..agents).map(|_| Identity::generate()).collect();
        Self { folder: tempfile::tempdir().unwrap(), identities, cluster }
    }

    fn folder(&self, number: usize) -> PathBuf {
        self.folder.path().join(number.to_string())
    }

    fn admission(&self) -> StaticAdmission {
        StaticAdmission::new(self.identities.iter().map(Identity::peer_id))
    }

    async fn start(&self, number: usize, bootstrap_addresses: &[SocketAddr]) -> RunningAgent {
        self.start_with(number, bootstrap_addresses, Arc::new(self.admission())).await
    }

    async fn start_with(
        &self,
        number: usize,
        bootstrap_addresses: &[SocketAddr],
        admission: Arc<dyn Admission>,
    ) -> RunningAgent {
        let (folder, name) = (self.folder(number), format!("node-{number}"));
        std::fs::create_dir_all(&folder).unwrap();
        let node: NodeName = name.parse().unwrap();
        let (pods_in, pods) = mpsc::channel(8);
        let ports = AgentPorts {
            store: Arc::new(MemoryStore::new()),
            unpacker: None,
            layer_leases: None,
            own_image: None,
            cluster: Arc::new(self.cluster.clone()),
            claims: Arc::new(self.cluster.claims_of(node.clone())),
            admission,
            registry: Arc::new(MemoryRegistry::default()),
            pull_connections: None,
            notifier: None,
            imports: watch::channel(ImportPermission::Allowed).1,
            containerd: None,
            pods,
            readiness_checks: Vec::new(),
        };
        let settings = settings(node.clone(), &folder, bootstrap_addresses);
        let transfer = transfer::Config { listen: loopback(), gossip_port: 0, node, concurrent_uploads: 4 };
        let mesh = mesh::Config { listen: loopback() };
        let (identity, metrics) = (self.identities[number].clone(), Metrics::new());
        let socket = settings.control_socket.clone();
        let agent = Agent::start(settings, transfer, mesh, identity, ports, metrics, Supervisor::default()).await;
        let Agent { supervisor, inventory, tracker: _, transfer, admin } = agent.unwrap();
        let (shutdown, stopping) = oneshot::channel();
        let running = tokio::spawn(supervisor.run(async { drop(stopping.await) }, GRACE));
        RunningAgent { inventory, transfer, admin, socket, _pods: pods_in, shutdown, running }
    }
}

fn settings(node: NodeName, folder: &Path, bootstrap_addresses: &[SocketAddr]) -> Settings {
    Settings {
        node,
        admin_listen: loopback(),
        join_addresses: bootstrap_addresses.iter().map(ToString::to_string).collect(),
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
        grace: GRACE,
    }
}

impl RunningAgent {
    async fn wait_for_peers(&self, peers: usize) {
        let mut changes = self.inventory.changes();
        while self.inventory.peers().len() != peers {
            changes.changed().await.unwrap();
        }
    }

    async fn stop(self) {
        self.shutdown.send(()).unwrap();
        self.running.await.unwrap().unwrap();
    }

    /// The response of the admin port, header included.
    async fn get(&self, path: &str) -> String {
        let mut stream = TcpStream::connect(self.admin).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }
}

#[tokio::test]
async fn agents_rejoin_from_the_peers_file_without_dns() {
    within(async {
        let fleet = Fleet::of(3);
        let first = fleet.start(0, &[]).await;
        let second = fleet.start(1, &[first.transfer]).await;
        let third = fleet.start(2, &[first.transfer]).await;
        for agent in [&first, &second, &third] {
            agent.wait_for_peers(2).await;
        }
        third.stop().await;
        first.wait_for_peers(1).await;
        // No peer can dial the restarted agent, because the agent listens on a new port.
        let third = fleet.start(2, &[]).await;
        third.wait_for_peers(2).await;
        first.wait_for_peers(2).await;
        for agent in [third, second, first] {
            agent.stop().await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_mesh_shows_on_the_control_socket_and_on_the_admin_port() {
    within(async {
        let fleet = Fleet::of(2);
        let first = fleet.start(0, &[]).await;
        let second = fleet.start(1, &[first.transfer]).await;
        first.wait_for_peers(1).await;
        let status = control::Client::new(&first.socket).status().await.unwrap().mesh.expect("the mesh answers");
        assert_eq!((status.node.as_str(), status.alive, status.zone.as_deref()), ("node-0", 1, Some("eu-1a")));
        let [other] = &status.members[..] else { panic!("{status:?}") };
        assert_eq!((other.node.as_str(), other.zone.as_deref()), ("node-1", Some("eu-1a")));
        assert_eq!((&other.address, &*other.release), (&second.transfer.to_string(), env!("CARGO_PKG_VERSION")));

        let json = first.get("/debug/mesh").await;
        let (header, body) = json.split_once("\r\n\r\n").unwrap();
        assert!(header.starts_with("HTTP/1.1 200") && header.contains("application/json"), "{header}");
        let shown: MeshStatus = serde_json::from_str(body).unwrap();
        assert_eq!((shown.peer_id, shown.members.len()), (status.peer_id, 1));
        let table = first.get("/debug/mesh?format=table").await;
        assert!(table.contains("\n1 alive, ") && table.contains("\nnode-1  eu-1a  "), "{table}");
        assert!(first.get("/debug/mesh?format=xml").await.starts_with("HTTP/1.1 400"));
        for agent in [second, first] {
            agent.stop().await;
        }
    })
    .await;
}

/// Has a new credential after each renewal, and records the credential that gossip relayed last.
struct RenewingAdmission {
    listed: StaticAdmission,
    renewals: watch::Sender<u64>,
    introduced: watch::Sender<Credential>,
}

impl RenewingAdmission {
    fn new(listed: StaticAdmission) -> Arc<Self> {
        Arc::new(Self { listed, renewals: watch::Sender::default(), introduced: watch::Sender::default() })
    }

    fn credential_after(renewals: u64) -> Credential {
        Credential::new(format!("renewed {renewals} times"))
    }
}

#[async_trait]
impl Admission for RenewingAdmission {
    async fn credential(&self) -> Result<Credential, Rejection> {
        Ok(Self::credential_after(*self.renewals.borrow()))
    }

    fn credential_changes(&self) -> watch::Receiver<u64> {
        self.renewals.subscribe()
    }

    async fn admit(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.listed.admit(peer, credential).await
    }

    fn admit_relayed(&self, peer: PeerId, credential: &Credential) -> Result<AdmittedPeer, Rejection> {
        self.introduced.send_replace(credential.clone());
        self.listed.admit_relayed(peer, credential)
    }
}

#[tokio::test]
async fn a_renewed_credential_is_sent_to_the_peers_that_have_the_old_credential() {
    within(async {
        let fleet = Fleet::of(2);
        let (first_admission, second_admission) =
            (RenewingAdmission::new(fleet.admission()), RenewingAdmission::new(fleet.admission()));
        let first = fleet.start_with(0, &[], first_admission.clone()).await;
        let second = fleet.start_with(1, &[first.transfer], second_admission.clone()).await;
        for agent in [&first, &second] {
            agent.wait_for_peers(1).await;
        }
        let mut introduced = second_admission.introduced.subscribe();
        for renewals in 0..3 {
            first_admission.renewals.send_replace(renewals);
            introduced.wait_for(|shown| *shown == RenewingAdmission::credential_after(renewals)).await.unwrap();
        }
        for agent in [second, first] {
            agent.stop().await;
        }
    })
    .await;
}
