//! One agent: everything is started in order here, every task has a name, and everything is stopped in reverse.
//!
//! [`recover`] is the main flow. The rest of this floor connects it to the node's pods ([`pod_controller`]), to the peers
//! ([`join`], [`holders`], [`advertise`]) and to whoever watches ([`progress`], [`tell`]).

mod agent_ports;
pub mod announcer;
pub mod blob_fetcher;
pub mod claim_coordinator;
pub mod clock_watch;
mod disk_space;
pub mod fallback_fetcher;
pub mod inventory_view;
pub mod joiner;
pub mod layer_unpacker;
pub mod layer_watch;
pub mod manual_pull;
pub mod notifications;
pub mod own_image;
pub mod pod_controller;
pub mod pod_notifier;
pub mod policy_watch;
pub mod progress;
pub mod recover;
mod recover_error;
pub mod reference_resolver;
pub mod registry_health;
pub mod retainer;
pub mod shared_key_watch;
pub mod status;
pub mod supervisor;
pub mod suspecting_fetcher;
pub mod swarm;
#[cfg(test)]
mod tests;
pub mod udp_watch;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::admin::{AdminServer, ReadinessCheck};
use crate::config::Settings;
use crate::control::{self, ControlServer};
use crate::decide::disk_reservations::Reservations;
use crate::decide::fill::FetchFrom;
use crate::decide::retain::RetainLayers;
use crate::identity::Identity;
use crate::mesh::{self, SharedInventory};
use crate::metrics::Metrics;
use crate::oci::Platform;
use crate::ports::MeshSource;
use crate::transfer::{self, Transfer, TransferDependencies};

pub use self::agent_ports::{AgentPorts, StartError};
use self::announcer::{Announcer, VolatileItems};
use self::blob_fetcher::BlobFetcher;
use self::claim_coordinator::ClaimCoordinator;
use self::clock_watch::ClockWatch;
use self::fallback_fetcher::{FallbackFetcher, MeshRangeServer};
use self::inventory_view::PeerInventory;
use self::joiner::introducer::Introducer;
use self::joiner::{Joiner, SystemDnsResolver};
use self::layer_unpacker::LayerUnpacker;
use self::layer_watch::LayerWatch;
use self::manual_pull::ManualPuller;
use self::notifications::{NotificationQueue, NotificationSender};
use self::own_image::OwnImageController;
use self::pod_controller::{PodController, PodControllerParts};
use self::policy_watch::PolicyWatch;
use self::progress::RecoveryTracker;
use self::recover::Recoverer;
use self::reference_resolver::ReferenceResolver;
use self::registry_health::RegistryHealth;
use self::retainer::{PodImages, Retainer};
use self::shared_key_watch::SharedKeyWatch;
use self::status::{AgentStatus, MeshView};
use self::supervisor::Supervisor;
use self::suspecting_fetcher::SuspectingFetcher;
use self::swarm::Downloads;
use self::udp_watch::UdpWatch;

/// An agent that was put together and listens, but runs only with its supervisor.
pub struct Agent {
    /// Its tasks; more may be added before it runs.
    pub supervisor: Supervisor,
    /// Who holds what, as this agent knows it.
    pub inventory: PeerInventory,
    /// Its recoveries.
    pub tracker: RecoveryTracker,
    /// Where it serves blobs.
    pub transfer: SocketAddr,
    /// Where it answers probes.
    pub admin: SocketAddr,
}

