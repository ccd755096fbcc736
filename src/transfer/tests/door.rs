//! Who gets in, and what is done for those who do not.

use quinn::ConnectionError;

use super::content::introduce;
use super::*;
use crate::transfer::GreetError;
use crate::transfer::codes::{DONE, PROTOCOL, REFUSED};

#[tokio::test]
async fn both_ends_know_each_other_after_a_greeting() {
    within(async {
        let (mut listener, dialler) = (Node::start(Shelf::default()), Node::start(Shelf::default()));
        let met = dialler.meet(listener.address()).await;
        assert_eq!((met.id, met.transfer), (listener.id, listener.address()));
        assert_eq!((met.gossip.port(), met.node.as_str()), (4001, "node-a"));
        let joined = listener.joined.recv().await.unwrap();
        assert_eq!((joined.id, joined.transfer), (dialler.id, dialler.address()), "where it can be dialled");
        assert_eq!((dialler.transfer.peers(), listener.transfer.peers()), (vec![met], vec![joined]));
        dialler.meet(listener.address()).await;
        assert!(listener.joined.try_recv().is_err(), "a connected peer is not greeted again");
    })
    .await;
}

#[tokio::test]
async fn an_ipv4_peer_of_a_dual_stack_agent_is_known_by_its_plain_address() {
    within(async {
        let (key, blob) = (Identity::generate(), blob(10));
        let mut dual = Node::start_at("[::]:0", &key, Shelf::default(), Guests::default(), Limits::DEFAULT);
        let plain = Node::start(Shelf::with(&blob));
        plain.meet(SocketAddr::from(([127, 0, 0, 1], dual.address().port()))).await;
        let joined = dual.joined.recv().await.unwrap();
        assert_eq!(joined.transfer, plain.address());
        assert_eq!(joined.gossip, SocketAddr::from(([127, 0, 0, 1], 4001)));
        dual.fetch(plain.id, Digest::of(&blob), 10).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_stranger_is_refused_with_a_reason_and_served_nothing() {
    within(async {
        let secret = blob(1000);
        let me = Identity::generate();
        let admission = Guests::only([]);
        let listener = Node::start_with(&me, Shelf::with(&secret), admission, Limits::DEFAULT);
        let stranger = Node::start(Shelf::default());
        let error = stranger.transfer.greet(listener.address(), None).await.unwrap_err();
        let GreetError::Refused { peer, reason, .. } = &error else { panic!("{error}") };
        assert_eq!((*peer, reason.as_str()), (listener.id, "not admitted: not on the list"));
        assert!(stranger.transfer.peers().is_empty() && listener.transfer.peers().is_empty());
        assert!(listener.metric(r#"admissions_total{result="denied"} 1"#));
        assert!(listener.metric("served_bytes_total 0"));
    })
    .await;
}

#[tokio::test]
async fn a_request_instead_of_an_introduction_ends_the_connection() {
    within(async {
        let secret = blob(1000);
        let listener = Node::start(Shelf::with(&secret));
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = endpoint.connect(listener.address(), "lighterman").unwrap().await.unwrap();
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        wire::write(&mut send, &Request::Get { digest: Digest::of(&secret), offset: 0, length: 1000 }).await.unwrap();
        send.finish().unwrap();
        assert!(recv.read_to_end(4096).await.is_err());
        assert_closed_with(&connection, PROTOCOL, "a request").await;
        assert!(listener.metric("served_bytes_total 0"));
    })
    .await;
}

#[tokio::test]
async fn streams_beside_the_introduction_are_not_served() {
    within(async {
        let secret = blob(1000);
        let limits = Limits { hello: BRIEF, ..Limits::DEFAULT };
        let me = Identity::generate();
        let listener = Node::start_with(&me, Shelf::with(&secret), Guests::default(), limits);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = endpoint.connect(listener.address(), "lighterman").unwrap().await.unwrap();
        let (mut first, _keep) = connection.open_bi().await.unwrap();
        first.write_all(&[0]).await.unwrap();
        // The door allows one stream: the second is not even opened before the first one's time is up.
        tokio::select! {
            second = connection.open_bi() => assert!(second.is_err()),
            _ = connection.closed() => {}
        }
        connection.closed().await;
        assert!(listener.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn garbage_and_oversized_introductions_end_the_connection() {
    within(async {
        let listener = Node::start(Shelf::default());
        let current = Versions::TRANSFER.current().version();
        let version = [current.major, current.minor];
        let garbage = [&[0, 0, 0, 4], &version[..], &[0xff; 4]].concat();
        let oversized = [&[0, 1, 0, 0], &version[..], &[0; 4096]].concat();
        let other_version = [0, 0, 0, 0, 9, 9].to_vec();
        let nothing = Vec::new();
        for (what, bytes) in [("garbage", garbage), ("size", oversized), ("version", other_version), ("end", nothing)] {
            let endpoint = bare_endpoint(&Identity::generate());
            let connection = endpoint.connect(listener.address(), "lighterman").unwrap().await.unwrap();
            let (mut send, _recv) = connection.open_bi().await.unwrap();
            // It may be refused before all of it is written.
            let _ = send.write_all(&bytes).await;
            let _ = send.finish();
            assert_closed_with(&connection, PROTOCOL, what).await;
        }
        assert!(listener.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn nobody_is_met_at_an_address_where_another_key_answers() {
    within(async {
        let (listener, dialler) = (Node::start(Shelf::default()), Node::start(Shelf::default()));
        let expected = Identity::generate().peer_id();
        let error = dialler.transfer.greet(listener.address(), Some(expected)).await.unwrap_err();
        assert!(
            matches!(error, GreetError::AnotherKey { expected: e, found, .. } if (e, found) == (expected, listener.id)),
            "{error}"
        );
        assert!(dialler.transfer.peers().is_empty() && listener.transfer.peers().is_empty(), "nothing was said");
        dialler.transfer.greet(listener.address(), Some(listener.id)).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_admits_us_and_that_we_do_not_admit_is_not_used() {
    within(async {
        let listener = Node::start(Shelf::default());
        let admission = Guests::only([]);
        let dialler = Node::start_with(&Identity::generate(), Shelf::default(), admission, Limits::DEFAULT);
        let error = dialler.transfer.greet(listener.address(), None).await.unwrap_err();
        assert!(matches!(error, GreetError::NotAdmitted { peer, .. } if peer == listener.id), "{error}");
        assert!(dialler.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_refuses_us_later_is_not_admitting() {
    within(async {
        let (key, blob) = (Identity::generate(), blob(10));
        let fetcher = Node::start(Shelf::default());
        // It dials us, so we know it, but it does not let us in.
        let shut = Guests::only([fetcher.id]);
        let holder = Node::start_with(&key, Shelf::with(&blob), shut, Limits::DEFAULT);
        holder.meet(fetcher.address()).await;
        fetcher.fetch(holder.id, Digest::of(&blob), 10).await.unwrap();

        let stranger = Node::start(Shelf::default());
        let known = Peer { id: holder.id, transfer: holder.address(), ..fetcher.transfer.peers()[0].clone() };
        stranger.transfer.0.peers.remember(&known, standing()).unwrap();
        let error = stranger.fetch(holder.id, Digest::of(&blob), 10).await.unwrap_err();
        assert!(matches!(error, FetchError::NotAdmitted { peer, .. } if peer == holder.id), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_is_not_served_after_its_verdict_and_comes_back_with_another() {
    within(async {
        let (me, blob) = (Identity::generate(), blob(10));
        let guests = Guests::default();
        *guests.life.lock().unwrap() = Duration::ZERO;
        let holder = Node::start_with(&me, Shelf::with(&blob), guests.clone(), Limits::DEFAULT);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = introduce(&endpoint, holder.address()).await;
        let shared = &holder.transfer.0;
        let until = || shared.peers.overdue(Duration::MAX).pop().map(|(_, standing)| standing.until);
        while until().is_none() {
            tokio::task::yield_now().await;
        }
        let first = until().unwrap();
        *guests.again.lock().unwrap() = Err(Refusal::Denied("expired".into()));
        shared.end_verdicts(first + LEEWAY);
        assert!(connection.close_reason().is_none(), "clocks may differ");
        *guests.again.lock().unwrap() = Ok(());
        *guests.life.lock().unwrap() = Duration::from_secs(3600);
        let over = || shared.end_verdicts(until().unwrap() + LEEWAY + BRIEF);
        over();
        assert!(connection.close_reason().is_none(), "what it showed is still good");
        assert!(until().unwrap() > first + LEEWAY);
        *guests.again.lock().unwrap() = Err(Refusal::CannotTell("soon".into()));
        over();
        assert!(connection.close_reason().is_none(), "it is being asked for");
        *guests.again.lock().unwrap() = Err(Refusal::Denied("expired".into()));
        over();
        assert_closed_with(&connection, DONE, "its verdict is over").await;
        introduce(&endpoint, holder.address()).await;
    })
    .await;
}

#[tokio::test]
async fn a_new_credential_is_shown_on_a_new_connection() {
    within(async {
        let blob = blob(10);
        let mut holder = Node::start(Shelf::with(&blob));
        let guests = Guests::default();
        let fetcher = Node::start_with(&Identity::generate(), Shelf::default(), guests.clone(), Limits::DEFAULT);
        fetcher.meet(holder.address()).await;
        fetcher.fetch(holder.id, Digest::of(&blob), 10).await.unwrap();
        holder.joined.recv().await.unwrap();
        guests.renewals.send_modify(|renewals| *renewals += 1);
        // Until it has been seen, the old connection serves.
        while holder.joined.try_recv().is_err() {
            fetcher.fetch(holder.id, Digest::of(&blob), 10).await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_was_never_met_is_dialled_when_it_is_needed() {
    within(async {
        let blob = blob(10);
        let (mut holder, fetcher) = (Node::start(Shelf::with(&blob)), Node::start(Shelf::default()));
        let (node, address) = ("there".parse::<NodeName>().unwrap(), holder.address());
        let known = Peer { id: holder.id, node, zone: None, transfer: address, gossip: address };
        fetcher.transfer.know(&known);
        assert_eq!(fetcher.transfer.admitted_for(holder.id), Duration::ZERO);
        fetcher.fetch(holder.id, Digest::of(&blob), 10).await.unwrap();
        assert_eq!(holder.joined.recv().await.unwrap().id, fetcher.id);
        assert!(fetcher.transfer.admitted_for(holder.id) > Duration::ZERO);

        let other = Peer { id: Identity::generate().peer_id(), ..known };
        fetcher.transfer.know(&other);
        let error = fetcher.fetch(other.id, Digest::of(&blob), 10).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { peer, .. } if peer == other.id), "another key: {error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_is_greeted_again_once_its_verdict_is_over() {
    within(async {
        let guests = Guests::default();
        *guests.life.lock().unwrap() = Duration::ZERO;
        let mut listener = Node::start(Shelf::default());
        let dialler = Node::start_with(&Identity::generate(), Shelf::default(), guests, Limits::DEFAULT);
        for _ in 0..2 {
            dialler.meet(listener.address()).await;
            assert_eq!(listener.joined.recv().await.unwrap().id, dialler.id);
        }
    })
    .await;
}

#[tokio::test]
async fn each_side_hears_where_the_other_sees_it() {
    within(async {
        let (listener, dialler) = (Node::start(Shelf::default()), Node::start(Shelf::default()));
        let (heard_there, heard_here) = (listener.transfer.seen(), dialler.transfer.seen());
        assert_eq!(*heard_here.borrow(), None);
        dialler.meet(listener.address()).await;
        let address = Some(listener.address().ip());
        assert_eq!((*heard_here.borrow(), *heard_there.borrow()), (address, address));
    })
    .await;
}

#[tokio::test]
async fn greeting_oneself_is_noticed() {
    within(async {
        let node = Node::start(Shelf::default());
        let error = node.transfer.greet(node.address(), None).await.unwrap_err();
        assert!(matches!(error, GreetError::Myself(address) if address == node.address()), "{error}");
        assert!(node.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn two_nodes_with_one_key_find_each_other_whoever_dials_and_are_no_peers() {
    within(async {
        let key = Identity::generate();
        let start = |name: &str| {
            let bounds = Bounds { limits: Limits::DEFAULT, rules: None, versions: Versions::TRANSFER };
            let admission = Guests::default();
            Node::start_named(name, "127.0.0.1:0", &key, Shelf::default(), admission, Arc::new(NoPartials), bounds)
        };
        let (listener, dialler) = (start("first"), start("second"));
        let [at_listener, at_dialler] = [&listener, &dialler].map(|node| node.transfer.shared_key());
        let error = dialler.transfer.greet(listener.address(), None).await.unwrap_err();
        assert!(matches!(&error, GreetError::SharedKey { node, .. } if node.as_str() == "first"), "{error}");
        let name = |found: &watch::Receiver<Option<NodeName>>| found.borrow().as_ref().map(ToString::to_string);
        assert_eq!((name(&at_listener), name(&at_dialler)), (Some("second".into()), Some("first".into())));
        assert!(listener.transfer.peers().is_empty() && dialler.transfer.peers().is_empty());

        let alone = Node::start(Shelf::default());
        let error = alone.transfer.greet(alone.address(), None).await.unwrap_err();
        assert!(matches!(error, GreetError::Myself(_)), "{error}");
        assert_eq!(name(&alone.transfer.shared_key()), None, "an agent that dials itself");
    })
    .await;
}

#[tokio::test]
async fn another_agent_with_the_same_key_is_refused() {
    within(async {
        let key = Identity::generate();
        let listener = Node::start_with(&key, Shelf::default(), Guests::default(), Limits::DEFAULT);
        let connection = bare_endpoint(&key).connect(listener.address(), "lighterman").unwrap().await.unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        wire::write(&mut send, &hello()).await.unwrap();
        assert_closed_with(&connection, REFUSED, "the same key").await;
        assert!(listener.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_shows_key_after_key_keeps_two_and_displaces_no_other_pod() {
    within(async {
        let keys: Vec<_> = (0..10).map(|_| Identity::generate()).collect();
        let (agent, other) = (&keys[0], Identity::generate());
        let mut guests = Guests::default();
        guests.pods.extend(keys.iter().map(|key| (key.peer_id(), "stolen".to_owned())));
        guests.pods.insert(other.peer_id(), "other".to_owned());
        let holder = Node::start_with(&Identity::generate(), Shelf::default(), guests, Limits::DEFAULT);
        let address = holder.address();
        let others = introduce(&bare_endpoint(&other), address).await;
        let mut connections = Vec::new();
        for key in &keys {
            let endpoint = bare_endpoint(key);
            let connection = introduce(&endpoint, address).await;
            connections.push((endpoint, connection));
            assert!(holder.transfer.peers().len() <= 3, "two keys of one pod, and the other pod's");
        }
        for (_, connection) in &connections[..8] {
            assert_closed_with(connection, DONE, "its pod showed two keys since").await;
        }
        assert!(connections[8..].iter().all(|(_, connection)| connection.close_reason().is_none()));
        assert!(others.close_reason().is_none(), "another pod's agent");
        // The agent of the pod dials again.
        introduce(&bare_endpoint(agent), address).await;
        let known: HashSet<_> = holder.transfer.peers().into_iter().map(|peer| peer.id).collect();
        assert_eq!(known, [agent.peer_id(), keys[9].peer_id(), other.peer_id()].into());
    })
    .await;
}

#[tokio::test]
async fn an_agent_whose_pod_is_made_anew_keeps_its_key_and_the_old_pod_takes_no_room() {
    within(async {
        let holder = Node::start(Shelf::default());
        let peers = &holder.transfer.0.peers;
        let peer = |key: u8| Peer {
            id: PeerId::from_public_key([key; 32]),
            node: "there".parse().unwrap(),
            zone: None,
            transfer: "127.0.0.1:1".parse().unwrap(),
            gossip: "127.0.0.1:1".parse().unwrap(),
        };
        let in_pod = |pod: &str, until: u64| Standing {
            pod: Some(pod.to_owned()),
            until: Duration::from_secs(until),
            ..standing()
        };
        peers.remember(&peer(1), in_pod("old", 1)).unwrap();
        peers.remember(&peer(1), in_pod("new", 2)).unwrap();
        // A relayed or late credential of the old pod lasts less long and changes nothing.
        peers.remember(&peer(1), in_pod("old", 1)).unwrap();
        peers.remember(&peer(2), in_pod("old", 2)).unwrap();
        peers.remember(&peer(3), in_pod("old", 2)).unwrap();
        assert_eq!(peers.all().len(), 3, "the first key is the new pod's");
        peers.forget(peer(2).id);
        peers.remember(&peer(4), in_pod("old", 2)).unwrap();
        assert_eq!(peers.all().len(), 3, "a forgotten key takes no room");
        peers.remember(&peer(5), in_pod("old", 2)).unwrap();
        let known: HashSet<_> = peers.all().into_iter().map(|peer| peer.id).collect();
        assert_eq!(known, [1, 4, 5].map(|key| peer(key).id).into());
    })
    .await;
}

#[tokio::test]
async fn a_forgotten_peer_is_disconnected_and_may_come_back() {
    within(async {
        let blob = blob(10);
        let (holder, mut fetcher) = (Node::start(Shelf::with(&blob)), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        let outsider = bare_endpoint(&Identity::generate());
        let inbound = introduce(&outsider, fetcher.address()).await;
        let joined = fetcher.joined.recv().await.unwrap();
        fetcher.transfer.forget(joined.id);
        inbound.closed().await;
        fetcher.transfer.forget(holder.id);
        assert!(fetcher.transfer.peers().is_empty());
        let error = fetcher.fetch(holder.id, Digest::of(&blob), 10).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
        holder.meet(fetcher.address()).await;
        fetcher.fetch(holder.id, Digest::of(&blob), 10).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_peers_oldest_connection_makes_room_for_its_fifth() {
    within(async {
        let listener = Node::start(Shelf::default());
        let endpoint = bare_endpoint(&Identity::generate());
        let first = introduce(&endpoint, listener.address()).await;
        let mut others = Vec::new();
        for _ in 0..4 {
            others.push(introduce(&endpoint, listener.address()).await);
        }
        assert_closed_with(&first, crate::transfer::codes::SUPERSEDED, "the oldest").await;
        assert!(others.iter().all(|connection| connection.close_reason().is_none()));
    })
    .await;
}

#[tokio::test]
async fn a_refusal_closes_with_its_code() {
    within(async {
        let (me, admission) = (Identity::generate(), Guests::only([]));
        let listener = Node::start_with(&me, Shelf::default(), admission, Limits::DEFAULT);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = endpoint.connect(listener.address(), "lighterman").unwrap().await.unwrap();
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        wire::write(&mut send, &hello()).await.unwrap();
        assert!(matches!(wire::read(&mut recv).await.unwrap(), Welcome::Refused(_)));
        assert_closed_with(&connection, REFUSED, "a stranger").await;
    })
    .await;
}

async fn assert_closed_with(connection: &Connection, code: VarInt, what: &str) {
    let ended = connection.closed().await;
    assert!(matches!(&ended, ConnectionError::ApplicationClosed(close) if close.error_code == code), "{what}: {ended}");
}
