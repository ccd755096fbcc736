//! Admission of dialers, and the rejection of others.

use quinn::ConnectionError;

use super::content::handshake;
use super::*;
use crate::transfer::DialError;
use crate::transfer::close_codes::{DONE, PROTOCOL, REJECTED};

#[tokio::test]
async fn both_ends_admit_each_other_in_a_handshake() {
    with_deadline(async {
        let (mut listener, dialer) =
            (TransferTestNode::start(TestStore::default()), TransferTestNode::start(TestStore::default()));
        let dialed = dialer.dial(listener.address()).await;
        assert_eq!((dialed.id, dialed.transfer), (listener.id, listener.address()));
        assert_eq!((dialed.gossip.port(), dialed.node.as_str()), (4001, "node-a"));
        let admitted = listener.admitted_peers.recv().await.unwrap();
        assert_eq!(
            (admitted.id, admitted.transfer),
            (dialer.id, dialer.address()),
            "the dialer listens at the address of its packets"
        );
        assert_eq!((dialer.transfer.peers(), listener.transfer.peers()), (vec![dialed], vec![admitted]));
        dialer.dial(listener.address()).await;
        assert!(listener.admitted_peers.try_recv().is_err(), "a connected peer is not dialed again");
    })
    .await;
}

#[tokio::test]
async fn an_ipv4_peer_of_a_dual_stack_agent_is_recorded_with_its_ipv4_address() {
    with_deadline(async {
        let (key, blob) = (Identity::generate(), blob(10));
        let mut dual = TransferTestNode::start_at(
            "[::]:0",
            &key,
            TestStore::default(),
            TestAdmission::default(),
            Timeouts::DEFAULT,
        );
        let plain = TransferTestNode::start(TestStore::with(&blob));
        plain.dial(SocketAddr::from(([127, 0, 0, 1], dual.address().port()))).await;
        let admitted = dual.admitted_peers.recv().await.unwrap();
        assert_eq!(admitted.transfer, plain.address());
        assert_eq!(admitted.gossip, SocketAddr::from(([127, 0, 0, 1], 4001)));
        dual.fetch(plain.id, Digest::of(&blob), 10).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_is_not_admitted_is_rejected_with_a_reason_and_served_nothing() {
    with_deadline(async {
        let secret = blob(1000);
        let me = Identity::generate();
        let admission = TestAdmission::only([]);
        let listener = TransferTestNode::start_with(&me, TestStore::with(&secret), admission, Timeouts::DEFAULT);
        let dialer = TransferTestNode::start(TestStore::default());
        let error = dialer.transfer.dial(listener.address(), None).await.unwrap_err();
        let DialError::Rejected { peer, reason, .. } = &error else { panic!("{error}") };
        assert_eq!((*peer, reason.as_str()), (listener.id, "not admitted: not on the list"));
        assert!(dialer.transfer.peers().is_empty() && listener.transfer.peers().is_empty());
        assert!(listener.metric(r#"admissions_total{result="denied"} 1"#));
        assert!(listener.metric("served_bytes_total 0"));
    })
    .await;
}

#[tokio::test]
async fn a_request_before_the_hello_closes_the_connection() {
    with_deadline(async {
        let secret = blob(1000);
        let listener = TransferTestNode::start(TestStore::with(&secret));
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
async fn streams_before_the_handshake_are_not_served() {
    with_deadline(async {
        let secret = blob(1000);
        let limits = Timeouts { hello: BRIEF, ..Timeouts::DEFAULT };
        let me = Identity::generate();
        let listener = TransferTestNode::start_with(&me, TestStore::with(&secret), TestAdmission::default(), limits);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = endpoint.connect(listener.address(), "lighterman").unwrap().await.unwrap();
        let (mut first, _keep) = connection.open_bi().await.unwrap();
        first.write_all(&[0]).await.unwrap();
        // The acceptor allows one stream: no second one opens before the deadline of the first.
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
async fn a_malformed_or_oversized_hello_closes_the_connection() {
    with_deadline(async {
        let listener = TransferTestNode::start(TestStore::default());
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
            // The Hello may be rejected before all of its bytes are written.
            let _ = send.write_all(&bytes).await;
            let _ = send.finish();
            assert_closed_with(&connection, PROTOCOL, what).await;
        }
        assert!(listener.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_dial_fails_where_another_key_answers() {
    with_deadline(async {
        let (listener, dialer) =
            (TransferTestNode::start(TestStore::default()), TransferTestNode::start(TestStore::default()));
        let expected = Identity::generate().peer_id();
        let error = dialer.transfer.dial(listener.address(), Some(expected)).await.unwrap_err();
        assert!(
            matches!(error, DialError::AnotherKey { expected: e, found, .. } if (e, found) == (expected, listener.id)),
            "{error}"
        );
        assert!(dialer.transfer.peers().is_empty() && listener.transfer.peers().is_empty(), "no Hello was sent");
        dialer.transfer.dial(listener.address(), Some(listener.id)).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_this_agent_does_not_admit_is_not_used() {
    with_deadline(async {
        let listener = TransferTestNode::start(TestStore::default());
        let admission = TestAdmission::only([]);
        let dialer =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), admission, Timeouts::DEFAULT);
        let error = dialer.transfer.dial(listener.address(), None).await.unwrap_err();
        assert!(matches!(error, DialError::NotAdmitted { peer, .. } if peer == listener.id), "{error}");
        assert!(dialer.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_fetch_from_a_peer_that_rejects_this_agent_fails_as_not_admitted() {
    with_deadline(async {
        let (key, blob) = (Identity::generate(), blob(10));
        let fetcher = TransferTestNode::start(TestStore::default());
        // The provider dials the fetcher, so its address is recorded, but the provider rejects the
        // fetcher.
        let admission = TestAdmission::only([fetcher.id]);
        let provider = TransferTestNode::start_with(&key, TestStore::with(&blob), admission, Timeouts::DEFAULT);
        provider.dial(fetcher.address()).await;
        fetcher.fetch(provider.id, Digest::of(&blob), 10).await.unwrap();

        let dialer = TransferTestNode::start(TestStore::default());
        let peer = Peer { id: provider.id, transfer: provider.address(), ..fetcher.transfer.peers()[0].clone() };
        dialer.transfer.0.peers.insert(&peer, unbounded_admission()).unwrap();
        let error = dialer.fetch(provider.id, Digest::of(&blob), 10).await.unwrap_err();
        assert!(matches!(error, FetchError::NotAdmitted { peer, .. } if peer == provider.id), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_peer_is_not_served_after_its_verdict_expired_and_is_admitted_again() {
    with_deadline(async {
        let (me, blob) = (Identity::generate(), blob(10));
        let admission = TestAdmission::default();
        *admission.lifetime.lock().unwrap() = Duration::ZERO;
        let provider = TransferTestNode::start_with(&me, TestStore::with(&blob), admission.clone(), Timeouts::DEFAULT);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = handshake(&endpoint, provider.address()).await;
        let shared = &provider.transfer.0;
        let valid_until = || shared.peers.expired(Duration::MAX).pop().map(|(_, admission)| admission.valid_until);
        while valid_until().is_none() {
            tokio::task::yield_now().await;
        }
        let first = valid_until().unwrap();
        *admission.recheck.lock().unwrap() = Err(Rejection::Denied("expired".into()));
        shared.close_expired(first + LEEWAY);
        assert!(connection.close_reason().is_none(), "the leeway for clocks is not over");
        *admission.recheck.lock().unwrap() = Ok(());
        *admission.lifetime.lock().unwrap() = Duration::from_secs(3600);
        let expire = || shared.close_expired(valid_until().unwrap() + LEEWAY + BRIEF);
        expire();
        assert!(connection.close_reason().is_none(), "the credential is still accepted");
        assert!(valid_until().unwrap() > first + LEEWAY);
        *admission.recheck.lock().unwrap() = Err(Rejection::Undecided("soon".into()));
        expire();
        assert!(connection.close_reason().is_none(), "the new verdict is pending");
        *admission.recheck.lock().unwrap() = Err(Rejection::Denied("expired".into()));
        expire();
        assert_closed_with(&connection, DONE, "the verdict has expired").await;
        handshake(&endpoint, provider.address()).await;
    })
    .await;
}

#[tokio::test]
async fn a_renewed_credential_is_sent_on_a_new_connection() {
    with_deadline(async {
        let blob = blob(10);
        let mut provider = TransferTestNode::start(TestStore::with(&blob));
        let admission = TestAdmission::default();
        let fetcher = TransferTestNode::start_with(
            &Identity::generate(),
            TestStore::default(),
            admission.clone(),
            Timeouts::DEFAULT,
        );
        fetcher.dial(provider.address()).await;
        fetcher.fetch(provider.id, Digest::of(&blob), 10).await.unwrap();
        provider.admitted_peers.recv().await.unwrap();
        admission.renewals.send_modify(|renewals| *renewals += 1);
        // The old connection serves until the agent has seen the renewal.
        while provider.admitted_peers.try_recv().is_err() {
            fetcher.fetch(provider.id, Digest::of(&blob), 10).await.unwrap();
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_recorded_by_address_alone_is_dialed_for_the_first_fetch() {
    with_deadline(async {
        let blob = blob(10);
        let (mut provider, fetcher) =
            (TransferTestNode::start(TestStore::with(&blob)), TransferTestNode::start(TestStore::default()));
        let (node, address) = ("there".parse::<NodeName>().unwrap(), provider.address());
        let peer = Peer { id: provider.id, node, zone: None, transfer: address, gossip: address };
        fetcher.transfer.add_peer_address(&peer);
        assert_eq!(fetcher.transfer.admitted_for(provider.id), Duration::ZERO);
        fetcher.fetch(provider.id, Digest::of(&blob), 10).await.unwrap();
        assert_eq!(provider.admitted_peers.recv().await.unwrap().id, fetcher.id);
        assert!(fetcher.transfer.admitted_for(provider.id) > Duration::ZERO);

        let other = Peer { id: Identity::generate().peer_id(), ..peer };
        fetcher.transfer.add_peer_address(&other);
        let error = fetcher.fetch(other.id, Digest::of(&blob), 10).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { peer, .. } if peer == other.id), "another key: {error}");
    })
    .await;
}

#[tokio::test]
async fn a_connected_peer_is_dialed_again_once_its_verdict_expired() {
    with_deadline(async {
        let admission = TestAdmission::default();
        *admission.lifetime.lock().unwrap() = Duration::ZERO;
        let mut listener = TransferTestNode::start(TestStore::default());
        let dialer =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), admission, Timeouts::DEFAULT);
        for _ in 0..2 {
            dialer.dial(listener.address()).await;
            assert_eq!(listener.admitted_peers.recv().await.unwrap().id, dialer.id);
        }
    })
    .await;
}

#[tokio::test]
async fn each_peer_receives_its_address_as_the_other_peer_observes_it() {
    with_deadline(async {
        let (listener, dialer) =
            (TransferTestNode::start(TestStore::default()), TransferTestNode::start(TestStore::default()));
        let (listener_address, dialer_address) =
            (listener.transfer.observed_address(), dialer.transfer.observed_address());
        assert_eq!(*dialer_address.borrow(), None);
        dialer.dial(listener.address()).await;
        let address = Some(listener.address().ip());
        assert_eq!((*dialer_address.borrow(), *listener_address.borrow()), (address, address));
    })
    .await;
}

#[tokio::test]
async fn a_dial_of_the_agents_own_address_is_detected() {
    with_deadline(async {
        let node = TransferTestNode::start(TestStore::default());
        let error = node.transfer.dial(node.address(), None).await.unwrap_err();
        assert!(matches!(error, DialError::OwnAddress(address) if address == node.address()), "{error}");
        assert!(node.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn two_nodes_with_one_key_detect_each_other_from_either_side_and_are_no_peers() {
    with_deadline(async {
        let key = Identity::generate();
        let start = |name: &str| {
            let options = TransferOptions { timeouts: Timeouts::DEFAULT, policy: None, versions: Versions::TRANSFER };
            let admission = TestAdmission::default();
            TransferTestNode::start_named(
                name,
                "127.0.0.1:0",
                &key,
                TestStore::default(),
                admission,
                Arc::new(NoPartialBlobs),
                options,
            )
        };
        let (listener, dialer) = (start("first"), start("second"));
        let [at_listener, at_dialer] = [&listener, &dialer].map(|node| node.transfer.shared_key());
        let error = dialer.transfer.dial(listener.address(), None).await.unwrap_err();
        assert!(matches!(&error, DialError::SharedKey { node, .. } if node.as_str() == "first"), "{error}");
        let name = |found: &watch::Receiver<Option<NodeName>>| found.borrow().as_ref().map(ToString::to_string);
        assert_eq!((name(&at_listener), name(&at_dialer)), (Some("second".into()), Some("first".into())));
        assert!(listener.transfer.peers().is_empty() && dialer.transfer.peers().is_empty());

        let alone = TransferTestNode::start(TestStore::default());
        let error = alone.transfer.dial(alone.address(), None).await.unwrap_err();
        assert!(matches!(error, DialError::OwnAddress(_)), "{error}");
        assert_eq!(name(&alone.transfer.shared_key()), None, "an agent that dials its own address");
    })
    .await;
}

#[tokio::test]
async fn another_agent_with_the_same_key_is_rejected() {
    with_deadline(async {
        let key = Identity::generate();
        let listener =
            TransferTestNode::start_with(&key, TestStore::default(), TestAdmission::default(), Timeouts::DEFAULT);
        let connection = bare_endpoint(&key).connect(listener.address(), "lighterman").unwrap().await.unwrap();
        let (mut send, _recv) = connection.open_bi().await.unwrap();
        wire::write(&mut send, &hello()).await.unwrap();
        assert_closed_with(&connection, REJECTED, "the same key").await;
        assert!(listener.transfer.peers().is_empty());
    })
    .await;
}

#[tokio::test]
async fn a_pod_that_presents_many_keys_keeps_two_and_evicts_no_other_pod() {
    with_deadline(async {
        let keys: Vec<_> = (0..10).map(|_| Identity::generate()).collect();
        let (agent, other) = (&keys[0], Identity::generate());
        let mut admission = TestAdmission::default();
        admission.pods.extend(keys.iter().map(|key| (key.peer_id(), "stolen".to_owned())));
        admission.pods.insert(other.peer_id(), "other".to_owned());
        let provider =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), admission, Timeouts::DEFAULT);
        let address = provider.address();
        let others = handshake(&bare_endpoint(&other), address).await;
        let mut connections = Vec::new();
        for key in &keys {
            let endpoint = bare_endpoint(key);
            let connection = handshake(&endpoint, address).await;
            connections.push((endpoint, connection));
            assert!(provider.transfer.peers().len() <= 3, "two keys of one pod, and the key of the other pod");
        }
        for (_, connection) in &connections[..8] {
            assert_closed_with(connection, DONE, "two newer keys of the pod were presented").await;
        }
        assert!(connections[8..].iter().all(|(_, connection)| connection.close_reason().is_none()));
        assert!(others.close_reason().is_none(), "another pod's agent");
        // The agent of the pod dials again.
        handshake(&bare_endpoint(agent), address).await;
        let ids: HashSet<_> = provider.transfer.peers().into_iter().map(|peer| peer.id).collect();
        assert_eq!(ids, [agent.peer_id(), keys[9].peer_id(), other.peer_id()].into());
    })
    .await;
}

#[tokio::test]
async fn an_agent_in_a_new_pod_keeps_its_key_and_the_old_pod_takes_no_room() {
    with_deadline(async {
        let provider = TransferTestNode::start(TestStore::default());
        let peers = &provider.transfer.0.peers;
        let peer = |key: u8| Peer {
            id: PeerId::from_public_key([key; 32]),
            node: "there".parse().unwrap(),
            zone: None,
            transfer: "127.0.0.1:1".parse().unwrap(),
            gossip: "127.0.0.1:1".parse().unwrap(),
        };
        let in_pod = |pod: &str, until: u64| PeerAdmission {
            pod: Some(pod.to_owned()),
            valid_until: Duration::from_secs(until),
            ..unbounded_admission()
        };
        peers.insert(&peer(1), in_pod("old", 1)).unwrap();
        peers.insert(&peer(1), in_pod("new", 2)).unwrap();
        // A relayed or late credential of the old pod expires earlier and changes nothing.
        peers.insert(&peer(1), in_pod("old", 1)).unwrap();
        peers.insert(&peer(2), in_pod("old", 2)).unwrap();
        peers.insert(&peer(3), in_pod("old", 2)).unwrap();
        assert_eq!(peers.all().len(), 3, "the first key belongs to the new pod");
        peers.remove(peer(2).id);
        peers.insert(&peer(4), in_pod("old", 2)).unwrap();
        assert_eq!(peers.all().len(), 3, "a removed key takes no room");
        peers.insert(&peer(5), in_pod("old", 2)).unwrap();
        let ids: HashSet<_> = peers.all().into_iter().map(|peer| peer.id).collect();
        assert_eq!(ids, [1, 4, 5].map(|key| peer(key).id).into());
    })
    .await;
}

#[tokio::test]
async fn a_removed_peer_is_disconnected_and_may_reconnect() {
    with_deadline(async {
        let blob = blob(10);
        let (provider, mut fetcher) =
            (TransferTestNode::start(TestStore::with(&blob)), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        let outsider = bare_endpoint(&Identity::generate());
        let inbound = handshake(&outsider, fetcher.address()).await;
        let admitted = fetcher.admitted_peers.recv().await.unwrap();
        fetcher.transfer.remove_peer(admitted.id);
        inbound.closed().await;
        fetcher.transfer.remove_peer(provider.id);
        assert!(fetcher.transfer.peers().is_empty());
        let error = fetcher.fetch(provider.id, Digest::of(&blob), 10).await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
        provider.dial(fetcher.address()).await;
        fetcher.fetch(provider.id, Digest::of(&blob), 10).await.unwrap();
    })
    .await;
}

#[tokio::test]
async fn a_peers_oldest_connection_makes_room_for_its_fifth() {
    with_deadline(async {
        let listener = TransferTestNode::start(TestStore::default());
        let endpoint = bare_endpoint(&Identity::generate());
        let first = handshake(&endpoint, listener.address()).await;
        let mut others = Vec::new();
        for _ in 0..4 {
            others.push(handshake(&endpoint, listener.address()).await);
        }
        assert_closed_with(&first, crate::transfer::close_codes::SUPERSEDED, "the oldest").await;
        assert!(others.iter().all(|connection| connection.close_reason().is_none()));
    })
    .await;
}

#[tokio::test]
async fn a_rejection_closes_the_connection_with_its_code() {
    with_deadline(async {
        let (me, admission) = (Identity::generate(), TestAdmission::only([]));
        let listener = TransferTestNode::start_with(&me, TestStore::default(), admission, Timeouts::DEFAULT);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = endpoint.connect(listener.address(), "lighterman").unwrap().await.unwrap();
        let (mut send, mut recv) = connection.open_bi().await.unwrap();
        wire::write(&mut send, &hello()).await.unwrap();
        assert!(matches!(wire::read(&mut recv).await.unwrap(), Welcome::Rejected(_)));
        assert_closed_with(&connection, REJECTED, "a rejected dialer").await;
    })
    .await;
}

async fn assert_closed_with(connection: &Connection, code: VarInt, what: &str) {
    let ended = connection.closed().await;
    assert!(matches!(&ended, ConnectionError::ApplicationClosed(close) if close.error_code == code), "{what}: {ended}");
}
