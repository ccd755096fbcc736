//! Lists of states: made once, for all who ask, and only as long as somebody does.

use super::pieces::{PIECE, chain_of};
use super::*;

#[tokio::test]
async fn a_list_is_made_once_for_all_who_ask() {
    let blob = blob(40 * PIECE + 5);
    within(async {
        let (open, opened) = watch::channel(false);
        let shelf = Shelf { open: Some(opened), ..Shelf::with(&blob) };
        let reads = shelf.reads.clone();
        let holder = Node::start(shelf);
        let fetchers = [Node::start(Shelf::default()), Node::start(Shelf::default())];
        for fetcher in &fetchers {
            fetcher.meet(holder.address()).await;
        }
        let (digest, cut) = (Digest::of(&blob), Cut::usual(blob.len() as u64));
        let asked = [0, 0, 1].map(|fetcher: usize| fetchers[fetcher].list(holder.id, digest, cut));
        let opens = async { open.send(true).unwrap() };
        let (lists, ()) = tokio::join!(futures::future::join_all(asked), opens);
        for list in lists {
            assert_eq!(list.unwrap(), *chain_of(&blob));
        }
        let again = fetchers[0].list(holder.id, digest, cut).await.unwrap();
        assert_eq!(again, *chain_of(&blob));
        assert_eq!(reads.load(Ordering::Relaxed), blob.len());
    })
    .await;
}

#[tokio::test]
async fn a_list_that_came_with_the_blob_is_not_made_again() {
    let blob = blob(3 * PIECE);
    within(async {
        let holder = Node::start(Shelf { fails_at: Some(0), ..Shelf::with(&blob) });
        let fetcher = Node::start(Shelf::default());
        fetcher.meet(holder.address()).await;
        let (digest, cut) = (Digest::of(&blob), Cut::usual(blob.len() as u64));
        let error = fetcher.list(holder.id, digest, cut).await.unwrap_err();
        assert!(matches!(error, FetchError::StoreFailed { .. }), "{error}");
        holder.transfer.knows_chain(chain_of(&blob));
        assert_eq!(fetcher.list(holder.id, digest, cut).await.unwrap(), *chain_of(&blob));
    })
    .await;
}

#[tokio::test]
async fn a_blob_whose_bytes_are_wrong_has_no_list() {
    let right = blob(3 * PIECE + 1);
    let mut wrong = right.to_vec();
    // In the last piece, which no state depends on.
    *wrong.last_mut().unwrap() ^= 1;
    let shelf = Shelf { blobs: HashMap::from([(Digest::of(&right), wrong.into())]), ..Shelf::default() };
    within(async {
        let (holder, fetcher) = (Node::start(shelf), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        let error = fetcher.list(holder.id, Digest::of(&right), Cut::usual(right.len() as u64)).await;
        let error = error.unwrap_err();
        assert!(matches!(error, FetchError::StoreFailed { peer } if peer == holder.id), "{error}");
    })
    .await;
}

#[tokio::test]
async fn no_list_is_made_for_those_who_have_left() {
    let blob = blob(200 * PIECE);
    within(async {
        let (open, opened) = watch::channel(false);
        let shelf = Shelf { open: Some(opened), ..Shelf::with(&blob) };
        let reads = shelf.reads.clone();
        let (holder, fetcher) = (Node::start(shelf), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        let (digest, cut) = (Digest::of(&blob), Cut::usual(blob.len() as u64));
        let making = || holder.transfer.0.chains.making();
        tokio::select! {
            _ = fetcher.list(holder.id, digest, cut) => panic!("nothing can be read"),
            () = async { while making() == 0 { tokio::task::yield_now().await } } => {}
        }
        while making() > 0 {
            tokio::task::yield_now().await;
        }
        open.send(true).unwrap();
        assert_eq!(fetcher.list(holder.id, digest, cut).await.unwrap(), *chain_of(&blob));
        assert_eq!(reads.load(Ordering::Relaxed), blob.len());
    })
    .await;
}

#[tokio::test]
async fn a_list_of_another_length_breaks_the_protocol_and_one_that_stops_is_given_up() {
    let blob = blob(4 * PIECE);
    let cases = [(2, false, "protocol"), (4, false, "protocol"), (3, true, "stalled"), (2, true, "stalled")];
    for (states, hangs, label) in cases {
        within(async {
            let rogue = Rogue::start(move |_, mut send| async move {
                promise(&mut send, 4 * PIECE as u64).await;
                send.write_all(&vec![7; 32 * states]).await.unwrap();
                if hangs {
                    let _ = send.stopped().await;
                }
            });
            let limits = Limits { stall: BRIEF, ..Limits::DEFAULT };
            let fetcher = Node::start_with(&Identity::generate(), Shelf::default(), Guests::default(), limits);
            fetcher.meet(rogue.address).await;
            let cut = Cut::usual(blob.len() as u64);
            let error = fetcher.list(rogue.id, Digest::of(&blob), cut).await.unwrap_err();
            assert_eq!(error.label(), label, "{states} states: {error}");
        })
        .await;
    }
}
