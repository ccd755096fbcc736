//! The libp2p stack: TCP, noise, yamux, and the protocols on each connection, with every bound that
//! libp2p offers.

use std::error::Error;
use std::fmt::Display;
use std::time::Duration;

use libp2p::allow_block_list::{self, AllowedPeers};
use libp2p::connection_limits::{self, ConnectionLimits};
use libp2p::core::Transport;
use libp2p::core::upgrade::Version;
use libp2p::gossipsub::{
    self, IdentTopic, IdentityTransform, MessageAuthenticity, MessageId, ValidationMode, WhitelistSubscriptionFilter,
};
use libp2p::identity::Keypair;
use libp2p::request_response::{self, ProtocolSupport};
use libp2p::swarm::{NetworkBehaviour, Swarm};
use libp2p::{SwarmBuilder, noise, ping, tcp, yamux};
use tokio_util::task::TaskTracker;

use super::MeshError;
use super::codec::{MeshCodec, MeshProtocol};
use super::metered_stream::MeteredStream;
use super::ranges::{self, RangeCodec};
use crate::decide::gossip::PING_INTERVAL;
use crate::decide::transport_choice::MAX_RANGES_OF_A_PEER;
use crate::metrics::Metrics;
use crate::oci::Digest;
use crate::wire::{FIRST_MAJOR, Format, MAX_GOSSIP, Versions};

/// The protocols on each connection. The first two decide whether the connection may exist, before
/// gossipsub, which keeps state for every connection that reaches gossipsub.
#[derive(NetworkBehaviour)]
pub(super) struct Behaviour {
    pub(super) limits: connection_limits::Behaviour,
    pub(super) admitted: allow_block_list::Behaviour<AllowedPeers>,
    pub(super) ping: ping::Behaviour,
    pub(super) gossip: gossipsub::Behaviour<IdentityTransform, WhitelistSubscriptionFilter>,
    pub(super) questions: request_response::Behaviour<MeshCodec>,
    pub(super) ranges: request_response::Behaviour<RangeCodec>,
}

/// The gossip topic for messages in this format.
pub(super) fn topic(format: Format) -> IdentTopic {
    IdentTopic::new(match format.version().major {
        FIRST_MAJOR => "lighterman/inventory/2".to_owned(),
        major => format!("lighterman/inventory/{major}"),
    })
}

/// Inbound handshakes in flight. Unauthenticated peers can occupy all of them, each for
/// [`HANDSHAKE_TIMEOUT`]; the agent can still dial then.
const MAX_PENDING_INBOUND: u32 = 64;

/// Connections to one peer: one dialed by either side, and two more whose close hangs because the
/// network drops the close.
const MAX_PER_PEER: u32 = 4;

/// Connections in all: ten times as many as gossip needs. A seed or an old node is known to all
/// members, and must not reject new members. Each connection costs some 50 KiB.
const MAX_CONNECTIONS: u32 = 128;

/// Inbound connections: half of all, so that peers alone cannot choose all of an agent's neighbors.
const MAX_INBOUND: u32 = MAX_CONNECTIONS / 2;

/// Deadline for TCP and noise together; across zones the two take milliseconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);

/// Deadline of a sync request: a reply of at most 8 MiB takes some 7 s at 10 Mbit/s.
pub(super) const SYNC_TIMEOUT: Duration = Duration::from_secs(10);

/// No connection lasts as long. libp2p halves a value that exceeds its clock, and logs each time.
const FOREVER: Duration = Duration::from_secs(100 * 365 * 86_400);

/// Sync requests of one peer that are answered at a time: the protocol sends four, and some
/// comparisons beside them.
pub(super) const MAX_ANSWERING: usize = 8;

/// Of [`MAX_ANSWERING`], snapshots, whose replies may have 8 MiB.
pub(super) const MAX_SNAPSHOTS: usize = 2;

/// Snapshots for all peers together: 64 MiB, however slow the readers are. A peer that gets
/// [`Busy`](crate::model::SyncReply::Busy) requests from another neighbor.
pub(super) const MAX_TOTAL_SNAPSHOTS: usize = 8;

