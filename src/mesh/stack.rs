//! The libp2p stack: TCP, noise, yamux; and what runs on each connection, with every bound that libp2p lets us set.

use std::collections::HashSet;
use std::time::Duration;

use libp2p::allow_block_list::{self, AllowedPeers};
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::gossipsub::{self, IdentTopic, IdentityTransform, MessageAuthenticity, WhitelistSubscriptionFilter};
use libp2p::identity::Keypair;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, Swarm};
use libp2p::{SwarmBuilder, noise, ping, tcp, yamux};
use tokio_util::task::TaskTracker;

use super::MeshError;
use super::codec::{PROTOCOL, SnapshotCodec};

/// What runs on each connection. The first two decide whether it may exist; they stand first because gossipsub keeps
/// something of every connection that reaches it.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) limits: connection_limits::Behaviour,
    pub(super) admitted: allow_block_list::Behaviour<AllowedPeers>,
    pub(super) ping: ping::Behaviour,
    pub(super) gossip: gossipsub::Behaviour<IdentityTransform, WhitelistSubscriptionFilter>,
    pub(super) snapshots: request_response::Behaviour<SnapshotCodec>,
}

/// Where announcements are published.
pub(super) fn topic() -> IdentTopic {
    IdentTopic::new("lighterman/inventory/1")
}

/// Handshakes under way from outside. Strangers can use them up, for [`HANDSHAKE`] each; then we still dial.
const MAX_INCOMING: u32 = 64;

/// Connections to one peer: one dialled by either side, and two more whose closing hangs because the network swallows it.
const MAX_PER_PEER: u32 = 4;

/// How long TCP and noise together may take; across zones they take milliseconds.
const HANDSHAKE: Duration = Duration::from_secs(5);

/// How long a snapshot may take: 8 MiB at most, at 10 Mbit/s.
pub(super) const SNAPSHOT: Duration = Duration::from_secs(10);

/// No connection lasts as long. (libp2p halves what exceeds its clock, and logs each time.)
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Streams of snapshots on one connection: one each way, and as many that are being given up.
const MAX_SNAPSHOT_STREAMS: usize = 4;

/// Streams on one connection: ping, gossip and snapshots need eight at most, and negotiation a few more.
const MAX_STREAMS: usize = 32;

/// Announcements that wait for one slow peer: typically half a MiB, at most 8 MiB. What does not fit is lost to it, and
/// it takes a snapshot.
const MAX_QUEUED: usize = 128;

/// Makes the stack; its tasks run under `tasks` and end when the swarm is dropped.
pub(super) fn build(keypair: &Keypair, tasks: &TaskTracker) -> Result<Swarm<Behaviour>, MeshError> {
    let failed = |error: &dyn std::fmt::Display| MeshError::Stack(error.to_string());
    let tasks = tasks.clone();
    let multiplexing = || {
        let mut config = yamux::Config::default();
        config.set_max_num_streams(MAX_STREAMS);
        config
    };
    Ok(SwarmBuilder::with_existing_identity(keypair.clone())
        .with_tokio()
        .with_tcp(tcp::Config::default().nodelay(true), noise::Config::new, multiplexing)
        .map_err(|error| failed(&error))?
        .with_behaviour(behaviour)
        .map_err(|error| failed(&error))?
        .with_swarm_config(|_| {
            libp2p::swarm::Config::with_executor(move |task| drop(tasks.spawn(task)))
                // A connection that gossip does not use at the moment still carries pings, which tell us that the peer lives.
                .with_idle_connection_timeout(FOREVER)
        })
        .with_connection_timeout(HANDSHAKE)
        .build())
}

fn behaviour(keypair: &Keypair) -> Result<Behaviour, Box<dyn std::error::Error + Send + Sync>> {
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(MAX_INCOMING))
        .with_max_established_per_peer(Some(MAX_PER_PEER));
    // The task counts silent ticks itself. libp2p's own time-out hides the first failure, and then waits up to 10 s for
    // another stream.
    let ping = ping::Config::new().with_interval(Duration::from_secs(1)).with_timeout(Duration::from_secs(10));
    let snapshots = request_response::Config::default()
        .with_request_timeout(SNAPSHOT)
        .with_max_concurrent_streams(MAX_SNAPSHOT_STREAMS);
    Ok(Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        admitted: allow_block_list::Behaviour::default(),
        ping: ping::Behaviour::new(ping),
        gossip: gossip(keypair)?,
        snapshots: request_response::Behaviour::new([(PROTOCOL, ProtocolSupport::Full)], snapshots),
    })
}

fn gossip(
    keypair: &Keypair,
) -> Result<
    gossipsub::Behaviour<IdentityTransform, WhitelistSubscriptionFilter>,
    Box<dyn std::error::Error + Send + Sync>,
> {
    let config = gossipsub::ConfigBuilder::default()
        .validation_mode(gossipsub::ValidationMode::Strict)
        .validate_messages()
        .flood_publish(false)
        // The limit that `wire::Announcement` is made for.
        .max_transmit_size(64 << 10)
        .heartbeat_interval(Duration::from_secs(1))
        .mesh_n(6)
        .mesh_n_low(5)
        .mesh_n_high(12)
        .connection_handler_queue_len(MAX_QUEUED)
        .build()?;
    // Peers may subscribe to our topic and to none of their own invention.
    let filter = WhitelistSubscriptionFilter(HashSet::from([topic().hash()]));
    let authenticity = MessageAuthenticity::Signed(keypair.clone());
    let mut gossip = gossipsub::Behaviour::new_with_subscription_filter(authenticity, config, filter)?;
    gossip.subscribe(&topic())?;
    Ok(gossip)
}
