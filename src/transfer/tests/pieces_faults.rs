//! Peers that send other pieces than were asked for, or other bytes, or too slowly.

use super::pieces::{Collecting, PIECE, order_of};
use super::*;
use crate::model::Order;
use crate::oci::Cut;
use crate::ports::PieceFetcher;

fn numbered(piece: u32, bytes: &[u8]) -> Vec<u8> {
    [&piece.to_be_bytes()[..], bytes].concat()
}

/// What comes of an order for the first three of four pieces, of which two are to come, when this is sent.
async fn fetch_from(rogue: &Rogue, blob: &Bytes, limits: Limits) -> (FetchError, Collecting) {
    let fetcher = Node::start_with(&Identity::generate(), Shelf::default(), Guests::default(), limits);
    fetcher.meet(rogue.address).await;
    let mut sink = Collecting::of(blob);
    let order = Order { most: 2, ..order_of(rogue.id, blob, 3) };
    let error = fetcher.transfer.pieces(&order, &mut sink).await.unwrap_err();
    assert!(fetcher.metric(&format!(r#"fetch_failures_total{{reason="{}"}} 1"#, error.label())));
    (error, sink)
}

#[tokio::test]
async fn what_was_not_asked_for_or_does_not_fit_ends_the_fetch_and_what_came_before_counts() {
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
        ("a piece unasked", vec![piece(0), piece(3)], 1),
        ("a piece that there is not", vec![piece(0), numbered(u32::MAX, b"")], 1),
        ("a piece twice", vec![piece(1), piece(1)], 1),
        ("a piece too many", vec![piece(1), piece(0), piece(2)], 2),
        ("a byte too many", vec![piece(2), piece(0), vec![0]], 2),
        ("half a number", vec![piece(2), vec![0, 0]], 1),
        ("a number alone", vec![piece(2), numbered(1, b"")], 1),
        ("a byte too few", vec![piece(2)[..4 + PIECE - 1].to_vec()], 0),
        ("forged bytes", vec![piece(2), forged], 1),
    ];
    for (what, sent, good) in cases {
        within(async {
            let rogue = Rogue::start(move |_, mut send| {
                let sent = sent.concat();
                async move {
                    promise(&mut send, 3 * PIECE as u64 + 9).await;
                    let _ = send.write_all(&sent).await;
                }
            });
            let (error, sink) = fetch_from(&rogue, &blob, Limits::DEFAULT).await;
            match &error {
                FetchError::Unfit { peer, piece: 1, .. } if what == "forged bytes" => assert_eq!(*peer, rogue.id),
                FetchError::Protocol { peer, .. } => assert_eq!(*peer, rogue.id, "{what}"),
                other => panic!("{what}: {other}"),
            }
            let fitting = sink.came.iter().filter(|(piece, _)| sink.proving.has(*piece as usize)).count();
            assert_eq!(fitting, good, "{what}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_piece_may_be_cut_anywhere_on_its_way() {
    let blob = blob(PIECE + 1);
    let whole: Vec<u8> = [numbered(1, &blob[PIECE..]), numbered(0, &blob[..PIECE])].concat();
    // Within the first number, after it, within the second, in the middle of a piece.
    for at in [1, 3, 4, 5, 6, 9, 10, PIECE] {
        within(async {
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
            let fetcher = Node::start(Shelf::default());
            fetcher.meet(rogue.address).await;
            let mut sink = Collecting::of(&blob);
            fetcher.transfer.pieces(&order_of(rogue.id, &blob, 2), &mut sink).await.unwrap();
            assert!(sink.proving.verified().is_some(), "cut at {at}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_blob_of_another_size_is_no_fault_of_the_peer_and_every_other_answer_is_told_apart() {
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
        within(async {
            let said = answer.clone();
            let rogue = Rogue::start(move |_, mut send| {
                let said = said.clone();
                async move { wire::write(&mut send, &said).await.unwrap() }
            });
            let (error, _) = fetch_from(&rogue, &blob, Limits::DEFAULT).await;
            assert_eq!((error.label(), error.is_peers_fault()), (label, is_fault), "{answer:?}: {error}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_peer_that_drips_is_given_up_while_other_orders_go_on() {
    let blob = blob(4 * PIECE);
    within(async {
        let limits = Limits { stall: BRIEF, ..Limits::DEFAULT };
        let fetcher = Node::start_with(&Identity::generate(), Shelf::default(), Guests::default(), limits);
        for first in [&[][..], &[0, 0, 0, 0]] {
            let first = first.to_vec();
            let rogue = Rogue::start(move |_, mut send| {
                let first = first.clone();
                async move {
                    promise(&mut send, 4 * PIECE as u64).await;
                    send.write_all(&first).await.unwrap();
                    while !first.is_empty() && send.write_all(&[7]).await.is_ok() {
                        tokio::time::sleep(BRIEF / 20).await;
                    }
                    let _ = send.stopped().await;
                }
            });
            let holder = Node::start(Shelf::with(&blob));
            fetcher.meet(rogue.address).await;
            fetcher.meet(holder.address()).await;
            let (mut dripping, mut flowing) = (Collecting::of(&blob), Collecting::of(&blob));
            let (slow, good) = (order_of(rogue.id, &blob, 4), order_of(holder.id, &blob, 4));
            let both = tokio::join!(
                fetcher.transfer.pieces(&slow, &mut dripping),
                fetcher.transfer.pieces(&good, &mut flowing)
            );
            let error = both.0.unwrap_err();
            assert!(matches!(error, FetchError::Stalled { peer, .. } if peer == rogue.id), "{error}");
            both.1.unwrap();
            assert!(flowing.proving.verified().is_some());
        }
    })
    .await;
}

#[tokio::test]
async fn the_time_that_a_sink_takes_is_not_the_senders() {
    struct Slow(Collecting);
    #[async_trait]
    impl crate::ports::PieceSink for Slow {
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
    within(async {
        let limits = Limits { stall: BRIEF, ..Limits::DEFAULT };
        let holder = Node::start(Shelf::with(&blob));
        let fetcher = Node::start_with(&Identity::generate(), Shelf::default(), Guests::default(), limits);
        fetcher.meet(holder.address()).await;
        let mut sink = Slow(Collecting::of(&blob));
        let (digest, cut) = (Digest::of(&blob), Cut::usual(blob.len() as u64));
        let order = Order { peer: holder.id, digest, cut, choice: vec![0], most: 1 };
        fetcher.transfer.pieces(&order, &mut sink).await.unwrap();
        assert!(sink.0.proving.verified().is_some());
    })
    .await;
}
