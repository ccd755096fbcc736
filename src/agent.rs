//! One agent: everything is started in order here, every task has a name, and everything is stopped in reverse.
//!
//! [`recover`] is the main flow. The rest of this floor connects it to the node's pods ([`salvage`]), to the peers
//! ([`join`], [`holders`], [`advertise`]) and to whoever watches ([`progress`], [`tell`]).

pub mod advertise;
pub mod bring;
pub mod by_hand;
pub mod clock_watch;
pub mod doubting;
pub mod holders;
pub mod join;
pub mod layer_notice;
pub mod lead;
pub mod notices;
pub mod own_image;
pub mod progress;
pub mod recover;
mod recover_error;
pub mod registries;
pub mod resolve;
pub mod retain;
mod room;
pub mod rules;
pub mod salvage;
pub mod shared_key;
pub mod status;
pub mod supervisor;
pub mod swarm;
pub mod tell;
#[cfg(test)]
mod tests;
pub mod udp_watch;
pub mod unpack;
pub mod ways;
mod world;

use std::net::SocketAddr;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use crate::admin::{Admin, Check};
use crate::config::Settings;
use crate::control::{self, Control};
use crate::decide::fill::FetchFrom;
use crate::decide::reserve::Reservations;
use crate::decide::retain::RetainLayers;
use crate::identity::Identity;
use crate::mesh::{self, Table};
use crate::metrics::Metrics;
use crate::oci::Platform;
use crate::ports::MeshSource;
use crate::transfer::{self, Surroundings, Transfer};

use self::advertise::{Advertiser, Besides};
use self::bring::Bring;
use self::by_hand::ByHand;
use self::clock_watch::ClockWatch;
use self::doubting::Doubting;
use self::holders::Holders;
use self::join::introduce::Introducer;
use self::join::{Joiner, SystemResolver};
use self::layer_notice::LayerWatch;
use self::lead::Lead;
use self::notices::{Messenger, Notices};
use self::own_image::OwnImage;
use self::progress::Board;
use self::recover::Recoverer;
use self::registries::Registries;
use self::resolve::Resolver;
use self::retain::{PodImages, Retainer};
use self::rules::RulesWatch;
use self::salvage::{Parts, Salvager};
use self::shared_key::SharedKeyWatch;
use self::status::{AgentStatus, MeshView};
use self::supervisor::Supervisor;
use self::swarm::Underway;
use self::udp_watch::UdpWatch;
use self::unpack::Unpacking;
use self::ways::{OverMesh, Ways};
pub use self::world::{StartError, World};

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

