//! The agent's ports for peers and for probes: transfer over QUIC, gossip, and the admin server.

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use super::StartError;
use super::context::AgentContext;
use super::operator::status::MeshView;
use super::part::{Part, Tasks};
use super::recovery::downloads::Downloads;
use super::recovery::mesh_range_fetcher::MeshRangeServer;
use crate::admin::{AdminServer, ReadinessCheck};
use crate::identity::Identity;
use crate::mesh::{self, Mesh, SharedInventory};
use crate::model::Peer;
use crate::ports::{Admission, ContentStore, MembershipEvent, MeshSource};
use crate::transfer::{self, Transfer, TransferDependencies};

/// Bounds of the channels to membership: enough for every peer of a large cluster that comes up at
/// once, after which the sender waits.
const PEERS_QUEUED: usize = 64;
const MESH_EVENTS_QUEUED: usize = 64;

/// Parts of the agent that the network uses.
pub(super) struct NetworkDependencies<'a> {
    pub(super) transfer: transfer::Config,
    pub(super) mesh: mesh::Config,
    pub(super) admin_listen: SocketAddr,
    pub(super) identity: &'a Identity,
    pub(super) shared_inventory: SharedInventory,
    pub(super) admission: Arc<dyn Admission>,
    pub(super) store: Arc<dyn ContentStore>,
    /// Served to peers while the blobs arrive.
    pub(super) downloads: Downloads,
    /// Conditions of readiness besides those of the agent itself.
    pub(super) readiness_checks: Vec<ReadinessCheck>,
}

/// The bound ports.
pub(super) struct Network {
    pub(super) transfer: Transfer,
    pub(super) mesh: Mesh,
    pub(super) mesh_status: Arc<dyn MeshSource>,
    pub(super) gossip_port: u16,
    pub(super) admin: SocketAddr,
    /// Peers that dialed this agent and were admitted.
    pub(super) admitted_peers: mpsc::Receiver<Peer>,
    pub(super) mesh_events: mpsc::Receiver<MembershipEvent>,
    /// Readiness: the content store answers.
    pub(super) store_ready: watch::Sender<bool>,
    /// Readiness: peers answer over UDP.
    pub(super) udp_ready: watch::Sender<bool>,
}

/// Binds every port.
///
/// # Errors
/// [`StartError`] when a port cannot be bound.
pub(super) async fn build(
    context: &AgentContext,
    dependencies: NetworkDependencies<'_>,
) -> Result<Part<Network>, StartError> {
    let NetworkDependencies {
        transfer,
        mesh,
        admin_listen,
        identity,
        shared_inventory,
        admission,
        store,
        downloads,
        readiness_checks,
    } = dependencies;
    let AgentContext { node, peer, policy, options: _, inventory: _, tracker: _, metrics } = context.clone();
    let (mesh, mesh_task, gossip) =
        mesh::start(mesh, node.clone(), identity, shared_inventory, Arc::clone(&admission), metrics.clone()).await?;
    let (admitted_peers_in, admitted_peers) = mpsc::channel(PEERS_QUEUED);
    let transfer = transfer::Config { gossip_port: gossip.port(), ..transfer };
    let transfer_dependencies = TransferDependencies {
        admission,
        store,
        partials: Arc::new(downloads),
        metrics: metrics.clone(),
        admitted_peers: admitted_peers_in,
    };
    let transfer = Transfer::bind_with_policy(transfer, identity, transfer_dependencies, policy)?;
    let mesh_task = mesh_task.with_range_server(Arc::new(MeshRangeServer(transfer.clone())));

    let (store_ready, store_passes) = watch::channel(false);
    let (udp_ready, udp_passes) = watch::channel(true);
    let mut checks = vec![
        ReadinessCheck { name: "content store", passes: store_passes },
        ReadinessCheck { name: "UDP to peers", passes: udp_passes },
    ];
    checks.extend(readiness_checks);
    let mesh_status: Arc<dyn MeshSource> = Arc::new(MeshView(mesh.clone()));
    let admin_server = AdminServer::bind(admin_listen, metrics, checks, Arc::clone(&mesh_status)).await?;
    let admin = admin_server.local_addr()?;
    let transfer_address = transfer.local_addr();
    tracing::info!(%node, %peer, transfer = %transfer_address, %gossip, %admin, "the agent starts");

    let (mesh_events_in, mesh_events) = mpsc::channel(MESH_EVENTS_QUEUED);
    let mut tasks = Tasks::default();
    tasks.add("admin", |stop| admin_server.run(stop));
    let transfer_task = transfer.clone();
    tasks.add("transfer", |stop| transfer_task.run(stop));
    tasks.add("mesh", |stop| mesh_task.run(mesh_events_in, stop));
    let gossip_port = gossip.port();
    let handle = Network {
        transfer,
        mesh,
        mesh_status,
        gossip_port,
        admin,
        admitted_peers,
        mesh_events,
        store_ready,
        udp_ready,
    };
    Ok(Part { handle, tasks })
}
