//! Peers that ask for pieces in ways that they should not, and what others notice of it.

use quinn::{ReadError, RecvStream};

use super::content::introduce;
use super::pieces::{Collecting, PIECE, order_of};
use super::*;
use crate::model::{MAX_CHOICE, Order};
use crate::ports::PieceFetcher;
use crate::transfer::codes::{MALFORMED, TOO_SLOW};
use crate::transfer::tuning::MAX_STREAMS;

async fn ask(connection: &Connection, request: &Request) -> RecvStream {
    let (mut send, recv) = connection.open_bi().await.unwrap();
    wire::write(&mut send, request).await.unwrap();
    send.finish().unwrap();
    recv
}

/// The first so many pieces.
fn pieces(blob: &Bytes, count: u32) -> Request {
    Request::Pieces { digest: Digest::of(blob), choice: (0..count).collect(), most: count as u8 }
}

/// Somebody else who is served while others misbehave.
async fn proves(holder: &Node, blob: &Bytes, count: u32) {
    let fetcher = Node::start(Shelf::default());
    fetcher.meet(holder.address()).await;
    let mut sink = Collecting::of(blob);
    fetcher.transfer.pieces(&order_of(holder.id, blob, count), &mut sink).await.unwrap();
    assert_eq!(sink.came.len(), count as usize);
}

#[tokio::test]
async fn a_request_that_makes_no_sense_is_reset_and_one_beyond_the_blob_refused() {
    let blob = blob(3 * PIECE);
    let digest = Digest::of(&blob);
    within(async {
        let holder = Node::start(Shelf::with(&blob));
        let connection = introduce(&bare_endpoint(&Identity::generate()), holder.address()).await;
        let too_many: Vec<u32> = (0..=MAX_CHOICE as u32).collect();
        for (what, choice, most) in [
            ("nothing to choose from", vec![], 1),
            ("none of them", vec![1], 0),
            ("one twice", vec![1, 0, 1], 1),
            ("too many", too_many, 1),
        ] {
            let mut recv = ask(&connection, &Request::Pieces { digest, choice, most }).await;
            assert_eq!(recv.read(&mut [0; 8]).await, Err(ReadError::Reset(MALFORMED)), "{what}");
        }
        for choice in [vec![3], vec![0, u32::MAX]] {
            let mut recv = ask(&connection, &Request::Pieces { digest, choice, most: 1 }).await;
            let answer: Answer = wire::read(&mut recv).await.unwrap();
            assert_eq!(answer, Answer::Invalid { size: blob.len() as u64 });
        }
        assert!(connection.close_reason().is_none());
        proves(&holder, &blob, 3).await;
    })
    .await;
}

#[tokio::test]
async fn more_than_there_are_slots_for_wait_their_turn_and_one_that_leaves_makes_room() {
    let blob = blob(6 * PIECE);
    within(async {
        let (open, opened) = watch::channel(false);
        let holder = Node::start(Shelf { open: Some(opened), ..Shelf::with(&blob) });
        let fetcher = Node::start(Shelf::default());
        fetcher.meet(holder.address()).await;
        let connection = introduce(&bare_endpoint(&Identity::generate()), holder.address()).await;
        // They hold all slots, and others queue behind them.
        let mut streams = Vec::new();
        for _ in 0..12 {
            let mut recv = ask(&connection, &pieces(&blob, 6)).await;
            assert!(matches!(wire::read(&mut recv).await.unwrap(), Answer::Blob { .. }), "at once");
            streams.push(recv);
        }
        let order = Order { most: 6, ..order_of(holder.id, &blob, 6) };
        let mut sink = Collecting::of(&blob);
        let leaves = async {
            drop(streams);
            open.send(true).unwrap();
        };
        let (fetched, ()) = tokio::join!(fetcher.transfer.pieces(&order, &mut sink), leaves);
        fetched.unwrap();
        assert!(sink.proving.verified().is_some());
    })
    .await;
}

#[tokio::test]
async fn readers_that_do_not_read_lose_their_slots_and_then_their_streams() {
    // More than all windows between the two hold, asked for over and over.
    let blob = blob(32 * PIECE);
    within(async {
        let limits = Limits { reader: Duration::from_secs(3), ..Limits::DEFAULT };
        let holder = Node::start_with(&Identity::generate(), Shelf::with(&blob), Guests::default(), limits);
        let connection = introduce(&bare_endpoint(&Identity::generate()), holder.address()).await;
        let mut streams = Vec::new();
        for _ in 0..8 {
            streams.push(ask(&connection, &pieces(&blob, 32)).await);
        }
        proves(&holder, &blob, 32).await;
        // Those that found their windows full.
        for recv in &mut streams {
            assert_eq!(recv.received_reset().await.unwrap(), Some(TOO_SLOW));
        }
        proves(&holder, &blob, 32).await;
    })
    .await;
}

#[tokio::test]
async fn one_that_asks_for_the_same_without_end_does_not_keep_others_waiting() {
    let blob = blob(16 * PIECE);
    within(async {
        let holder = Node::start(Shelf::with(&blob));
        let connection = introduce(&bare_endpoint(&Identity::generate()), holder.address()).await;
        let request = pieces(&blob, 16);
        let greedy = async {
            loop {
                let mut streams = futures::future::join_all((0..16).map(|_| ask(&connection, &request))).await;
                for recv in &mut streams {
                    let _ = recv.read_to_end(64 << 20).await;
                }
            }
        };
        tokio::select! {
            () = greedy => unreachable!("it never ends"),
            () = async { for _ in 0..3 { proves(&holder, &blob, 16).await } } => {}
        }
    })
    .await;
}

#[tokio::test]
async fn requests_that_are_never_finished_bind_only_their_own_connection() {
    let blob = blob(2 * PIECE);
    within(async {
        let limits = Limits { hello: Duration::from_secs(2), ..Limits::DEFAULT };
        let holder = Node::start_with(&Identity::generate(), Shelf::with(&blob), Guests::default(), limits);
        let connection = introduce(&bare_endpoint(&Identity::generate()), holder.address()).await;
        let mut streams = Vec::new();
        // The one of the introduction may count still.
        for _ in 1..MAX_STREAMS {
            let (mut send, recv) = connection.open_bi().await.unwrap();
            send.write_all(&[0]).await.unwrap();
            streams.push((send, recv));
        }
        // The next of thousands waits until one of them is given up, and left.
        let further = async {
            let mut recv = ask(&connection, &pieces(&blob, 2)).await;
            wire::read::<Answer>(&mut recv).await.unwrap()
        };
        let given_up = async {
            proves(&holder, &blob, 2).await;
            for (_send, mut recv) in streams {
                assert_eq!(recv.received_reset().await.unwrap(), Some(MALFORMED));
            }
        };
        let (answer, ()) = tokio::join!(further, given_up);
        assert!(matches!(answer, Answer::Blob { .. }));
    })
    .await;
}