/// Bounds of the channels between tasks: enough for one burst (110 pods of a node listed at once; every peer of a large
/// cluster coming up), after which the sender waits.
const PEERS_QUEUED: usize = 64;
const MESH_NEWS_QUEUED: usize = 64;
/// Pod events on their way past the task that looks at images: the watch's own channel holds the burst.
const PODS_PASSED_ON: usize = 8;
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
        world: World,
        metrics: Metrics,
        mut supervisor: Supervisor,
    ) -> Result<Self, StartError> {
        let Settings {
            node,
            admin_listen,
            seeds,
            advertise,
            zone,
            key_file,
            peers_file,
            rules,
            rules_file,
            control_socket,
            resolve,
            manner,
            probe_registries,
            image_verifier_dir: _,
            import_past_verifiers: _,
            unpack_layers: _,
            own_image: _,
            retain,
            grace: _,
        } = settings;
        let World {
            store,
            unpacker,
            layer_leases,
            own_image,
            cluster,
            claims,
            admission,
            registry,
            connections,
            notifier,
            imports,
            containerd,
            pods,
            checks,
        } = world;
        let rules_watch = match rules_file {
            Some(path) => Some(RulesWatch::open(path, rules.clone(), metrics.clone()).await),
            None => None,
        };
        let rules_status = rules_watch.as_ref().map(RulesWatch::status);
        let rules = rules_watch.as_ref().map_or_else(|| watch::channel(Arc::new(rules)).1, RulesWatch::rules);
        let me = identity.peer_id();
        let table = Table::default();
        let holders = Holders::new(table.clone());

        let (mesh, mesh_task, gossip) =
            mesh::start(mesh, node.clone(), &identity, table, Arc::clone(&admission), metrics.clone()).await?;
        let mesh_view: Arc<dyn MeshSource> = Arc::new(MeshView(mesh.clone()));
        let (joined_in, joined) = mpsc::channel(PEERS_QUEUED);
        let transfer = transfer::Config { gossip_port: gossip.port(), ..transfer };
        let underway = Underway::default();
        let surroundings = Surroundings {
            admission: Arc::clone(&admission),
            store: Arc::clone(&store),
            partials: Arc::new(underway.clone()),
            metrics: metrics.clone(),
            joined: joined_in,
        };
        let transfer = Transfer::bind_within(transfer, &identity, surroundings, rules.clone())?;
        let mesh_task = mesh_task.serving(Arc::new(OverMesh(transfer.clone())));
        let (store_ready_in, store_ready) = watch::channel(false);
        let (udp_ready_in, udp_ready) = watch::channel(true);
        let mut all_checks =
            vec![Check { name: "content store", holds: store_ready }, Check { name: "UDP to peers", holds: udp_ready }];
        all_checks.extend(checks);
        let admin = Admin::bind(admin_listen, metrics.clone(), all_checks, Arc::clone(&mesh_view)).await?;
        let (transfer_address, admin_address) = (transfer.local_addr(), admin.local_addr()?);
        tracing::info!(%node, peer = %me, transfer = %transfer_address, %gossip, admin = %admin_address, "agent starts");

        let listened_on = Some(transfer_address.ip()).filter(|address| !address.is_unspecified());
        let (zone_in, zone_here) = watch::channel(zone.clone());
        let introducer = Introducer {
            mesh: mesh.clone(),
            admission,
            cluster: Arc::clone(&cluster),
            zone,
            zone_known: zone_in,
            address: advertise.or(listened_on),
            seen: transfer.seen(),
            transfer_port: transfer_address.port(),
            gossip_port: gossip.port(),
        };
        let platform = Platform::of_this_node();
        let recoverer = Recoverer {
            store: Arc::clone(&store),
            resolver: Resolver {
                holders: holders.clone(),
                registry: Arc::clone(&registry),
                cluster: Arc::clone(&cluster),
                platform: platform.clone(),
                settings: resolve,
            },
            bring: Arc::new(Bring::new(
                me,
                Arc::clone(&store),
                Arc::new(Ways::new(
                    Doubting { transfer: transfer.clone(), mesh: mesh.clone(), udp: holders.udp().clone() },
                    metrics.clone(),
                )),
                holders.clone(),
                underway.clone(),
                zone_here,
                metrics.clone(),
            )),
            lead: Arc::new(Lead::new(Arc::clone(&claims), holders.clone(), metrics.clone(), node.clone(), me)),
            rules: rules.clone(),
            platform,
            room: Reservations::default(),
            imports,
            unpacking: unpacker.map(|unpacker| Unpacking::new(unpacker, Arc::clone(&store), metrics.clone())),
        };
        let board = Board::default();
        let (messenger, notices) = match notifier {
            Some(notifier) => {
                let (messenger, notices) =
                    Messenger::new(notifier, claims, holders.clone(), node.clone(), metrics.clone());
                (Some(messenger), notices)
            }
            None => (None, Notices::nowhere(metrics.clone())),
        };
        let (first_hand_in, first_hand) = watch::channel(Vec::new());
        let (names_in, names_here) = watch::channel(None);
        let registries = Registries::new(holders.clone(), registry, probe_registries, first_hand_in, metrics.clone());
        let (images_in, images) = watch::channel(None);
        let retained_store = Arc::clone(&store);
        let (retained_cluster, node_cluster) = (Arc::clone(&cluster), Arc::clone(&cluster));
        let salvager = Salvager::new(Parts {
            recoverer,
            board: board.clone(),
            cluster,
            registries,
            connections,
            notices,
            names_here,
            rules: rules.clone(),
            manner,
            metrics: metrics.clone(),
        });
        let (own_in, own_image_status) = watch::channel(None);
        let own_image = own_image.map(|ports| {
            OwnImage::new(ports, salvager.recoverer(), board.clone(), metrics.clone(), manner.dry_run, own_in)
        });
        let (retained_in, retained) = watch::channel(None);
        let retaining = layer_leases.filter(|_| retain.layers != RetainLayers::None).map(|leases| {
            let (used_in, used) = watch::channel(Arc::default());
            let layer_watch = LayerWatch {
                node: node.clone(),
                cluster: Arc::clone(&retained_cluster),
                retained: retained.clone(),
                images: images.clone(),
                fetches: retain.fetch != FetchFrom::None && !manner.dry_run,
                metrics: metrics.clone(),
            };
            let pod_images = PodImages::new(retained_cluster, rules.clone(), used_in);
            let pod_images = match &own_image {
                Some(own_image) => pod_images.with_own(own_image.named()),
                None => pod_images,
            };
            let retainer = Retainer::new(retained_store, leases, retain, used, metrics.clone(), retained_in);
            let retainer = match retain.fetch {
                FetchFrom::None => retainer,
                _ if manner.dry_run => retainer,
                FetchFrom::Peers | FetchFrom::Registry => {
                    retainer.with_sources(salvager.recoverer(), salvager.healthy_registries())
                }
            };
            (pod_images, retainer, layer_watch)
        });
        let advertiser = Advertiser::new(
            store,
            mesh.clone(),
            metrics.clone(),
            store_ready_in,
            Besides { outages: first_hand.clone(), fetching: underway.told() },
            names_in,
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
            holders: holders.clone(),
            board: board.clone(),
            containerd,
            clock,
            images,
            retained,
            own_image: own_image_status,
            first_hand,
            rules_file: rules_status,
        };
        let (pulls_in, pulls) = mpsc::channel(PULLS_QUEUED);
        let control = Control::bind(control::Config { socket: control_socket }, Arc::new(status), pulls_in).await?;
        let by_hand = ByHand {
            recoverer: salvager.recoverer(),
            board: board.clone(),
            metrics: metrics.clone(),
            dry_run: manner.dry_run,
        };
        let (listed_in, listed) = watch::channel(Vec::new());
        let udp_watch = UdpWatch {
            transfer: transfer.clone(),
            status: Arc::clone(&mesh_view),
            holders: holders.clone(),
            listed,
            ready: udp_ready_in,
            metrics: metrics.clone(),
        };
        let joiner = Joiner {
            seeds,
            resolver: Arc::new(SystemResolver),
            peers_file,
            transfer: transfer.clone(),
            mesh,
            status: mesh_view,
            holders: holders.clone(),
            metrics,
            listed: listed_in,
            shared_key: shared_key_in,
        };

        // Stopped in reverse: first nobody recovers any more, then nobody is found, and the doors close last.
        let (mesh_news_in, mesh_news) = mpsc::channel(MESH_NEWS_QUEUED);
        supervisor.spawn("admin", |stop| admin.run(stop));
        supervisor.spawn("transfer", |stop| transfer.run(stop));
        supervisor.spawn("mesh", |stop| mesh_task.run(mesh_news_in, stop));
        supervisor.spawn("advertise", |stop| advertiser.run(stop));
        supervisor.spawn("introduce", |stop| introducer.run(stop));
        supervisor.spawn("join", |stop| joiner.run(joined, mesh_news, stop));
        supervisor.spawn("UDP", |stop| udp_watch.run(stop));
        supervisor.spawn("clock", |stop| clock_watch.run(stop));
        supervisor.spawn("shared key", |stop| shared_key_watch.run(stop));
        if let Some(rules_watch) = rules_watch {
            supervisor.spawn("rules", |stop| rules_watch.run(stop));
        }
        supervisor.spawn("control", |stop| control.run(stop));
        supervisor.spawn("pulls by hand", |stop| by_hand.run(pulls, stop));
        if let Some(messenger) = messenger {
            supervisor.spawn("webhook", |stop| messenger.run(stop));
        }
        if let Some(own_image) = own_image {
            supervisor.spawn("own image", |stop| own_image.run(stop));
        }
        let pods = match retaining {
            Some((pod_images, retainer, layer_watch)) => {
                let (passed_on, passed) = mpsc::channel(PODS_PASSED_ON);
                supervisor.spawn("layer notice", |stop| layer_watch.run(stop));
                supervisor.spawn("retain layers", |stop| retainer.run(stop));
                supervisor.spawn("pod images", |stop| pod_images.run(pods, passed_on, stop));
                passed
            }
            None => pods,
        };
        supervisor.spawn("salvage", |stop| salvager.run(pods, stop));
        Ok(Self { supervisor, holders, board, transfer: transfer_address, admin: admin_address })
    }
}
