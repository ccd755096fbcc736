//! A mesh against a peer that speaks libp2p but not always sense.

use libp2p::gossipsub;
use libp2p::request_response;
use libp2p::swarm::dial_opts::DialOpts;

use super::*;
use crate::identity::libp2p_peer_id;
use crate::mesh::stack::{Behaviour, BehaviourEvent};
use crate::wire::{self, Announcement, Snapshot};

/// The bare stack, for the test to drive.
struct Raw {
    identity: Identity,
    swarm: libp2p::Swarm<Behaviour>,
    address: SocketAddr,
    /// Requests for a snapshot that wait for an answer.
    requests: Vec<request_response::ResponseChannel<bytes::Bytes>>,
}

impl Raw {
    /// One that lets this node connect.
    async fn start(node: &Node) -> Self {
        let identity = Identity::generate();
        let mut swarm = stack::build(&identity.keypair(), &TaskTracker::new()).unwrap();
        let port = bind(&mut swarm, ([127, 0, 0, 1], 0).into()).await.unwrap();
        swarm.behaviour_mut().admitted.allow_peer(libp2p_peer_id(node.id()));
        Self { identity, swarm, address: ([127, 0, 0, 1], port).into(), requests: Vec::new() }
    }

    fn peer(&self) -> Peer {
        let node = "raw".parse().unwrap();
        Peer { id: self.identity.peer_id(), node, transfer: self.address, gossip: self.address }
    }

    /// Drives it until an event is the one. Requests for a snapshot are put aside.
    async fn until<T>(&mut self, what: &str, mut pick: impl FnMut(SwarmEvent<BehaviourEvent>) -> Option<T>) -> T {
        soon(what, async {
            loop {
                let event = self.turn().await;
                if let Some(picked) = event.and_then(&mut pick) {
                    return picked;
                }
            }
        })
        .await
    }

    async fn turn(&mut self) -> Option<SwarmEvent<BehaviourEvent>> {
        match self.swarm.select_next_some().await {
            SwarmEvent::Behaviour(BehaviourEvent::Snapshots(request_response::Event::Message {
                message: request_response::Message::Request { channel, .. },
                ..
            })) => {
                self.requests.push(channel);
                None
            }
            event => Some(event),
        }
    }

    async fn until_subscribed(&mut self) {
        self.until("the node subscribes", |event| match event {
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(gossipsub::Event::Subscribed { .. })) => Some(()),
            _ => None,
        })
        .await;
    }

    /// Waits until it is asked for a snapshot, and answers.
    async fn answer(&mut self, snapshot: Snapshot) {
        soon("the node asks for a snapshot", async {
            while self.requests.is_empty() {
                self.turn().await;
            }
        })
        .await;
        let channel = self.requests.remove(0);
        let encoded = wire::encode(&snapshot).unwrap().into();
        self.swarm.behaviour_mut().snapshots.send_response(channel, encoded).unwrap();
    }

    fn publish(&mut self, payload: Vec<u8>) {
        self.swarm.behaviour_mut().gossip.publish(stack::topic(), payload).unwrap();
    }

    /// Goes on by itself until the test ends.
    fn release(mut self) -> JoinSet<()> {
        let mut driver = JoinSet::new();
        driver.spawn(async move {
            loop {
                self.turn().await;
            }
        });
        driver
    }
}

#[tokio::test]
async fn a_stranger_cannot_connect() {
    let (mut a, mut b) = two().await;
    let mut stranger = Raw::start(&a).await;
    let options = DialOpts::peer_id(libp2p_peer_id(a.id())).addresses(vec![multiaddr(a.address)]);
    stranger.swarm.dial(options.build()).unwrap();
    stranger
        .until("the stranger is thrown out", |event| match event {
            SwarmEvent::ConnectionClosed { .. } | SwarmEvent::OutgoingConnectionError { .. } => Some(()),
            SwarmEvent::Behaviour(event) => panic!("no stream may be open: {event:?}"),
            _ => None,
        })
        .await;
    a.announce(blob("after")).await;
    b.until_holds(a.id(), blob("after")).await;
    b.announce(blob("reply")).await;
    a.until_holds(b.id(), blob("reply")).await;
    assert_eq!(a.inventory.peers().len(), 1);
}

