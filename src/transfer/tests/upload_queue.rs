//! Peers that request pieces in unfair ways, and the effect on other peers.

use quinn::{ReadError, RecvStream};

use super::content::handshake;
use super::pieces::{CollectingSink, PIECE, first_pieces};
use super::*;
use crate::model::{MAX_REQUEST_PIECES, PieceRequest};
use crate::ports::Fetcher;
use crate::transfer::close_codes::{MALFORMED, TOO_SLOW};
use crate::transfer::tuning::MAX_STREAMS;

async fn request_pieces(connection: &Connection, request: &Request) -> RecvStream {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    wire::write(&mut send, request).await.unwrap();
    send.finish().unwrap();
    recv
}

/// A request for all of the first pieces.
fn first_pieces_request(blob: &Bytes, count: u32) -> Request {
    Request::Pieces { digest: Digest::of(blob), pieces: (0..count).collect(), limit: count as u8 }
}

/// Fetches pieces as another peer, which must be served.
async fn assert_serves(provider: &TransferTestNode, blob: &Bytes, count: u32) {
    let fetcher = TransferTestNode::start(TestStore::default());
    fetcher.dial(provider.address()).await;
    let mut sink = CollectingSink::of(blob);
    fetcher.transfer.fetch_pieces(&first_pieces(provider.id, blob, count), &mut sink).await.unwrap();
    assert_eq!(sink.received.len(), count as usize);
}

#[tokio::test]
async fn a_malformed_piece_request_is_reset_and_a_piece_beyond_the_blob_is_rejected() {
    let blob = blob(3 * PIECE);
    let digest = Digest::of(&blob);
    with_deadline(async {
        let provider = TransferTestNode::start(TestStore::with(&blob));
        let connection = handshake(&bare_endpoint(&Identity::generate()), provider.address()).await;
        let too_many: Vec<u32> = (0..=MAX_REQUEST_PIECES as u32).collect();
        for (what, pieces, limit) in [
            ("no pieces", vec![], 1),
            ("a limit of zero", vec![1], 0),
            ("a piece twice", vec![1, 0, 1], 1),
            ("too many pieces", too_many, 1),
        ] {
            let mut recv = request_pieces(&connection, &Request::Pieces { digest, pieces, limit }).await;
            assert_eq!(recv.read(&mut [0; 8]).await, Err(ReadError::Reset(MALFORMED)), "{what}");
        }
        for pieces in [vec![3], vec![0, u32::MAX]] {
            let mut recv = request_pieces(&connection, &Request::Pieces { digest, pieces, limit: 1 }).await;
            let answer: Answer = wire::read(&mut recv).await.unwrap();
            assert_eq!(answer, Answer::Invalid { size: blob.len() as u64 });
        }
        assert!(connection.close_reason().is_none());
        assert_serves(&provider, &blob, 3).await;
    })
    .await;
}

#[tokio::test]
async fn uploads_beyond_the_slots_wait_and_a_closed_upload_frees_its_slot() {
    let blob = blob(6 * PIECE);
    with_deadline(async {
        let (open, opened) = watch::channel(false);
        let provider = TransferTestNode::start(TestStore { open: Some(opened), ..TestStore::with(&blob) });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        let connection = handshake(&bare_endpoint(&Identity::generate()), provider.address()).await;
        // These uploads hold all slots, and more of them queue.
        let mut streams = Vec::new();
        for _ in 0..12 {
            let mut recv = request_pieces(&connection, &first_pieces_request(&blob, 6)).await;
            assert!(matches!(wire::read(&mut recv).await.unwrap(), Answer::Blob { .. }), "at once");
            streams.push(recv);
        }
        let request = PieceRequest { limit: 6, ..first_pieces(provider.id, &blob, 6) };
        let mut sink = CollectingSink::of(&blob);
        let leaves = async {
            drop(streams);
            open.send(true).unwrap();
        };
        let (fetched, ()) = tokio::join!(fetcher.transfer.fetch_pieces(&request, &mut sink), leaves);
        fetched.unwrap();
        assert!(sink.verifier.proof().is_some());
    })
    .await;
}

#[tokio::test]
async fn readers_that_do_not_read_lose_their_slots_and_then_their_streams() {
    // More than all windows between the two hold, requested over and over.
    let blob = blob(32 * PIECE);
    with_deadline(async {
        let limits = Timeouts { slow_reader: Duration::from_secs(3), ..Timeouts::DEFAULT };
        let provider = TransferTestNode::start_with(
            &Identity::generate(),
            TestStore::with(&blob),
            TestAdmission::default(),
            limits,
        );
        let connection = handshake(&bare_endpoint(&Identity::generate()), provider.address()).await;
        let mut streams = Vec::new();
        for _ in 0..8 {
            streams.push(request_pieces(&connection, &first_pieces_request(&blob, 32)).await);
        }
        assert_serves(&provider, &blob, 32).await;
        // The uploads that found their windows full are reset.
        for recv in &mut streams {
            assert_eq!(recv.received_reset().await.unwrap(), Some(TOO_SLOW));
        }
        assert_serves(&provider, &blob, 32).await;
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_repeats_its_requests_without_end_does_not_starve_others() {
    let blob = blob(16 * PIECE);
    with_deadline(async {
        let provider = TransferTestNode::start(TestStore::with(&blob));
        let connection = handshake(&bare_endpoint(&Identity::generate()), provider.address()).await;
        let request = first_pieces_request(&blob, 16);
        let greedy = async {
            loop {
                let mut streams =
                    futures::future::join_all((0..16).map(|_| request_pieces(&connection, &request))).await;
                for recv in &mut streams {
                    let _ = recv.read_to_end(64 << 20).await;
                }
            }
        };
        tokio::select! {
            () = greedy => unreachable!("the loop never ends"),
            () = async { for _ in 0..3 { assert_serves(&provider, &blob, 16).await } } => {}
        }
    })
    .await;
}

#[tokio::test]
async fn unfinished_requests_block_only_their_own_connection() {
    let blob = blob(2 * PIECE);
    with_deadline(async {
        let limits = Timeouts { hello: Duration::from_secs(2), ..Timeouts::DEFAULT };
        let provider = TransferTestNode::start_with(
            &Identity::generate(),
            TestStore::with(&blob),
            TestAdmission::default(),
            limits,
        );
        let connection = handshake(&bare_endpoint(&Identity::generate()), provider.address()).await;
        let mut streams = Vec::new();
        // The stream of the `Hello` may still count.
        for _ in 1..MAX_STREAMS {
            let (mut send, recv) = connection.open_bi().await.unwrap();
            send.write_all(&[0]).await.unwrap();
            streams.push((send, recv));
        }
        // The next stream waits until one of the unfinished requests times out and closes.
        let further = async {
            let mut recv = request_pieces(&connection, &first_pieces_request(&blob, 2)).await;
            wire::read::<Answer>(&mut recv).await.unwrap()
        };
        let given_up = async {
            assert_serves(&provider, &blob, 2).await;
            for (_send, mut recv) in streams {
                assert_eq!(recv.received_reset().await.unwrap(), Some(MALFORMED));
            }
        };
        let (answer, ()) = tokio::join!(further, given_up);
        assert!(matches!(answer, Answer::Blob { .. }));
    })
    .await;
}
