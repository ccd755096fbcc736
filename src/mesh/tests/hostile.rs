//! A mesh against a peer that speaks libp2p but not always sense.

use tokio_util::sync::CancellationToken;

use super::node::{LIFE, soon};
use super::raw::introduction_of;
use super::*;
use crate::mesh::allowance::Rate;
use crate::model::Question;
use crate::wire::{self, Message};

const MAJOR: u8 = Versions::GOSSIP.current().version().major;
const MINOR: u8 = Versions::GOSSIP.current().version().minor;

#[tokio::test]
async fn a_stranger_is_thrown_out_before_any_stream_is_open() {
    let (a, b) = two().await;
    let mut stranger = Raw::start(&a).await;
    stranger.dial(&a);
    stranger
        .until("the stranger is thrown out", |event| match event {
            SwarmEvent::ConnectionClosed { .. } | SwarmEvent::OutgoingConnectionError { .. } => Some(()),
            SwarmEvent::Behaviour(event) => panic!("no stream may be open: {event:?}"),
            _ => None,
        })
        .await;
    a.announce(blob("after")).await;
    b.until_holds(a.id(), blob("after")).await;
    assert_eq!(a.mesh.status().await.unwrap().members.len(), 1);
}

#[tokio::test]
async fn who_vouches_for_nobody_believes_no_relayed_introduction() {
    let doors = Doors::default();
    let intruder = Identity::generate();
    let admission = AllBut([intruder.peer_id()].into());
    let a = Node::start_as(Setting { admission, doors: doors.clone(), ..Setting::default() }).await;
    let b = Node::start(&doors).await;
    let c = Node::start_as(Setting { identity: intruder, doors: doors.clone(), ..Setting::default() }).await;
    doors.part(a.id(), c.id());
    doors.greet(a.id(), b.id()).await;
    doors.greet(b.id(), c.id()).await;
    c.announce(blob("smuggled")).await;
    b.until_holds(c.id(), blob("smuggled")).await;
    b.announce(blob("honest")).await;
    a.until_holds(b.id(), blob("honest")).await;
    assert!(a.holders(blob("smuggled")).is_empty());
    assert_eq!(*a.ups.lock().unwrap(), [b.id()]);
}

#[tokio::test]
async fn a_neighbour_that_forges_anothers_entry_is_blamed_and_at_last_banned() {
    let (a, b) = two().await;
    b.announce(blob("real")).await;
    a.until_holds(b.id(), blob("real")).await;
    let epoch = b.mesh.status().await.unwrap().epoch;
    let mut forger = Raw::known_to(&a).await;
    for text in ["forged once", "forged twice", "forged again"] {
        let entry = forger.entry(b.id(), epoch, Item::Blob(blob(text)));
        forger.say(&Gossip::Entry(entry));
    }
    forger
        .until("the forger is thrown out", |event| {
            matches!(event, SwarmEvent::ConnectionClosed { num_established: 0, .. }).then_some(())
        })
        .await;
    assert!(a.has_refused("forged") && a.has_blamed("forged"));
    assert!(a.has_counted("lighterman_peer_bans_total 1\n"));
    a.until("the forger is down", |table| table.peers().len() == 1).await;
    assert!(a.holders(blob("forged once")).is_empty());
    assert!(!b.has_refused("forged"), "it is not passed on");
    b.announce(blob("honest")).await;
    a.until_holds(b.id(), blob("honest")).await;
}

#[tokio::test]
async fn gossip_that_is_no_message_is_refused_and_blamed() {
    let (a, b) = two().await;
    for (fault, payload) in [("malformed", malformed()), ("oversized", oversized(Gossip::LIMIT))] {
        let mut culprit = Raw::known_to(&a).await;
        culprit.publish(payload);
        culprit.while_driven(a.until_counted(fault, |a| a.has_refused(fault) && a.has_blamed(fault))).await;
        assert!(!b.has_refused(fault), "it is not passed on");
    }
}

/// A frame of our own release with nothing of ours inside.
fn malformed() -> Vec<u8> {
    [&[0, 0, 0, 8, MAJOR, MINOR][..], &[0xff; 8]].concat()
}

/// A frame of a message that is longer than its kind may be.
fn oversized(limit: usize) -> Vec<u8> {
    let length = limit + 1;
    let mut frame = u32::try_from(length).unwrap().to_be_bytes().to_vec();
    frame.extend_from_slice(&[MAJOR, MINOR]);
    frame.resize(frame.len() + length, 0);
    frame
}

