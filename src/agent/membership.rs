//! How this agent becomes and stays a member: peers are found and dialed, and content is announced.
//! The watches report a wrong clock, a copied key and blocked UDP.

pub mod announcer;
pub mod clock_watch;
pub mod joiner;
pub mod shared_key_watch;
pub mod udp_watch;

use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::{mpsc, watch};

use self::announcer::{Announcer, RecordTargets, VolatileItems};
use self::clock_watch::ClockWatch;
use self::joiner::introducer::Introducer;
use self::joiner::{Joiner, SystemDnsResolver};
use self::shared_key_watch::SharedKeyWatch;
use self::udp_watch::UdpWatch;
use super::context::AgentContext;
use super::part::{Part, Tasks};
use super::recovery::downloads::Downloads;
use crate::control::{ClockStatus, ImagesStatus};
use crate::mesh::Mesh;
use crate::model::{Outage, Peer, Zone};
use crate::ports::{Admission, Cluster, ContentStore, MembershipEvent, MeshCommands, MeshSource};
use crate::transfer::Transfer;

/// Parts of the agent that membership uses.
pub(super) struct MembershipDependencies {
    /// `host:port` of the first peers.
    pub(super) join_addresses: Vec<String>,
    /// The address that peers dial; `None` takes the one that is listened on, or that peers see.
    pub(super) advertise: Option<IpAddr>,
    /// The zone of the settings; `None` reads the node's label.
    pub(super) zone: Option<Zone>,
    pub(super) key_file: PathBuf,
    pub(super) peers_file: PathBuf,
    pub(super) transfer: Transfer,
    pub(super) mesh: Mesh,
    pub(super) mesh_status: Arc<dyn MeshSource>,
    pub(super) gossip_port: u16,
    pub(super) admission: Arc<dyn Admission>,
    pub(super) cluster: Arc<dyn Cluster>,
    pub(super) store: Arc<dyn ContentStore>,
    pub(super) downloads: Downloads,
    /// Registries that this node found down.
    pub(super) outages: watch::Receiver<Vec<Outage>>,
    pub(super) admitted_peers: mpsc::Receiver<Peer>,
    pub(super) mesh_events: mpsc::Receiver<MembershipEvent>,
    pub(super) own_zone: watch::Sender<Option<Zone>>,
    pub(super) image_records: watch::Sender<RecordTargets>,
    pub(super) images: watch::Sender<Option<ImagesStatus>>,
    pub(super) store_ready: watch::Sender<bool>,
    pub(super) udp_ready: watch::Sender<bool>,
}

/// The state of the clock for the status.
pub(super) struct Membership {
    pub(super) clock: watch::Receiver<Option<ClockStatus>>,
}

/// Builds the tasks that find peers, announce content and watch over the node's identity.
pub(super) fn build(context: &AgentContext, dependencies: MembershipDependencies) -> Part<Membership> {
    let MembershipDependencies {
        join_addresses,
        advertise,
        zone,
        key_file,
        peers_file,
        transfer,
        mesh,
        mesh_status,
        gossip_port,
        admission,
        cluster,
        store,
        downloads,
        outages,
        admitted_peers,
        mesh_events,
        own_zone,
        image_records,
        images,
        store_ready,
        udp_ready,
    } = dependencies;
    let AgentContext { node, peer: _, policy: _, options: _, inventory, tracker: _, metrics } = context.clone();
    let mut tasks = Tasks::default();

    let mesh: Arc<dyn MeshCommands> = Arc::new(mesh);
    let volatile_items = VolatileItems { outages, fetching: downloads.announced() };
    let announcer =
        Announcer::new(store, Arc::clone(&mesh), metrics.clone(), store_ready, volatile_items, image_records, images);
    tasks.add("announce", |stop| announcer.run(stop));

    let listen_address = transfer.local_addr();
    let introducer = Introducer {
        mesh: Arc::clone(&mesh),
        admission,
        cluster: Arc::clone(&cluster) as _,
        zone,
        own_zone,
        address: advertise.or(Some(listen_address.ip()).filter(|address| !address.is_unspecified())),
        observed_address: transfer.observed_address(),
        transfer_port: listen_address.port(),
        gossip_port,
    };
    tasks.add("introduce", |stop| introducer.run(stop));

    let (bootstrap_addresses_in, bootstrap_addresses) = watch::channel(Vec::new());
    let (shared_key_in, shared_key) = watch::channel(None);
    let joiner = Joiner {
        bootstrap_names: join_addresses,
        resolver: Arc::new(SystemDnsResolver),
        peers_file,
        dialer: Arc::new(transfer.clone()),
        transfer_port: listen_address.port(),
        mesh,
        mesh_status: Arc::clone(&mesh_status),
        inventory: inventory.clone(),
        metrics: metrics.clone(),
        bootstrap_addresses: bootstrap_addresses_in,
        shared_key: shared_key_in,
    };
    tasks.add("join", |stop| joiner.run(admitted_peers, mesh_events, stop));

    let connected = transfer.shared_key();
    let udp_watch = UdpWatch {
        prober: Arc::new(transfer),
        transfer_port: listen_address.port(),
        mesh_status,
        inventory,
        bootstrap_addresses,
        ready: udp_ready,
        metrics: metrics.clone(),
    };
    tasks.add("UDP", |stop| udp_watch.run(stop));

    let (clock_in, clock) = watch::channel(None);
    let clock_watch = ClockWatch { cluster: Arc::clone(&cluster) as _, node: node.clone(), status: clock_in, metrics };
    tasks.add("clock", |stop| clock_watch.run(stop));

    let shared_key_watch = SharedKeyWatch { cluster, node, key_file, connected, introduced: shared_key };
    tasks.add("shared key", |stop| shared_key_watch.run(stop));
    Part { handle: Membership { clock }, tasks }
}
