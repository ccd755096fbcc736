//! One agent: builds the parts, connects them, and starts their tasks in order.
//!
//! [`recovery::recover`] is the main flow. [`pods`] starts recoveries and reports them,
//! [`membership`] finds the peers, [`retention`] keeps content, and [`operator`] serves the
//! operator. `Agent::start` shows all parts and their connections.

mod agent_ports;
mod context;
pub mod membership;
mod network;
pub mod operator;
mod part;
pub mod peers;
pub mod pods;
pub mod recovery;
pub mod retention;
pub mod supervisor;
#[cfg(test)]
mod tests;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::watch;

pub use self::agent_ports::{AgentPorts, StartError};
use self::context::AgentContext;
use self::membership::MembershipDependencies;
use self::network::NetworkDependencies;
use self::operator::{OperatorDependencies, PolicySource};
use self::peers::inventory_view::PeerInventory;
use self::pods::PodsDependencies;
use self::recovery::builder::RecoveryDependencies;
use self::recovery::downloads::Downloads;
use self::recovery::peer_fetcher::PeerFetcher;
use self::recovery::progress::RecoveryTracker;
use self::retention::{LayerDependencies, RetentionDependencies};
use self::supervisor::Supervisor;
use crate::config::Settings;
use crate::identity::Identity;
use crate::mesh::{self, SharedInventory};
use crate::metrics::Metrics;
use crate::transfer;

/// An agent that listens. Its tasks run in its supervisor.
pub struct Agent {
    /// The tasks; more may be added before the supervisor runs.
    pub supervisor: Supervisor,
    /// The providers of blobs and images.
    pub inventory: PeerInventory,
    /// The running recoveries.
    pub tracker: RecoveryTracker,
    /// The address of the transfer port.
    pub transfer: SocketAddr,
    /// The address of the admin port.
    pub admin: SocketAddr,
}

impl Agent {
    /// Binds every port and starts the tasks. `supervisor` may own tasks already: those of the
    /// adapters behind `ports`, which then stop after the agent's tasks.
    ///
    /// # Errors
    /// [`StartError`] when a port or the control socket cannot be bound.
    pub async fn start(
        settings: Settings,
        transfer: transfer::Config,
        mesh: mesh::Config,
        identity: Identity,
        ports: AgentPorts,
        metrics: Metrics,
        mut supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        let Settings {
            node,
            admin_listen,
            join_addresses,
            advertise,
            zone,
            key_file,
            peers_file,
            policy,
            policy_file,
            control_socket,
            resolve,
            options,
            probe_registries,
            image_verifier_dir: _,
            import_past_verifiers: _,
            unpack_layers: _,
            own_image: _,
            retain,
            grace: _,
        } = settings;
        let AgentPorts {
            store,
            unpacker,
            layer_leases,
            own_image,
            cluster,
            claims,
            admission,
            registry,
            pull_connections,
            notifier,
            imports,
            containerd,
            pods: pod_events,
            readiness_checks,
        } = ports;

        let policy = PolicySource::open(policy_file, policy, &metrics).await;
        let shared_inventory = SharedInventory::default();
        let context = AgentContext {
            node,
            peer: identity.peer_id(),
            policy: policy.policy.clone(),
            options,
            inventory: PeerInventory::new(shared_inventory.clone()),
            tracker: RecoveryTracker::default(),
            metrics,
        };
        let downloads = Downloads::default();
        let (own_zone, zone_changes) = watch::channel(zone.clone());
        let (image_records_in, image_records) = watch::channel(None);
        let (images_in, images) = watch::channel(None);
        let (layers, pod_events) = LayerDependencies::new(&retain, layer_leases, pod_events);

        let network = NetworkDependencies {
            transfer,
            mesh,
            admin_listen,
            identity: &identity,
            shared_inventory,
            admission: Arc::clone(&admission),
            store: Arc::clone(&store),
            downloads: downloads.clone(),
            readiness_checks,
        };
        let network = network::build(&context, network).await?;
        let (transfer_address, admin) = (network.handle.transfer.local_addr(), network.handle.admin);

        let fetcher = PeerFetcher::new(
            network.handle.transfer.clone(),
            network.handle.mesh.clone(),
            context.inventory.udp().clone(),
            context.metrics.clone(),
        );
        let recovery = RecoveryDependencies {
            peer: context.peer,
            node: context.node.clone(),
            store: Arc::clone(&store),
            unpacker,
            fetcher: Arc::new(fetcher),
            inventory: context.inventory.clone(),
            downloads: downloads.clone(),
            zone: zone_changes,
            registry: Arc::clone(&registry),
            cluster: Arc::clone(&cluster) as _,
            claims: Arc::clone(&claims),
            policy: context.policy.clone(),
            resolve,
            imports,
            metrics: context.metrics.clone(),
        };
        let recoverer = Arc::new(recovery.build());

        let pods = PodsDependencies {
            recoverer: Arc::clone(&recoverer),
            cluster: Arc::clone(&cluster),
            claims,
            registry,
            pull_connections,
            notifier,
            probe_registries,
            image_records,
            events: pod_events,
        };
        let pods = pods::build(&context, pods);

        let retention = RetentionDependencies {
            retain,
            recoverer: Arc::clone(&recoverer),
            healthy_registries: pods.handle.healthy_registries,
            store: Arc::clone(&store),
            cluster: Arc::clone(&cluster),
            layers,
            own_image,
            images: images.clone(),
        };
        let retention = retention::build(&context, retention);

        let membership = MembershipDependencies {
            join_addresses,
            advertise,
            zone,
            key_file,
            peers_file,
            transfer: network.handle.transfer,
            mesh: network.handle.mesh,
            mesh_status: Arc::clone(&network.handle.mesh_status),
            gossip_port: network.handle.gossip_port,
            admission,
            cluster,
            store,
            downloads,
            outages: pods.handle.outages.clone(),
            admitted_peers: network.handle.admitted_peers,
            mesh_events: network.handle.mesh_events,
            own_zone,
            image_records: image_records_in,
            images: images_in,
            store_ready: network.handle.store_ready,
            udp_ready: network.handle.udp_ready,
        };
        let membership = membership::build(&context, membership);

        let operator = OperatorDependencies {
            policy,
            control_socket,
            recoverer,
            mesh_status: network.handle.mesh_status,
            containerd,
            clock: membership.handle.clock,
            images,
            retained: retention.handle.retained,
            own_image: retention.handle.own_image,
            outages: pods.handle.outages,
        };
        let operator = operator::build(&context, operator).await?;

        // The supervisor stops tasks in reverse: first no recovery starts, then this agent leaves
        // the mesh, and the ports close last.
        for tasks in [network.tasks, membership.tasks, operator.tasks, retention.tasks, pods.tasks] {
            tasks.start(|name, task| supervisor.spawn(name, task));
        }
        let AgentContext { node: _, peer: _, policy: _, options: _, inventory, tracker, metrics: _ } = context;
        Ok(Self { supervisor, inventory, tracker, transfer: transfer_address, admin })
    }
}