#[tokio::test]
async fn what_another_release_says_is_let_be() {
    let (a, _b) = two().await;
    let mut other = Raw::known_to(&a).await;
    let mut next = wire::encode(&Gossip::Introduction(other.introduction(2))).unwrap();
    next[5] = MINOR + 1;
    let mut appended = next.clone();
    // A variant that is none of ours.
    next[6] = 99;
    let mut major = next.clone();
    major[4] = MAJOR + 1;
    appended.extend_from_slice(b"a field more");
    let length = u32::try_from(appended.len() - 6).unwrap();
    appended[..4].copy_from_slice(&length.to_be_bytes());
    for payload in [next, major, appended] {
        other.publish(payload);
    }
    other.while_driven(a.until_counted("unknown", |a| a.has_refused("unknown"))).await;
    other.while_driven(a.until_counted("version", |a| a.has_refused("other_version"))).await;
    let entry = other.entry(other.id(), 1, Item::Blob(blob("sense")));
    other.say(&Gossip::Entry(entry));
    let id = other.id();
    other.while_driven(a.until_holds(id, blob("sense"))).await;
    assert!(!a.has_blamed("malformed") && !a.has_blamed("oversized"));
}

#[tokio::test]
async fn more_gossip_than_a_neighbour_may_send_is_dropped_unread() {
    let messages = Rate { burst: 5.0, per_second: 0.0 };
    let limits = Limits { messages, ..Limits::DEFAULT };
    let a = Node::start_as(Setting { limits, ..Setting::default() }).await;
    let mut flood = Raw::known_to(&a).await;
    for version in 2..10 {
        let introduction = flood.introduction(version);
        flood.say(&Gossip::Introduction(introduction));
    }
    let entry = flood.entry(flood.id(), 1, Item::Blob(blob("too late")));
    flood.say(&Gossip::Entry(entry));
    flood.while_driven(a.until_counted("too many", |a| a.has_counted("{reason=\"too_many\"} 5"))).await;
    assert!(a.has_blamed("too_many"));
    assert!(a.holders(blob("too late")).is_empty());
}

#[tokio::test]
async fn questions_that_are_none_or_too_long_or_too_many_are_blamed() {
    let questions = Rate { burst: 2.0, per_second: 0.0 };
    let a = Node::start_as(Setting { limits: Limits { questions, ..Limits::DEFAULT }, ..Setting::default() }).await;
    let mut culprit = Raw::known_to(&a).await;
    culprit.ask(&a, malformed());
    culprit.while_driven(a.until_counted("malformed", |a| a.has_blamed("malformed"))).await;
    culprit.ask(&a, oversized(Question::LIMIT));
    culprit.while_driven(a.until_counted("oversized", |a| a.has_blamed("oversized"))).await;
    for _ in 0..2 {
        culprit.ask(&a, wire::encode(&Question::Compare(Vec::new())).unwrap());
    }
    culprit.while_driven(a.until_counted("too many", |a| a.has_blamed("too_many"))).await;
}

#[tokio::test]
async fn an_agent_that_is_slow_to_listen_can_still_speak_and_misses_nothing() {
    let identity = Identity::generate();
    let table = Table::default();
    let (mesh, task, address) = start(
        Config { listen: ([127, 0, 0, 1], 0).into() },
        "slow".parse().unwrap(),
        &identity,
        table.clone(),
        Arc::new(AllBut::default()),
        Metrics::new(),
    )
    .await
    .unwrap();
    let (sender, mut news) = mpsc::channel(1);
    let stop = CancellationToken::new();
    let task = tokio::spawn(task.run(sender, stop.clone()));
    mesh.introduce(Credential::default(), address, address, None).await;
    let (ups, doors) = (Arc::default(), Doors::default());
    let (name, shared_key) = ("slow".parse().unwrap(), watch::channel(None).1);
    let metrics = Metrics::new();
    let node = Node { name, identity, mesh, address, metrics, table, doors, ups, shared_key, stop, task };
    let mut crowd = Raw::admitted_by(&node).await;
    // More than the task keeps, each of them news.
    let members = 100;
    for _ in 0..members {
        let member = Identity::generate();
        let keys = Keys::new(member.keypair(), Arc::new(AllBut::default()));
        let peer = Peer { id: member.peer_id(), ..crowd.peer() };
        crowd.say(&Gossip::Introduction(introduction_of(&keys, peer, 1)));
    }
    crowd.while_driven(node.until("some are known", |table| table.peers().len() > 32)).await;
    for number in 0..200usize {
        soon("it is not held up", node.announce(Digest::of(&number.to_le_bytes()))).await;
    }
    assert_eq!(soon("it answers", node.mesh.status()).await.unwrap().items, 200);
    let all = async {
        let mut seen = BTreeSet::new();
        while seen.len() < members {
            if let Some(MeshNews::Up(peer)) = news.recv().await {
                seen.insert(peer.id);
            }
        }
    };
    crowd.while_driven(soon("nothing is lost", all)).await;
}

#[tokio::test]
async fn a_peer_that_does_not_admit_us_is_never_taken_for_up() {
    let (a, b) = two().await;
    let mut aloof = Raw::start(&b).await;
    a.mesh.admit(aloof.peer(), LIFE).await;
    // Twice, so that the first time is over for a as well.
    for _ in 0..2 {
        aloof
            .until("the node is refused", |event| {
                matches!(event, SwarmEvent::IncomingConnectionError { .. }).then_some(())
            })
            .await;
    }
    b.announce(blob("meanwhile")).await;
    a.until_holds(b.id(), blob("meanwhile")).await;
    assert_eq!(*a.ups.lock().unwrap(), [b.id()]);
}