/// Streams of sync requests on one connection: those of both sides.
const MAX_SYNC_STREAMS: usize = 2 * MAX_ANSWERING;

/// Deadline of a request for a range. A rate limit leaves a transfer 32 KiB/s or more, at which 256
/// KiB take 8 s; the rest is for the provider's content store.
pub(super) const RANGE_TIMEOUT: Duration = Duration::from_secs(15);

/// Range requests of all neighbors together that are answered at a time. Their responses have 2
/// MiB.
pub(super) const MAX_SERVED_RANGES: usize = 8;

/// Streams of ranges on one connection: those of both sides, and as many again whose end the other
/// side has not seen yet.
const MAX_RANGE_STREAMS: usize = 4 * MAX_RANGES_OF_A_PEER;

/// Streams on one connection: ping, gossip, sync requests and ranges need 28 at most, and
/// negotiation a few more.
const MAX_STREAMS: usize = 40;

/// Messages in the queue to one slow peer: the messages of 256 nodes in a second. Typically a MiB,
/// at most 16. libp2p drops a message that does not fit, and the peer requests the entry later.
const MAX_QUEUED: usize = 256;

/// Heartbeats for which gossipsub lists recent messages to peers, so that a peer requests a missed
/// message: 6 s.
const HISTORY_GOSSIP: usize = 6;

/// Heartbeats for which gossipsub keeps messages for such requests, which may take some seconds.
const HISTORY_LENGTH: usize = 10;

/// Duration for which gossipsub recognizes duplicates. No peer's queue has an older message.
const DUPLICATE_CACHE_TIME: Duration = Duration::from_secs(150);

/// Builds the stack. Its tasks run under `tasks`, and end when the swarm is dropped.
pub(super) fn build(
    keypair: &Keypair,
    tasks: &TaskTracker,
    metrics: &Metrics,
    versions: Versions,
) -> Result<Swarm<Behaviour>, MeshError> {
    let failed = |error: &dyn Display| MeshError::Stack(error.to_string());
    let (tasks, metrics) = (tasks.clone(), metrics.clone());
    let transport = |keypair: &Keypair| -> Result<_, Box<dyn Error + Send + Sync>> {
        let mut multiplexing = yamux::Config::default();
        multiplexing.set_max_num_streams(MAX_STREAMS);
        let tcp = tcp::tokio::Transport::new(tcp::Config::default().nodelay(true));
        Ok(tcp
            .map(move |stream, _| MeteredStream::new(stream, metrics.clone()))
            .upgrade(Version::V1Lazy)
            .authenticate(noise::Config::new(keypair)?)
            .multiplex(multiplexing))
    };
    Ok(SwarmBuilder::with_existing_identity(keypair.clone())
        .with_tokio()
        .with_other_transport(transport)
        .map_err(|error| failed(&error))?
        .with_behaviour(|_| behaviour(versions))
        .map_err(|error| failed(&error))?
        .with_swarm_config(|_| {
            libp2p::swarm::Config::with_executor(move |task| drop(tasks.spawn(task)))
                // A connection without gossip still carries pings, by which the protocol detects
                // that the peer lives.
                .with_idle_connection_timeout(FOREVER)
        })
        .with_connection_timeout(HANDSHAKE_TIMEOUT)
        .build())
}

fn behaviour(versions: Versions) -> Result<Behaviour, Box<dyn Error + Send + Sync>> {
    let limits = ConnectionLimits::default()
        .with_max_pending_incoming(Some(MAX_PENDING_INBOUND))
        .with_max_established_incoming(Some(MAX_INBOUND))
        .with_max_established(Some(MAX_CONNECTIONS))
        .with_max_established_per_peer(Some(MAX_PER_PEER));
    // The protocol counts silence itself. libp2p's own timeout hides the first failure, and then
    // waits up to 10 s for another stream.
    let ping = ping::Config::new().with_interval(PING_INTERVAL).with_timeout(Duration::from_secs(10));
    let sync_config = request_response::Config::default()
        .with_request_timeout(SYNC_TIMEOUT)
        .with_max_concurrent_streams(MAX_SYNC_STREAMS);
    let range_config = request_response::Config::default()
        .with_request_timeout(RANGE_TIMEOUT)
        .with_max_concurrent_streams(MAX_RANGE_STREAMS);
    let protocols = versions.formats().map(|format| (MeshProtocol::of(format), ProtocolSupport::Full));
    Ok(Behaviour {
        limits: connection_limits::Behaviour::new(limits),
        admitted: allow_block_list::Behaviour::default(),
        ping: ping::Behaviour::new(ping),
        gossip: gossip(versions)?,
        questions: request_response::Behaviour::with_codec(MeshCodec(versions), protocols, sync_config),
        ranges: request_response::Behaviour::new([(ranges::protocol(), ProtocolSupport::Full)], range_config),
    })
}

