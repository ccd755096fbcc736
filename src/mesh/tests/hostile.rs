//! A mesh with a misbehaving peer that uses libp2p directly.

use tokio_util::sync::CancellationToken;

use super::node::{LIFE, within_deadline};
use super::raw::introduction_of;
use super::*;
use crate::model::SyncRequest;
use crate::ports::MembershipEvent;
use crate::util::token_bucket::Rate;
use crate::wire::{self, Message};

const MAJOR: u8 = Versions::GOSSIP.current().version().major;
const MINOR: u8 = Versions::GOSSIP.current().version().minor;

#[tokio::test]
async fn a_peer_that_is_not_admitted_is_disconnected_before_any_stream_is_open() {
    let (a, b) = connected_pair().await;
    let mut intruder = RawPeer::start(&a).await;
    intruder.dial(&a);
    intruder
        .until("the intruder is disconnected", |event| match event {
            SwarmEvent::ConnectionClosed { .. } | SwarmEvent::OutgoingConnectionError { .. } => Some(()),
            SwarmEvent::Behaviour(event) => panic!("no stream may be open: {event:?}"),
            _ => None,
        })
        .await;
    a.announce(blob("after")).await;
    b.until_provides(a.id(), blob("after")).await;
    assert_eq!(a.mesh.status().await.unwrap().members.len(), 1);
}

#[tokio::test]
async fn a_relayed_introduction_is_rejected_where_its_credential_is_rejected() {
    let network = TestNetwork::default();
    let intruder = Identity::generate();
    let admission = DenyListAdmission([intruder.peer_id()].into());
    let a =
        MeshTestNode::start_with(NodeOptions { admission, network: network.clone(), ..NodeOptions::default() }).await;
    let b = MeshTestNode::start(&network).await;
    let c = MeshTestNode::start_with(NodeOptions {
        identity: intruder,
        network: network.clone(),
        ..NodeOptions::default()
    })
    .await;
    network.block(a.id(), c.id());
    network.connect(a.id(), b.id()).await;
    network.connect(b.id(), c.id()).await;
    c.announce(blob("smuggled")).await;
    b.until_provides(c.id(), blob("smuggled")).await;
    b.announce(blob("honest")).await;
    a.until_provides(b.id(), blob("honest")).await;
    assert!(a.providers(blob("smuggled")).is_empty());
    assert_eq!(*a.peers_up.lock(), [b.id()]);
}

#[tokio::test]
async fn a_neighbor_that_forges_entries_of_another_peer_is_banned_at_last() {
    let (a, b) = connected_pair().await;
    b.announce(blob("real")).await;
    a.until_provides(b.id(), blob("real")).await;
    let epoch = b.mesh.status().await.unwrap().epoch;
    let mut forger = RawPeer::introduced_to(&a).await;
    for text in ["forged once", "forged twice", "forged again"] {
        let entry = forger.entry(b.id(), epoch, InventoryItem::Blob(blob(text)));
        forger.publish(&Gossip::Entry(entry));
    }
    forger
        .until("the forger is disconnected", |event| {
            matches!(event, SwarmEvent::ConnectionClosed { num_established: 0, .. }).then_some(())
        })
        .await;
    assert!(a.has_counted_rejection("forged") && a.has_counted_fault("forged"));
    assert!(a.has_counted("lighterman_peer_bans_total 1\n"));
    a.until("the forger is down", |inventory| inventory.peers().len() == 1).await;
    assert!(a.providers(blob("forged once")).is_empty());
    assert!(!b.has_counted_rejection("forged"), "the forged entry is not relayed");
    b.announce(blob("honest")).await;
    a.until_provides(b.id(), blob("honest")).await;
}

#[tokio::test]
async fn malformed_gossip_is_rejected_and_is_a_fault() {
    let (a, b) = connected_pair().await;
    for (fault, payload) in [("malformed", malformed()), ("oversized", oversized(Gossip::LIMIT))] {
        let mut culprit = RawPeer::introduced_to(&a).await;
        culprit.publish_bytes(payload);
        culprit
            .while_driven(a.until_counted(fault, |a| a.has_counted_rejection(fault) && a.has_counted_fault(fault)))
            .await;
        assert!(!b.has_counted_rejection(fault), "the message is not relayed");
    }
}

/// A frame of the current version with a malformed message.
fn malformed() -> Vec<u8> {
    [&[0, 0, 0, 8, MAJOR, MINOR][..], &[0xff; 8]].concat()
}

/// A frame with a message longer than `limit`.
fn oversized(limit: usize) -> Vec<u8> {
    let length = limit + 1;
    let mut frame = u32::try_from(length).unwrap().to_be_bytes().to_vec();
    frame.extend_from_slice(&[MAJOR, MINOR]);
    frame.resize(frame.len() + length, 0);
    frame
}

#[tokio::test]
async fn a_message_of_another_release_is_ignored_and_is_no_fault() {
    let (a, _b) = connected_pair().await;
    let mut other = RawPeer::introduced_to(&a).await;
    let mut next = wire::encode(&Gossip::Introduction(other.introduction(2))).unwrap();
    next[5] = MINOR + 1;
    let mut appended = next.clone();
    // An unknown variant.
    next[6] = 99;
    let mut major = next.clone();
    major[4] = MAJOR + 1;
    appended.extend_from_slice(b"a field more");
    let length = u32::try_from(appended.len() - 6).unwrap();
    appended[..4].copy_from_slice(&length.to_be_bytes());
    for payload in [next, major, appended] {
        other.publish_bytes(payload);
    }
    other.while_driven(a.until_counted("unknown", |a| a.has_counted_rejection("unknown"))).await;
    other.while_driven(a.until_counted("version", |a| a.has_counted_rejection("other_version"))).await;
    let entry = other.entry(other.id(), 1, InventoryItem::Blob(blob("sense")));
    other.publish(&Gossip::Entry(entry));
    let id = other.id();
    other.while_driven(a.until_provides(id, blob("sense"))).await;
    assert!(!a.has_counted_fault("malformed") && !a.has_counted_fault("oversized"));
}

