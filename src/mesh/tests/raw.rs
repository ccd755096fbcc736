//! A peer that sends any libp2p message that a test needs.

use std::future::Future;

use libp2p::gossipsub;
use libp2p::request_response;
use libp2p::swarm::dial_opts::DialOpts;

use super::node::{LIFE, within_deadline};
use super::*;
use crate::decide::gossip::CredentialVerifier;
use crate::identity::libp2p_peer_id;
use crate::mesh::stack::{Behaviour, BehaviourEvent};
use crate::model::{Introduction, LogEntry, LogHead, Profile, SyncReply, changes_digest, state_digest};
use crate::wire;

/// The bare libp2p stack, driven by the test. The peer answers each sync request with `Busy`.
pub(super) struct RawPeer {
    identity: Identity,
    pub(super) crypto: GossipCrypto,
    pub(super) swarm: libp2p::Swarm<Behaviour>,
    address: SocketAddr,
}

impl RawPeer {
    /// Starts a peer that allows connections from this node.
    pub(super) async fn start(node: &MeshTestNode) -> Self {
        let identity = Identity::generate();
        let mut swarm =
            stack::build(&identity.keypair(), &TaskTracker::new(), &Metrics::new(), Versions::GOSSIP).unwrap();
        let port = bind(&mut swarm, ([127, 0, 0, 1], 0).into()).await.unwrap();
        swarm.behaviour_mut().admitted.allow_peer(libp2p_peer_id(node.id()));
        let crypto = GossipCrypto::new(identity.keypair(), Arc::new(DenyListAdmission::default()));
        Self { identity, crypto, swarm, address: ([127, 0, 0, 1], port).into() }
    }

    /// Starts a peer that the node has admitted, with gossip ready.
    pub(super) async fn admitted_by(node: &MeshTestNode) -> Self {
        let mut raw = Self::start(node).await;
        node.mesh.admit(raw.peer(), LIFE).await;
        raw.until("the node subscribes", |event| match event {
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(gossipsub::Event::Subscribed { .. })) => Some(()),
            _ => None,
        })
        .await;
        raw
    }

    /// Starts a peer whose introduction the node has received.
    pub(super) async fn introduced_to(node: &MeshTestNode) -> Self {
        let mut raw = Self::admitted_by(node).await;
        let introduction = raw.introduction(1);
        raw.publish(&Gossip::Introduction(introduction));
        let id = raw.id();
        raw.while_driven(node.until_up(id)).await;
        raw
    }

    pub(super) fn id(&self) -> PeerId {
        self.identity.peer_id()
    }

    pub(super) fn peer(&self) -> Peer {
        let node = "raw".parse().unwrap();
        Peer { id: self.id(), node, zone: None, transfer: self.address, gossip: self.address }
    }

    pub(super) fn introduction(&self, version: u64) -> Introduction {
        introduction_of(&self.crypto, self.peer(), version)
    }

    /// The first entry of the publisher's log, signed with this peer's key.
    pub(super) fn entry(&self, publisher: PeerId, epoch: u64, item: InventoryItem) -> LogEntry {
        let changes = vec![InventoryChange::Added(item.clone())];
        let mut head = LogHead {
            publisher,
            epoch,
            sequence: 1,
            changes: changes_digest(&changes),
            state: state_digest([&item]),
            signature: [0; 64].into(),
        };
        head.signature = self.crypto.sign(&head.signed_bytes());
        LogEntry { head, changes }
    }

    pub(super) fn dial(&mut self, node: &MeshTestNode) {
        let options = DialOpts::peer_id(libp2p_peer_id(node.id())).addresses(vec![multiaddr(node.address)]);
        self.swarm.dial(options.build()).unwrap();
    }

    pub(super) fn publish(&mut self, message: &Gossip) {
        self.publish_bytes(wire::encode(message).unwrap());
    }

    pub(super) fn publish_bytes(&mut self, payload: Vec<u8>) {
        self.swarm.behaviour_mut().gossip.publish(stack::topic(Versions::GOSSIP.current()), payload).unwrap();
    }

    pub(super) fn send_sync_request(&mut self, node: &MeshTestNode, request: Vec<u8>) {
        self.swarm.behaviour_mut().questions.send_request(&libp2p_peer_id(node.id()), request);
    }

    pub(super) fn send_range_request(&mut self, node: &MeshTestNode, request: Vec<u8>) {
        self.swarm.behaviour_mut().ranges.send_request(&libp2p_peer_id(node.id()), request);
    }

    /// Drives the stack until `pick` selects an event.
    pub(super) async fn until<T>(
        &mut self,
        what: &str,
        mut pick: impl FnMut(SwarmEvent<BehaviourEvent>) -> Option<T>,
    ) -> T {
        within_deadline(what, async {
            loop {
                let event = self.next_event().await;
                if let Some(picked) = event.and_then(&mut pick) {
                    return picked;
                }
            }
        })
        .await
    }

    /// Drives the stack until `other` ends.
    pub(super) async fn while_driven<T>(&mut self, other: impl Future<Output = T>) -> T {
        tokio::pin!(other);
        loop {
            tokio::select! {
                done = &mut other => return done,
                _ = self.next_event() => {}
            }
        }
    }

    async fn next_event(&mut self) -> Option<SwarmEvent<BehaviourEvent>> {
        match self.swarm.select_next_some().await {
            SwarmEvent::Behaviour(BehaviourEvent::Questions(request_response::Event::Message {
                message: request_response::Message::Request { channel, .. },
                ..
            })) => {
                let _ = self.swarm.behaviour_mut().questions.send_response(channel, SyncReply::Busy);
                None
            }
            event => Some(event),
        }
    }
}

/// A signed introduction of the owner of `keys`.
pub(super) fn introduction_of(crypto: &GossipCrypto, peer: Peer, version: u64) -> Introduction {
    let Peer { id, node, zone, transfer, gossip } = peer;
    let release = "0.0.1".parse().unwrap();
    let profile = Profile { peer: id, epoch: 1, version, node, zone, release, transfer, gossip };
    let mut introduction = Introduction { profile, credential: Credential::default(), signature: [0; 64].into() };
    introduction.signature = crypto.sign(&introduction.signed_bytes());
    introduction
}
