//! Admission of dialers, and the rejection of others.

use super::*;
use crate::ports::DialError;
use crate::transfer::close_codes::{PROTOCOL, REJECTED};

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
