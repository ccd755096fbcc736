//! Agents of different MAJORs. The newer one is an imaginary next release with today's messages, so
//! that only the negotiation differs.

use super::pieces::{CollectingSink, PIECE, first_pieces};
use super::*;
use crate::model::PieceMapUpdate;
use crate::ports::DialError;
use crate::transfer::close_codes::OTHER_MAJOR;

const NEXT: Versions = Versions::TRANSFER.after_next_major();

fn agent_of(versions: Versions, blob: &Bytes) -> TransferTestNode {
    let options = TransferOptions { timeouts: Timeouts::DEFAULT, policy: None, versions };
    TransferTestNode::start_with_options(
        "127.0.0.1:0",
        &Identity::generate(),
        TestStore::with(blob),
        TestAdmission::default(),
        options,
    )
}

/// An agent of today and one of the next MAJOR; each has a blob that the other lacks.
struct VersionPair {
    current: (TransferTestNode, Bytes),
    next: (TransferTestNode, Bytes),
}

impl VersionPair {
    async fn connected(size: usize) -> Self {
        let blobs = (blob(size), blob(size + 1));
        let (current, next) = (agent_of(Versions::TRANSFER, &blobs.0), agent_of(NEXT, &blobs.1));
        assert_eq!(current.dial(next.address()).await.id, next.id);
        assert_eq!(next.dial(current.address()).await.id, current.id);
        Self { current: (current, blobs.0), next: (next, blobs.1) }
    }

    /// Each agent as the fetcher, with the provider and the provider's blob.
    fn both_ways(&self) -> [(&'static str, &TransferTestNode, &TransferTestNode, &Bytes); 2] {
        let Self { current: today, next } = self;
        [("the older fetches", &today.0, &next.0, &next.1), ("the newer fetches", &next.0, &today.0, &today.1)]
    }
}

#[tokio::test]
async fn agents_of_neighboring_majors_admit_each_other_and_serve_have_and_get() {
    with_deadline(async {
        let pair = VersionPair::connected(300_000).await;
        for (case, fetcher, provider, blob) in pair.both_ways() {
            let (digest, size) = (Digest::of(blob), blob.len() as u64);
            assert_eq!(fetcher.transfer.size_of(provider.id, digest).await.unwrap(), Some(size), "{case}");
            assert_eq!(fetcher.transfer.size_of(provider.id, Digest::of(b"")).await.unwrap(), None, "{case}");
            let (verified, bytes) = fetcher.fetch(provider.id, digest, size).await.unwrap();
            assert!(verified.digest() == digest && bytes == *blob, "{case}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_hash_chain_and_the_pieces_of_a_blob_are_fetched_from_a_peer_of_another_major() {
    with_deadline(async {
        let pair = VersionPair::connected(5 * PIECE).await;
        for (case, fetcher, provider, blob) in pair.both_ways() {
            let (digest, layout) = (Digest::of(blob), PieceLayout::for_size(blob.len() as u64));
            let mut updates = fetcher.transfer.follow(provider.id, digest, layout).await.unwrap();
            assert_eq!(updates.next().await.unwrap(), PieceMapUpdate::HaveAll, "{case}");
            let chain = fetcher.hash_chain(provider.id, digest, layout).await.unwrap();
            let mut sink = CollectingSink::new(Arc::new(chain));
            let mut request = first_pieces(provider.id, blob, 5);
            (request.pieces, request.limit) = (vec![4, 1, 3], 2);
            fetcher.transfer.fetch_pieces(&request, &mut sink).await.unwrap();
            assert_eq!(sink.numbers(), [4, 1], "{case}");
            request.pieces = (0..layout.piece_count() as u32).filter(|piece| ![4, 1].contains(piece)).collect();
            request.limit = request.pieces.len() as u8;
            fetcher.transfer.fetch_pieces(&request, &mut sink).await.unwrap();
            assert!(sink.verifier.proof().is_some(), "{case}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_blob_that_a_peer_of_another_major_lacks_is_absent() {
    with_deadline(async {
        let pair = VersionPair::connected(PIECE).await;
        let missing = blob(3 * PIECE);
        for (case, fetcher, provider, _) in pair.both_ways() {
            let (digest, layout) = (Digest::of(&missing), PieceLayout::for_size(missing.len() as u64));
            let request = first_pieces(provider.id, &missing, 1);
            let errors = [
                fetcher.transfer.follow(provider.id, digest, layout).await.map(drop).unwrap_err(),
                fetcher.hash_chain(provider.id, digest, layout).await.map(drop).unwrap_err(),
                fetcher.transfer.fetch_pieces(&request, &mut CollectingSink::of(&missing)).await.unwrap_err(),
            ];
            assert!(errors.iter().all(|error| matches!(error, FetchError::Absent { .. })), "{case}: {errors:?}");
        }
    })
    .await;
}

#[tokio::test]
async fn a_request_that_needs_equal_majors_is_rejected_with_a_code_of_its_own() {
    with_deadline(async {
        let blob = blob(3 * PIECE);
        let provider = agent_of(NEXT, &blob);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = content::handshake(&endpoint, provider.address()).await;
        let digest = Digest::of(&blob);
        let pieces = Request::Pieces { digest, pieces: vec![0], limit: 1 };
        for request in [pieces, Request::HashChain(digest), Request::Follow(digest)] {
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
async fn agents_two_majors_apart_reject_each_other_and_name_both_versions() {
    with_deadline(async {
        let far = NEXT.after_next_major();
        let (current, later) = (agent_of(Versions::TRANSFER, &blob(1)), agent_of(far, &blob(2)));
        for (dialer, ours, listener, theirs) in
            [(&current, Versions::TRANSFER, &later, far), (&later, far, &current, Versions::TRANSFER)]
        {
            let error = dialer.transfer.dial(listener.address(), None).await.unwrap_err();
            assert!(matches!(error, DialError::OtherVersion { peer, .. } if peer == listener.id), "{error}");
            let expected = format!("speaks version {theirs} of the transfer protocol and this agent {ours}; upgrade");
            assert!(error.to_string().contains(&expected), "{error}");
            assert!(!error.is_silence() && listener.transfer.peers().is_empty());
        }
    })
    .await;
}