#[tokio::test]
async fn garbage_from_an_admitted_peer_is_refused_and_disturbs_nobody() {
    let (mut a, mut b) = two().await;
    let mut culprit = Raw::start(&a).await;
    a.mesh.admit(culprit.peer()).await;
    culprit.until_subscribed().await;
    let changes = vec![ContentChange::BlobAdded(blob("x")); wire::MAX_CHANGES + 1];
    let too_many = wire::encode(&Announcement { epoch: 1, sequence: 1, changes }).unwrap();
    let mut newer = too_many.clone();
    newer[5] = 9;
    for payload in [too_many[..20].to_vec(), too_many, newer] {
        culprit.publish(payload);
    }
    let items = vec![ContentChange::BlobRemoved(blob("x"))];
    culprit.answer(Snapshot { epoch: 1, sequence: 1, items }).await;
    let culprit = (culprit.peer().id, culprit.release());
    for reason in ["malformed", "too_many_changes", "other_version", "snapshot_malformed"] {
        a.until_refused(reason).await;
    }
    b.announce(blob("fine")).await;
    a.until_holds(b.id(), blob("fine")).await;
    a.announce(blob("as well")).await;
    b.until_holds(a.id(), blob("as well")).await;
    assert_eq!(a.inventory.items_of(culprit.0), 0);
    assert!(a.inventory.node_of(culprit.0).is_some(), "who may stay is decided elsewhere");
    assert!(!b.has_refused("malformed") && !b.has_refused("unknown_author"), "it is not forwarded");
}

#[tokio::test]
async fn a_gap_is_repaired_by_asking_the_publisher() {
    let mut a = Node::start().await;
    let mut publisher = Raw::start(&a).await;
    let id = publisher.peer().id;
    a.mesh.admit(publisher.peer()).await;
    publisher.until_subscribed().await;
    publisher.answer(Snapshot { epoch: 1, sequence: 0, items: vec![] }).await;
    // The first never was sent, the third arrives before the answer that covers both.
    for sequence in [2, 4] {
        let changes = vec![ContentChange::BlobAdded(blob(&sequence.to_string()))];
        publisher.publish(wire::encode(&Announcement { epoch: 1, sequence, changes }).unwrap());
    }
    let items = ["1", "2", "3"].map(|text| ContentChange::BlobAdded(blob(text))).to_vec();
    publisher.answer(Snapshot { epoch: 1, sequence: 3, items }).await;
    let _publisher = publisher.release();
    a.until("nothing is missing", |inventory| inventory.items_of(id) == 4).await;
    assert_eq!(a.inventory.holders(blob("4")), [id]);
}

#[tokio::test]
async fn who_subscribes_is_told_how_far_the_publisher_is() {
    let a = Node::start().await;
    let mut listener = Raw::start(&a).await;
    a.mesh.admit(listener.peer()).await;
    let mark = listener
        .until("an announcement of nothing", |event| match event {
            SwarmEvent::Behaviour(BehaviourEvent::Gossip(gossipsub::Event::Message { message, .. })) => {
                Some(wire::decode::<Announcement>(&message.data).unwrap())
            }
            _ => None,
        })
        .await;
    assert_eq!((mark.sequence, mark.changes), (1, vec![]));
}

#[tokio::test]
async fn a_peer_that_does_not_admit_us_is_never_taken_for_up() {
    let (mut a, b) = two().await;
    let mut aloof = Raw::start(&b).await;
    a.mesh.admit(aloof.peer()).await;
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
    assert_eq!(a.ups, [b.id()]);
}