/// Bounds of the channels between tasks: enough for one burst (110 pods of a node listed at once; every peer of a large
/// cluster coming up), after which the sender waits.
const PEERS_QUEUED: usize = 64;
const MESH_EVENTS_QUEUED: usize = 64;
/// Pod events on their way past the task that looks at images: the watch's own channel holds the burst.
const POD_EVENTS_QUEUED: usize = 8;
/// Pulls by hand that wait to be looked at, which takes no time.
const PULLS_QUEUED: usize = 4;

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
        world: AgentPorts,
        metrics: Metrics,
        mut supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        let Settings {
            node,
            admin_listen,
            join_addresses: seeds,
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
            pull_connections: connections,
            notifier,
            imports,
            containerd,
            pods,
            readiness_checks: checks,
        } = world;
        let policy_watch = match policy_file {
            Some(path) => Some(PolicyWatch::open(path, policy.clone(), metrics.clone()).await),
            None => None,
        };
        let policy_status = policy_watch.as_ref().map(PolicyWatch::status);
        let policy = policy_watch.as_ref().map_or_else(|| watch::channel(Arc::new(policy)).1, PolicyWatch::policy);
        let me = identity.peer_id();
        let table = SharedInventory::default();
        let inventory = PeerInventory::new(table.clone());

        let (mesh, mesh_task, gossip) =
            mesh::start(mesh, node.clone(), &identity, table, Arc::clone(&admission), metrics.clone()).await?;
        let mesh_view: Arc<dyn MeshSource> = Arc::new(MeshView(mesh.clone()));
        let (joined_in, joined) = mpsc::channel(PEERS_QUEUED);
        let transfer = transfer::Config { gossip_port: gossip.port(), ..transfer };
        let downloads = Downloads::default();
        let surroundings = TransferDependencies {
            admission: Arc::clone(&admission),
            store: Arc::clone(&store),
            partials: Arc::new(downloads.clone()),
            metrics: metrics.clone(),
            admitted_peers: joined_in,
        };
        let transfer = Transfer::bind_with_policy(transfer, &identity, surroundings, policy.clone())?;
        let mesh_task = mesh_task.with_range_server(Arc::new(MeshRangeServer(transfer.clone())));
        let (store_ready_in, store_ready) = watch::channel(false);
        let (udp_ready_in, udp_ready) = watch::channel(true);
        let mut all_checks = vec![
            ReadinessCheck { name: "content store", passes: store_ready },
            ReadinessCheck { name: "UDP to peers", passes: udp_ready },
        ];
        all_checks.extend(checks);
        let admin = AdminServer::bind(admin_listen, metrics.clone(), all_checks, Arc::clone(&mesh_view)).await?;
        let (transfer_address, admin_address) = (transfer.local_addr(), admin.local_addr()?);
        tracing::info!(%node, peer = %me, transfer = %transfer_address, %gossip, admin = %admin_address, "agent starts");

        let listened_on = Some(transfer_address.ip()).filter(|address| !address.is_unspecified());
        let (zone_in, zone_here) = watch::channel(zone.clone());
        let introducer = Introducer {
            mesh: mesh.clone(),
            admission,
            cluster: Arc::clone(&cluster),
            zone,
            own_zone: zone_in,
            address: advertise.or(listened_on),
            observed_address: transfer.observed_address(),
            transfer_port: transfer_address.port(),
            gossip_port: gossip.port(),
        };
        let platform = Platform::of_this_node();
        let recoverer = Recoverer {
            store: Arc::clone(&store),
            resolver: ReferenceResolver {
                inventory: inventory.clone(),
                registry: Arc::clone(&registry),
                cluster: Arc::clone(&cluster),
                platform: platform.clone(),
                options: resolve,
            },
            blob_fetcher: Arc::new(BlobFetcher::new(
                me,
                Arc::clone(&store),
                Arc::new(FallbackFetcher::new(
                    SuspectingFetcher { transfer: transfer.clone(), mesh: mesh.clone(), udp: inventory.udp().clone() },
                    metrics.clone(),
                )),
                inventory.clone(),
                downloads.clone(),
                zone_here,
                metrics.clone(),
            )),
            claims: Arc::new(ClaimCoordinator::new(
                Arc::clone(&claims),
                inventory.clone(),
                metrics.clone(),
                node.clone(),
                me,
            )),
            policy: policy.clone(),
            platform,
            reservations: Reservations::default(),
            imports,
            layer_unpacker: unpacker.map(|unpacker| LayerUnpacker::new(unpacker, Arc::clone(&store), metrics.clone())),
        };
        let tracker = RecoveryTracker::default();
        let (notification_sender, notifications) = match notifier {
            Some(notifier) => {
                let (notification_sender, notifications) =
                    NotificationSender::new(notifier, claims, inventory.clone(), node.clone(), metrics.clone());
                (Some(notification_sender), notifications)
            }
            None => (None, NotificationQueue::disabled(metrics.clone())),
        };
        let (observed_outages_in, observed_outages) = watch::channel(Vec::new());
        let (image_records_in, image_records) = watch::channel(None);
        let registries =
            RegistryHealth::new(inventory.clone(), registry, probe_registries, observed_outages_in, metrics.clone());
        let (images_in, images) = watch::channel(None);
        let retained_store = Arc::clone(&store);
        let (retained_cluster, node_cluster) = (Arc::clone(&cluster), Arc::clone(&cluster));
        let pod_controller = PodController::new(PodControllerParts {
            recoverer,
            tracker: tracker.clone(),
            cluster,
            registries,
            connections,
            notifications,
            image_records,
            policy: policy.clone(),
            options,
            metrics: metrics.clone(),
        });
        let (own_in, own_image_status) = watch::channel(None);
        let own_image = own_image.map(|ports| {
            OwnImageController::new(
                ports,
                pod_controller.recoverer(),
                tracker.clone(),
                metrics.clone(),
                options.dry_run,
                own_in,
            )
        });
        let (retained_in, retained) = watch::channel(None);
        let retaining = layer_leases.filter(|_| retain.layers != RetainLayers::None).map(|leases| {
            let (used_in, used) = watch::channel(Arc::default());
            let layer_watch = LayerWatch {
                node: node.clone(),
                cluster: Arc::clone(&retained_cluster),
                retained: retained.clone(),
                images: images.clone(),
                fetches: retain.fetch != FetchFrom::None && !options.dry_run,
                metrics: metrics.clone(),
            };
            let pod_images = PodImages::new(retained_cluster, policy.clone(), used_in);
            let pod_images = match &own_image {
                Some(own_image) => pod_images.with_own_images(own_image.kept_references()),
                None => pod_images,
            };
            let retainer = Retainer::new(retained_store, leases, retain, used, metrics.clone(), retained_in);
            let retainer = match retain.fetch {
                FetchFrom::None => retainer,
                _ if options.dry_run => retainer,
                FetchFrom::Peers | FetchFrom::Registry => {
                    retainer.with_filler(pod_controller.recoverer(), pod_controller.healthy_registries())
                }
            };
            (pod_images, retainer, layer_watch)
        });
        let advertiser = Announcer::new(
            store,
            mesh.clone(),
            metrics.clone(),
            store_ready_in,
            VolatileItems { outages: observed_outages.clone(), fetching: downloads.announced() },
            image_records_in,
            images_in,
        );
        let (clock_in, clock) = watch::channel(None);
        let clock_watch = ClockWatch {
            cluster: Arc::clone(&node_cluster),
            node: node.clone(),
            status: clock_in,
            metrics: metrics.clone(),
        };
        let (shared_key_in, introduced) = watch::channel(None);
        let shared_key_watch = SharedKeyWatch {
            cluster: node_cluster,
            node: node.clone(),
            key_file,
            connected: transfer.shared_key(),
            introduced,
        };
        let status = AgentStatus {
            node,
            me,
            mesh: Arc::clone(&mesh_view),
            inventory: inventory.clone(),
            tracker: tracker.clone(),
            containerd,
            clock,
            images,
            retained,
            own_image: own_image_status,
            observed_outages,
            policy_file: policy_status,
        };
        let (pulls_in, pulls) = mpsc::channel(PULLS_QUEUED);
        let control =
            ControlServer::bind(control::Config { socket: control_socket }, Arc::new(status), pulls_in).await?;
        let manual_puller = ManualPuller {
            recoverer: pod_controller.recoverer(),
            tracker: tracker.clone(),
            metrics: metrics.clone(),
            dry_run: options.dry_run,
        };
        let (listed_in, listed) = watch::channel(Vec::new());
        let udp_watch = UdpWatch {
            transfer: transfer.clone(),
            mesh_status: Arc::clone(&mesh_view),
            inventory: inventory.clone(),
            bootstrap_addresses: listed,
            ready: udp_ready_in,
            metrics: metrics.clone(),
        };
        let joiner = Joiner {
            bootstrap_names: seeds,
            resolver: Arc::new(SystemDnsResolver),
            peers_file,
            transfer: transfer.clone(),
            mesh,
            mesh_status: mesh_view,
            inventory: inventory.clone(),
            metrics,
            bootstrap_addresses: listed_in,
            shared_key: shared_key_in,
        };

        // Stopped in reverse: first nobody recovers any more, then nobody is found, and the doors close last.
        let (mesh_events_in, mesh_events) = mpsc::channel(MESH_EVENTS_QUEUED);
        supervisor.spawn("admin", |stop| admin.run(stop));
        supervisor.spawn("transfer", |stop| transfer.run(stop));
        supervisor.spawn("mesh", |stop| mesh_task.run(mesh_events_in, stop));
        supervisor.spawn("advertise", |stop| advertiser.run(stop));
        supervisor.spawn("introduce", |stop| introducer.run(stop));
        supervisor.spawn("join", |stop| joiner.run(joined, mesh_events, stop));
        supervisor.spawn("UDP", |stop| udp_watch.run(stop));
        supervisor.spawn("clock", |stop| clock_watch.run(stop));
        supervisor.spawn("shared key", |stop| shared_key_watch.run(stop));
        if let Some(policy_watch) = policy_watch {
            supervisor.spawn("policy", |stop| policy_watch.run(stop));
        }
        supervisor.spawn("control", |stop| control.run(stop));
        supervisor.spawn("pulls by hand", |stop| manual_puller.run(pulls, stop));
        if let Some(notification_sender) = notification_sender {
            supervisor.spawn("webhook", |stop| notification_sender.run(stop));
        }
        if let Some(own_image) = own_image {
            supervisor.spawn("own image", |stop| own_image.run(stop));
        }
        let pods = match retaining {
            Some((pod_images, retainer, layer_watch)) => {
                let (forward, forwarded) = mpsc::channel(POD_EVENTS_QUEUED);
                supervisor.spawn("layer notice", |stop| layer_watch.run(stop));
                supervisor.spawn("retain layers", |stop| retainer.run(stop));
                supervisor.spawn("pod images", |stop| pod_images.run(pods, forward, stop));
                forwarded
            }
            None => pods,
        };
        supervisor.spawn("pods", |stop| pod_controller.run(pods, stop));
        Ok(Self { supervisor, inventory, tracker, transfer: transfer_address, admin: admin_address })
    }
}
