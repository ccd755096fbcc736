//! Dials of other agents, and the peers that a dial may reach.

use super::*;
use crate::ports::DialError;

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
        *admission.lifetime.lock() = Duration::ZERO;
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
