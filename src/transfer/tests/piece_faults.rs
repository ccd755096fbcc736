//! Peers that send unrequested pieces, wrong bytes, or too few bytes.

use super::pieces::{CollectingSink, PIECE, first_pieces};
use super::*;
use crate::model::PieceRequest;
use crate::oci::PieceLayout;
use crate::ports::Fetcher;

fn numbered(piece: u32, bytes: &[u8]) -> Vec<u8> {
    [&piece.to_be_bytes()[..], bytes].concat()
}

/// Requests two of the first three of four pieces, and returns the error and the received pieces.
async fn fetch_from(rogue: &Rogue, blob: &Bytes, timeouts: Timeouts) -> (FetchError, CollectingSink) {
    let fetcher =
        TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), timeouts);
    fetcher.dial(rogue.address).await;
    let mut sink = CollectingSink::of(blob);
    let request = PieceRequest { limit: 2, ..first_pieces(rogue.id, blob, 3) };
    let error = fetcher.transfer.fetch_pieces(&request, &mut sink).await.unwrap_err();
    assert!(fetcher.metric(&format!(r#"fetch_failures_total{{reason="{}"}} 1"#, error.label())));
    (error, sink)
}

#[tokio::test]
async fn an_unrequested_or_unfitting_piece_ends_the_fetch_and_earlier_pieces_count() {
    let blob = blob(3 * PIECE + 9);
    let piece = |number: u32| {
        let from = number as usize * PIECE;
        numbered(number, &blob[from..blob.len().min(from + PIECE)])
    };
    let forged = {
        let mut bytes = piece(1);
        bytes[4 + 70_000] ^= 1;
        bytes
    };
    let cases: [(&str, Vec<Vec<u8>>, usize); 9] = [
        ("an unrequested piece", vec![piece(0), piece(3)], 1),
        ("a piece beyond the blob", vec![piece(0), numbered(u32::MAX, b"")], 1),
        ("a piece twice", vec![piece(1), piece(1)], 1),
        ("a piece too many", vec![piece(1), piece(0), piece(2)], 2),
        ("a byte too many", vec![piece(2), piece(0), vec![0]], 2),
        ("half a number", vec![piece(2), vec![0, 0]], 1),
        ("a number alone", vec![piece(2), numbered(1, b"")], 1),
        ("a byte too few", vec![piece(2)[..4 + PIECE - 1].to_vec()], 0),
        ("forged bytes", vec![piece(2), forged], 1),
    ];
    for (what, sent, good) in cases {
        with_deadline(async {
            let rogue = Rogue::start(move |_, mut send| {
                let sent = sent.concat();
                async move {
                    answer_blob(&mut send, 3 * PIECE as u64 + 9).await;
                    let _ = send.write_all(&sent).await;
                }
            });
            let (error, sink) = fetch_from(&rogue, &blob, Timeouts::DEFAULT).await;
            match &error {
                FetchError::PieceMismatch { peer, piece: 1, .. } if what == "forged bytes" => {
                    assert_eq!(*peer, rogue.id)
                }
                FetchError::Protocol { peer, .. } => assert_eq!(*peer, rogue.id, "{what}"),
                other => panic!("{what}: {other}"),
            }
            let fitting = sink.received.iter().filter(|(piece, _)| sink.verifier.has_piece(*piece as usize)).count();
            assert_eq!(fitting, good, "{what}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_piece_may_be_split_anywhere_in_the_stream() {
    let blob = blob(PIECE + 1);
    let whole: Vec<u8> = [numbered(1, &blob[PIECE..]), numbered(0, &blob[..PIECE])].concat();
    // Within the first number, after that number, within the second, in the middle of a piece.
    for at in [1, 3, 4, 5, 6, 9, 10, PIECE] {
        with_deadline(async {
            let (first, rest) = (whole[..at].to_vec(), whole[at..].to_vec());
            let rogue = Rogue::start(move |_, mut send| {
                let (first, rest) = (first.clone(), rest.clone());
                async move {
                    wire::write(&mut send, &Answer::Partial { size: PIECE as u64 + 1 }).await.unwrap();
                    send.write_all(&first).await.unwrap();
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    send.write_all(&rest).await.unwrap();
                }
            });
            let fetcher = TransferTestNode::start(TestStore::default());
            fetcher.dial(rogue.address).await;
            let mut sink = CollectingSink::of(&blob);
            fetcher.transfer.fetch_pieces(&first_pieces(rogue.id, &blob, 2), &mut sink).await.unwrap();
            assert!(sink.verifier.proof().is_some(), "cut at {at}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_blob_of_another_size_is_no_fault_of_the_peer_and_each_answer_has_its_own_error() {
    let blob = blob(4 * PIECE);
    let size = blob.len() as u64;
    let cases = [
        (Answer::Blob { size: size + 1 }, "corrupt", false),
        (Answer::Partial { size: size - 1 }, "corrupt", false),
        (Answer::Invalid { size: size - PIECE as u64 }, "corrupt", false),
        (Answer::Invalid { size }, "protocol", true),
        (Answer::Absent, "absent", false),
        (Answer::Busy, "busy", false),
        (Answer::Failed, "store_failed", false),
    ];
    for (answer, label, is_fault) in cases {
        with_deadline(async {
            let reply = answer.clone();
            let rogue = Rogue::start(move |_, mut send| {
                let reply = reply.clone();
                async move { wire::write(&mut send, &reply).await.unwrap() }
            });
            let (error, _) = fetch_from(&rogue, &blob, Timeouts::DEFAULT).await;
            assert_eq!((error.label(), error.is_peer_fault()), (label, is_fault), "{answer:?}: {error}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_dripping_peer_times_out_while_other_requests_go_on() {
    let blob = blob(4 * PIECE);
    with_deadline(async {
        let limits = Timeouts { stall: BRIEF, ..Timeouts::DEFAULT };
        let fetcher =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), limits);
        for first in [&[][..], &[0, 0, 0, 0]] {
            let first = first.to_vec();
            let rogue = Rogue::start(move |_, mut send| {
                let first = first.clone();
                async move {
                    answer_blob(&mut send, 4 * PIECE as u64).await;
                    send.write_all(&first).await.unwrap();
                    while !first.is_empty() && send.write_all(&[7]).await.is_ok() {
                        tokio::time::sleep(BRIEF / 20).await;
                    }
                    let _ = send.stopped().await;
                }
            });
            let provider = TransferTestNode::start(TestStore::with(&blob));
            fetcher.dial(rogue.address).await;
            fetcher.dial(provider.address()).await;
            let (mut dripping, mut flowing) = (CollectingSink::of(&blob), CollectingSink::of(&blob));
            let (slow, good) = (first_pieces(rogue.id, &blob, 4), first_pieces(provider.id, &blob, 4));
            let both = tokio::join!(
                fetcher.transfer.fetch_pieces(&slow, &mut dripping),
                fetcher.transfer.fetch_pieces(&good, &mut flowing)
            );
            let error = both.0.unwrap_err();
            assert!(matches!(error, FetchError::Stalled { peer, .. } if peer == rogue.id), "{error}");
            both.1.unwrap();
            assert!(flowing.verifier.proof().is_some());
        }
    })
    .await;
}

#[tokio::test]
async fn the_time_that_a_sink_takes_is_not_counted_against_the_sender() {
    struct SlowSink(CollectingSink);
    #[async_trait]
    impl crate::ports::PieceSink for SlowSink {
        fn begin(&mut self, piece: u32) {
            self.0.begin(piece);
        }
        async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
            tokio::time::sleep(BRIEF * 2).await;
            self.0.append(chunks).await
        }
        async fn end(&mut self) -> Result<(), crate::ports::PieceError> {
            self.0.end().await
        }
    }
    let blob = blob(PIECE / 8 + 1);
    with_deadline(async {
        let limits = Timeouts { stall: BRIEF, ..Timeouts::DEFAULT };
        let provider = TransferTestNode::start(TestStore::with(&blob));
        let fetcher =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), limits);
        fetcher.dial(provider.address()).await;
        let mut sink = SlowSink(CollectingSink::of(&blob));
        let (digest, layout) = (Digest::of(&blob), PieceLayout::for_size(blob.len() as u64));
        let request = PieceRequest { peer: provider.id, digest, layout, pieces: vec![0], limit: 1 };
        fetcher.transfer.fetch_pieces(&request, &mut sink).await.unwrap();
        assert!(sink.0.verifier.proof().is_some());
    })
    .await;
}
