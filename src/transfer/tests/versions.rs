//! Agents of different MAJORs. The newer one is of an imaginary next release whose messages are
//! today's, so that what differs is the negotiation alone.

use super::pieces::{Collecting, PIECE, order_of};
use super::*;
use crate::model::Availability;
use crate::transfer::GreetError;
use crate::transfer::codes::OTHER_MAJOR;

const NEXT: Versions = Versions::TRANSFER.after_next_major();

fn agent_of(versions: Versions, blob: &Bytes) -> Node {
    let bounds = Bounds { limits: Limits::DEFAULT, rules: None, versions };
    Node::start_within("127.0.0.1:0", &Identity::generate(), Shelf::with(blob), Guests::default(), bounds)
}

/// An agent of today and one of the next MAJOR; each has a blob that the other lacks.
struct Pair {
    today: (Node, Bytes),
    next: (Node, Bytes),
}

impl Pair {
    async fn met(size: usize) -> Self {
        let blobs = (blob(size), blob(size + 1));
        let (today, next) = (agent_of(Versions::TRANSFER, &blobs.0), agent_of(NEXT, &blobs.1));
        assert_eq!(today.meet(next.address()).await.id, next.id);
        assert_eq!(next.meet(today.address()).await.id, today.id);
        Self { today: (today, blobs.0), next: (next, blobs.1) }
    }

    /// Each as the fetcher, with the provider and the provider's blob.
    fn both_ways(&self) -> [(&'static str, &Node, &Node, &Bytes); 2] {
        let Self { today, next } = self;
        [("the older fetches", &today.0, &next.0, &next.1), ("the newer fetches", &next.0, &today.0, &today.1)]
    }
}

#[tokio::test]
async fn agents_of_neighbouring_majors_admit_each_other_and_serve_have_and_get() {
    within(async {
        let pair = Pair::met(300_000).await;
        for (who, fetcher, provider, blob) in pair.both_ways() {
            let (digest, size) = (Digest::of(blob), blob.len() as u64);
            assert_eq!(fetcher.transfer.size_of(provider.id, digest).await.unwrap(), Some(size), "{who}");
            assert_eq!(fetcher.transfer.size_of(provider.id, Digest::of(b"")).await.unwrap(), None, "{who}");
            let (verified, bytes) = fetcher.fetch(provider.id, digest, size).await.unwrap();
            assert!(verified.digest() == digest && bytes == *blob, "{who}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_hash_chain_and_the_pieces_of_a_blob_come_from_a_peer_of_another_major() {
    within(async {
        let pair = Pair::met(5 * PIECE).await;
        for (who, fetcher, provider, blob) in pair.both_ways() {
            let (digest, cut) = (Digest::of(blob), Cut::usual(blob.len() as u64));
            let mut following = fetcher.transfer.follow(provider.id, digest, cut).await.unwrap();
            assert_eq!(following.next().await.unwrap(), Availability::Whole, "{who}");
            let chain = fetcher.list(provider.id, digest, cut).await.unwrap();
            let mut sink = Collecting::new(Arc::new(chain));
            let mut order = order_of(provider.id, blob, 5);
            (order.choice, order.most) = (vec![4, 1, 3], 2);
            fetcher.transfer.pieces(&order, &mut sink).await.unwrap();
            assert_eq!(sink.numbers(), [4, 1], "{who}");
            order.choice = (0..cut.pieces() as u32).filter(|piece| ![4, 1].contains(piece)).collect();
            order.most = order.choice.len() as u8;
            fetcher.transfer.pieces(&order, &mut sink).await.unwrap();
            assert!(sink.proving.verified().is_some(), "{who}");
        }
    })
    .await;
}

#[tokio::test]
async fn what_a_peer_of_another_major_lacks_is_absent() {
    within(async {
        let pair = Pair::met(PIECE).await;
        let missing = blob(3 * PIECE);
        for (who, fetcher, provider, _) in pair.both_ways() {
            let (digest, cut) = (Digest::of(&missing), Cut::usual(missing.len() as u64));
            let order = order_of(provider.id, &missing, 1);
            let errors = [
                fetcher.transfer.follow(provider.id, digest, cut).await.map(drop).unwrap_err(),
                fetcher.list(provider.id, digest, cut).await.map(drop).unwrap_err(),
                fetcher.transfer.pieces(&order, &mut Collecting::of(&missing)).await.unwrap_err(),
            ];
            assert!(errors.iter().all(|error| matches!(error, FetchError::Absent { .. })), "{who}: {errors:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_that_needs_equal_majors_is_refused_with_a_code_of_its_own() {
    within(async {
        let blob = blob(3 * PIECE);
        let provider = agent_of(NEXT, &blob);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = content::introduce(&endpoint, provider.address()).await;
        let digest = Digest::of(&blob);
        let pieces = Request::Pieces { digest, choice: vec![0], most: 1 };
        for request in [pieces, Request::Chain(digest), Request::Follow(digest)] {
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            wire::write(&mut send, &request).await.unwrap();
            send.finish().unwrap();
            let ended = recv.read_to_end(1).await.unwrap_err();
            let expected = quinn::ReadToEndError::Read(quinn::ReadError::Reset(OTHER_MAJOR));
            assert_eq!(ended, expected, "{request:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn agents_two_majors_apart_refuse_each_other_and_name_both_versions() {
    within(async {
        let far = NEXT.after_next_major();
        let (today, later) = (agent_of(Versions::TRANSFER, &blob(1)), agent_of(far, &blob(2)));
        for (dialler, ours, listener, theirs) in
            [(&today, Versions::TRANSFER, &later, far), (&later, far, &today, Versions::TRANSFER)]
        {
            let error = dialler.transfer.greet(listener.address(), None).await.unwrap_err();
            assert!(matches!(error, GreetError::OtherVersion { peer, .. } if peer == listener.id), "{error}");
            let said = format!("speaks version {theirs} of the transfer protocol and this agent {ours}; upgrade");
            assert!(error.to_string().contains(&said), "{error}");
            assert!(!error.is_silence() && listener.transfer.peers().is_empty());
        }
    })
    .await;
}