fn gossip_config() -> Result<gossipsub::Config, gossipsub::ConfigBuilderError> {
    gossipsub::ConfigBuilder::default()
        // Every message carries its author's signature, and the task verifies the signature before
        // gossipsub relays the message.
        .validation_mode(ValidationMode::Anonymous)
        .validate_messages()
        // The same message has the same ID, independent of the sender.
        .message_id_fn(|message| MessageId::from(&Digest::of(&message.data).as_bytes()[..20]))
        .duplicate_cache_time(DUPLICATE_CACHE_TIME)
        .flood_publish(false)
        .max_transmit_size(MAX_GOSSIP)
        .heartbeat_interval(Duration::from_secs(1))
        .heartbeat_initial_delay(Duration::from_secs(1))
        .mesh_n(6)
        .mesh_n_low(4)
        .mesh_n_high(12)
        .history_gossip(HISTORY_GOSSIP)
        .history_length(HISTORY_LENGTH)
        .connection_handler_queue_len(MAX_QUEUED)
        .build()
}

fn gossip(
    versions: Versions,
) -> Result<gossipsub::Behaviour<IdentityTransform, WhitelistSubscriptionFilter>, Box<dyn Error + Send + Sync>> {
    // Peers may subscribe to the agent's topics only.
    let topics: Vec<_> = versions.formats().map(topic).collect();
    let filter = WhitelistSubscriptionFilter(topics.iter().map(IdentTopic::hash).collect());
    let mut gossip =
        gossipsub::Behaviour::new_with_subscription_filter(MessageAuthenticity::Anonymous, gossip_config()?, filter)?;
    for topic in &topics {
        gossip.subscribe(topic)?;
    }
    Ok(gossip)
}

#[cfg(test)]
mod tests {
    use libp2p::core::transport::PortUse;
    use libp2p::core::{ConnectedPoint, Endpoint};
    use libp2p::swarm::behaviour::ConnectionEstablished;
    use libp2p::swarm::{ConnectionId, FromSwarm};
    use libp2p::{Multiaddr, PeerId};

    use super::*;

    #[test]
    fn inbound_connections_take_at_most_half_of_all_connections() {
        let mut limits = behaviour(Versions::GOSSIP).unwrap().limits;
        let nowhere = Multiaddr::empty();
        let endpoint = ConnectedPoint::Listener { local_addr: nowhere.clone(), send_back_addr: nowhere.clone() };
        for number in 0..=64 {
            let (connection_id, peer_id) = (ConnectionId::new_unchecked(number), PeerId::random());
            let decided = limits.handle_established_inbound_connection(connection_id, peer_id, &nowhere, &nowhere);
            assert_eq!(decided.is_ok(), number < 64, "connection {number}");
            if decided.is_ok() {
                limits.on_swarm_event(FromSwarm::ConnectionEstablished(ConnectionEstablished {
                    peer_id,
                    connection_id,
                    endpoint: &endpoint,
                    failed_addresses: &[],
                    other_established: 0,
                }));
            }
        }
        let (ours, peer) = (ConnectionId::new_unchecked(65), PeerId::random());
        let decided =
            limits.handle_established_outbound_connection(ours, peer, &nowhere, Endpoint::Dialer, PortUse::New);
        assert!(decided.is_ok(), "the agent can still dial");
    }

    #[test]
    fn a_published_message_is_not_flooded_to_all_neighbors() {
        let config = gossip_config().unwrap();
        assert!(!config.flood_publish());
    }
}
