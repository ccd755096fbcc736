//! One agent: everything is started in order here, every task has a name, and everything is stopped in reverse.
//!
//! [`recover`] is the main flow. The rest of this floor connects it to the node's pods ([`salvage`]), to the peers
//! ([`join`], [`holders`], [`advertise`]) and to whoever watches ([`progress`], [`tell`]).

pub mod advertise;
pub mod bring;
pub mod holders;
pub mod join;
pub mod lead;
pub mod progress;
pub mod recover;
mod recover_error;
pub mod salvage;
pub mod supervisor;
pub mod tell;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use tokio::sync::{mpsc, watch};

use crate::admin::{Admin, Check};
use crate::config::Settings;
use crate::identity::Identity;
use crate::mesh::{self, Mesh};
use crate::metrics::Metrics;
use crate::oci::Platform;
use crate::ports::{Admission, Claims, Cluster, ContentStore, PodEvent};
use crate::transfer::{self, Transfer};

use self::advertise::Advertiser;
use self::bring::Bring;
use self::holders::Holders;
use self::join::Joiner;
use self::lead::Lead;
use self::progress::Board;
use self::recover::Recoverer;
use self::salvage::Salvager;
use self::supervisor::Supervisor;

/// The outside world of one agent: its ports.
pub struct World {
    /// Where content is kept.
    pub store: Arc<dyn ContentStore>,
    /// Pods and their namespaces.
    pub cluster: Arc<dyn Cluster>,
    /// Leases.
    pub claims: Arc<dyn Claims>,
    /// Who may join.
    pub admission: Arc<dyn Admission>,
    /// The pods of this node.
    pub pods: mpsc::Receiver<PodEvent>,
    /// What has to hold besides the content store's answer before the agent is ready.
    pub checks: Vec<Check>,
}

/// An agent that was put together and listens, but runs only with its supervisor.
pub struct Agent {
    /// Its tasks; more may be added before it runs.
    pub supervisor: Supervisor,
    /// Who holds what, as this agent knows it.
    pub holders: Holders,
    /// Its recoveries.
    pub board: Board,
    /// Where it serves blobs.
    pub transfer: SocketAddr,
    /// Where it answers probes.
    pub admin: SocketAddr,
}

/// The agent could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The port for blobs.
    #[error(transparent)]
    Transfer(#[from] transfer::BindError),
    /// The port for gossip.
    #[error(transparent)]
    Mesh(#[from] mesh::MeshError),
    /// The admin port.
    #[error(transparent)]
    Admin(#[from] std::io::Error),
}

/// Bounds of the channels between tasks: enough for one burst (110 pods of a node listed at once; every peer of a large
/// cluster coming up), after which the sender waits.
const PEERS_QUEUED: usize = 64;
const MESH_EVENTS_QUEUED: usize = 64;

impl Agent {
    /// Binds every port and starts the tasks, what others depend on first. `supervisor` may own tasks already: what the
    /// world's ports need, so that they stop after everything here.
    ///
    /// # Errors
    /// [`StartError`] when a port cannot be had.
    pub async fn start(
        settings: Settings,
        transfer: transfer::Config,
        mesh: mesh::Config,
        identity: Identity,
        world: World,
        metrics: Metrics,
        mut supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        let Settings {
            node,
            admin_listen,
            seeds,
            key_file: _,
            policy,
            concurrent_recoveries,
            blobs_at_once,
            limits,
            grace: _,
        } = settings;
        let World { store, cluster, claims, admission, pods, checks } = world;
        let me = identity.peer_id();
        let holders = Holders::default();

        let (mesh, mesh_task, gossip) = mesh::start(mesh, &identity, metrics.clone()).await?;
        let (joined_in, joined) = mpsc::channel(PEERS_QUEUED);
        let transfer = transfer::Config { gossip_port: gossip.port(), ..transfer };
        let transfer = Transfer::bind(transfer, &identity, admission, Arc::clone(&store), metrics.clone(), joined_in)?;
        let (store_ready_in, store_ready) = watch::channel(false);
        let mut all_checks = vec![Check { name: "content store", holds: store_ready }];
        all_checks.extend(checks);
        let admin = Admin::bind(admin_listen, metrics.clone(), all_checks).await?;
        let (transfer_address, admin_address) = (transfer.local_addr(), admin.local_addr()?);
        tracing::info!(%node, peer = %me, transfer = %transfer_address, %gossip, admin = %admin_address, "agent starts");

        let recoverer = Recoverer {
            store: Arc::clone(&store),
            holders: holders.clone(),
            bring: Bring {
                me,
                store: Arc::clone(&store),
                fetcher: Arc::new(transfer.clone()),
                holders: holders.clone(),
                metrics: metrics.clone(),
                distrusted: Mutex::new(HashMap::new()),
            },
            lead: Lead::new(claims, holders.clone(), metrics.clone(), node, me),
            limits,
            platform: Platform::of_this_node(),
            blobs_at_once,
        };
        let board = Board::default();
        let salvager = Salvager::new(recoverer, board.clone(), cluster, policy, concurrent_recoveries, metrics.clone());
        let advertiser =
            Advertiser { store, mesh: Mesh::clone(&mesh), metrics: metrics.clone(), ready: store_ready_in };
        let joiner = Joiner { seeds, transfer: transfer.clone(), mesh, holders: holders.clone() };

        // Stopped in reverse: first nobody recovers any more, then nobody is found, and the doors close last.
        let (mesh_events_in, mesh_events) = mpsc::channel(MESH_EVENTS_QUEUED);
        supervisor.spawn("admin", |stop| admin.run(stop));
        supervisor.spawn("transfer", |stop| transfer.run(stop));
        supervisor.spawn("holders", |stop| holders.clone().run(mesh_events, metrics, stop));
        supervisor.spawn("mesh", |stop| mesh_task.run(mesh_events_in, stop));
        supervisor.spawn("advertise", |stop| advertiser.run(stop));
        supervisor.spawn("join", |stop| joiner.run(joined, stop));
        supervisor.spawn("salvage", |stop| salvager.run(pods, stop));
        Ok(Self { supervisor, holders, board, transfer: transfer_address, admin: admin_address })
    }
}