#[tokio::test]
async fn gossip_beyond_the_rate_limit_is_dropped_unread() {
    let messages = Rate::per_second(5, 0);
    let limits = NeighborRateLimits { messages, ..NeighborRateLimits::DEFAULT };
    let a = MeshTestNode::start_with(NodeOptions { limits, ..NodeOptions::default() }).await;
    let mut flood = RawPeer::introduced_to(&a).await;
    for version in 2..10 {
        let introduction = flood.introduction(version);
        flood.publish(&Gossip::Introduction(introduction));
    }
    let entry = flood.entry(flood.id(), 1, InventoryItem::Blob(blob("too late")));
    flood.publish(&Gossip::Entry(entry));
    flood.while_driven(a.until_counted("too many", |a| a.has_counted("{reason=\"too_many\"} 5"))).await;
    assert!(a.has_counted_fault("too_many"));
    assert!(a.providers(blob("too late")).is_empty());
}

#[tokio::test]
async fn malformed_long_or_too_many_sync_requests_are_faults() {
    let sync_requests = Rate::per_second(2, 0);
    let a = MeshTestNode::start_with(NodeOptions {
        limits: NeighborRateLimits { sync_requests, ..NeighborRateLimits::DEFAULT },
        ..NodeOptions::default()
    })
    .await;
    let mut culprit = RawPeer::introduced_to(&a).await;
    culprit.send_sync_request(&a, malformed());
    culprit.while_driven(a.until_counted("malformed", |a| a.has_counted_fault("malformed"))).await;
    culprit.send_sync_request(&a, oversized(SyncRequest::LIMIT));
    culprit.while_driven(a.until_counted("oversized", |a| a.has_counted_fault("oversized"))).await;
    for _ in 0..2 {
        culprit.send_sync_request(&a, wire::encode(&SyncRequest::Compare(Vec::new())).unwrap());
    }
    culprit.while_driven(a.until_counted("too many", |a| a.has_counted_fault("too_many"))).await;
}

#[tokio::test]
async fn an_agent_that_reads_events_slowly_can_still_announce_and_loses_no_event() {
    let identity = Identity::generate();
    let inventory = SharedInventory::default();
    let (mesh, task, address) = start(
        Config { listen: ([127, 0, 0, 1], 0).into() },
        "slow".parse().unwrap(),
        &identity,
        inventory.clone(),
        Arc::new(DenyListAdmission::default()),
        Metrics::new(),
    )
    .await
    .unwrap();
    let (sender, mut events) = mpsc::channel(1);
    let stop = CancellationToken::new();
    let task = tokio::spawn(task.run(sender, stop.clone()));
    mesh.introduce(Credential::default(), address, address, None).await;
    let (peers_up, network) = (Arc::default(), TestNetwork::default());
    let (name, shared_key) = ("slow".parse().unwrap(), watch::channel(None).1);
    let metrics = Metrics::new();
    let node =
        MeshTestNode { name, identity, mesh, address, metrics, inventory, network, peers_up, shared_key, stop, task };
    let mut crowd = RawPeer::admitted_by(&node).await;
    // More events than the task queues.
    let members = 100;
    for _ in 0..members {
        let member = Identity::generate();
        let crypto = GossipCrypto::new(member.keypair(), Arc::new(DenyListAdmission::default()));
        let peer = Peer { id: member.peer_id(), ..crowd.peer() };
        crowd.publish(&Gossip::Introduction(introduction_of(&crypto, peer, 1)));
    }
    crowd.while_driven(node.until("some members are up", |inventory| inventory.peers().len() > 32)).await;
    for number in 0..200usize {
        within_deadline("the announcement is accepted", node.announce(Digest::of(&number.to_le_bytes()))).await;
    }
    assert_eq!(within_deadline("the status", node.mesh.status()).await.unwrap().items, 200);
    let all = async {
        let mut seen = BTreeSet::new();
        while seen.len() < members {
            if let Some(MembershipEvent::Up(peer)) = events.recv().await {
                seen.insert(peer.id);
            }
        }
    };
    crowd.while_driven(within_deadline("all events", all)).await;
}

#[tokio::test]
async fn a_peer_that_does_not_admit_this_agent_is_never_up() {
    let (a, b) = connected_pair().await;
    let mut rejecting_peer = RawPeer::start(&b).await;
    a.mesh.admit(rejecting_peer.peer(), LIFE).await;
    // Twice, so that the first attempt has ended on both sides.
    for _ in 0..2 {
        rejecting_peer
            .until("the node is rejected", |event| {
                matches!(event, SwarmEvent::IncomingConnectionError { .. }).then_some(())
            })
            .await;
    }
    b.announce(blob("meanwhile")).await;
    a.until_provides(b.id(), blob("meanwhile")).await;
    assert_eq!(*a.peers_up.lock(), [b.id()]);
}
