//! The outputs of the protocol: actions for the driver, and verdicts on gossip messages.

use super::fault::GossipFault;
use std::time::Duration;

use crate::model::{Gossip, NodeName, Peer, PeerId, SyncRequest};

/// The driver's number of a connection, never reused.
pub type MeshConnectionId = u64;

/// The number of a request, from [`Output::Request`] until a reply or a failure.
pub type SyncRequestId = u64;

/// The verdict on a gossip message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GossipVerdict {
    /// Relay the message.
    Accept,
    /// Do not relay the message; no peer is at fault.
    Ignore(&'static str),
    /// Do not relay the message; no honest member sends such a message.
    Reject(GossipFault),
}

/// An action for the driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// Publish a message to the neighbors, which relay the message.
    Publish(Gossip),
    /// Send a request to a neighbor, and report [`super::Protocol::receive_reply`] or
    /// [`super::Protocol::record_request_failure`].
    Request(SyncRequestId, PeerId, SyncRequest),
    /// Verify credentials with this peer in a handshake. [`super::Protocol::admit`],
    /// [`super::Protocol::rejected_by_peer`] or [`super::Protocol::dial_failed`] follows.
    Handshake(Peer),
    /// Connect to an admitted peer. [`super::Protocol::connection_opened`] or
    /// [`super::Protocol::dial_failed`] follows.
    Dial(Peer),
    /// Close this connection.
    Close(MeshConnectionId, PeerId),
    /// Accept connections with this peer from now on.
    Allow(PeerId),
    /// Reject connections with this peer from now on, and close the open ones.
    Deny(PeerId),
    /// The peer can be fetched from. Repeated when the peer moved.
    Up(Peer),
    /// The peer cannot be fetched from, for this reason.
    Down(PeerId, &'static str),
    /// The agent of this node has this agent's key, and signed an introduction with the key.
    SharedKey(NodeName),
    /// A peer did what no honest peer does.
    Fault {
        /// The faulty peer.
        peer: PeerId,
        /// The fault, as a metric's label.
        fault: GossipFault,
        /// Duration of the ban, if this fault led to one.
        banned: Option<Duration>,
    },
}
