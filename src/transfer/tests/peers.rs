//! The table of peers: expired verdicts, keys of one pod, and removed peers.

use super::content::handshake;
use super::*;
use crate::transfer::close_codes::{DONE, SUPERSEDED};

#[tokio::test]
async fn a_peer_is_not_served_after_its_verdict_expired_and_is_admitted_again() {
    with_deadline(async {
        let (me, blob) = (Identity::generate(), blob(10));
        let admission = TestAdmission::default();
        *admission.lifetime.lock() = Duration::ZERO;
        let provider = TransferTestNode::start_with(&me, TestStore::with(&blob), admission.clone(), Timeouts::DEFAULT);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = handshake(&endpoint, provider.address()).await;
        let shared = &provider.transfer.0;
        let valid_until = || shared.peers.expired(Duration::MAX).pop().map(|(_, admission)| admission.valid_until);
        while valid_until().is_none() {
            tokio::task::yield_now().await;
        }
        let first = valid_until().unwrap();
        *admission.recheck.lock() = Err(Rejection::Denied("expired".into()));
        shared.close_expired(first + LEEWAY);
        assert!(connection.close_reason().is_none(), "the leeway for clocks is not over");
        *admission.recheck.lock() = Ok(());
        *admission.lifetime.lock() = Duration::from_secs(3600);
        let expire = || shared.close_expired(valid_until().unwrap() + LEEWAY + BRIEF);
        expire();
        assert!(connection.close_reason().is_none(), "the credential is still accepted");
        assert!(valid_until().unwrap() > first + LEEWAY);
        *admission.recheck.lock() = Err(Rejection::Undecided("soon".into()));
        expire();
        assert!(connection.close_reason().is_none(), "the new verdict is pending");
        *admission.recheck.lock() = Err(Rejection::Denied("expired".into()));
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
        assert_closed_with(&first, SUPERSEDED, "the oldest").await;
        assert!(others.iter().all(|connection| connection.close_reason().is_none()));
    })
    .await;
}
