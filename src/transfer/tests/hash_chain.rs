//! Hash chains: computed once for all requests, and only while a request waits.

use super::pieces::{PIECE, hash_chain_of};
use super::*;

#[tokio::test]
async fn a_hash_chain_is_computed_once_for_all_fetchers() {
    let blob = blob(40 * PIECE + 5);
    with_deadline(async {
        let (open, opened) = watch::channel(false);
        let store = TestStore { open: Some(opened), ..TestStore::with(&blob) };
        let reads = store.reads.clone();
        let provider = TransferTestNode::start(store);
        let fetchers = [TransferTestNode::start(TestStore::default()), TransferTestNode::start(TestStore::default())];
        for fetcher in &fetchers {
            fetcher.dial(provider.address()).await;
        }
        let (digest, layout) = (Digest::of(&blob), PieceLayout::for_size(blob.len() as u64));
        let fetches = [0, 0, 1].map(|fetcher: usize| fetchers[fetcher].hash_chain(provider.id, digest, layout));
        let opens = async { open.send(true).unwrap() };
        let (chains, ()) = tokio::join!(futures::future::join_all(fetches), opens);
        for chain in chains {
            assert_eq!(chain.unwrap(), *hash_chain_of(&blob));
        }
        let again = fetchers[0].hash_chain(provider.id, digest, layout).await.unwrap();
        assert_eq!(again, *hash_chain_of(&blob));
        assert_eq!(reads.load(Ordering::Relaxed), blob.len());
    })
    .await;
}

#[tokio::test]
async fn a_hash_chain_that_was_fetched_with_the_blob_is_not_computed_again() {
    let blob = blob(3 * PIECE);
    with_deadline(async {
        let provider = TransferTestNode::start(TestStore { fails_at: Some(0), ..TestStore::with(&blob) });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(provider.address()).await;
        let (digest, layout) = (Digest::of(&blob), PieceLayout::for_size(blob.len() as u64));
        let error = fetcher.hash_chain(provider.id, digest, layout).await.unwrap_err();
        assert!(matches!(error, FetchError::StoreFailed { .. }), "{error}");
        provider.transfer.add_hash_chain(hash_chain_of(&blob));
        assert_eq!(fetcher.hash_chain(provider.id, digest, layout).await.unwrap(), *hash_chain_of(&blob));
    })
    .await;
}

#[tokio::test]
async fn a_corrupt_blob_has_no_hash_chain() {
    let right = blob(3 * PIECE + 1);
    let mut wrong = right.to_vec();
    // The changed byte is in the last piece, on which no state depends.
    *wrong.last_mut().unwrap() ^= 1;
    let store = TestStore { blobs: HashMap::from([(Digest::of(&right), wrong.into())]), ..TestStore::default() };
    with_deadline(async {
        let (provider, fetcher) = (TransferTestNode::start(store), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        let error =
            fetcher.hash_chain(provider.id, Digest::of(&right), PieceLayout::for_size(right.len() as u64)).await;
        let error = error.unwrap_err();
        assert!(matches!(error, FetchError::StoreFailed { peer } if peer == provider.id), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_hash_chain_is_not_computed_after_its_fetchers_have_left() {
    let blob = blob(200 * PIECE);
    with_deadline(async {
        let (open, opened) = watch::channel(false);
        let store = TestStore { open: Some(opened), ..TestStore::with(&blob) };
        let reads = store.reads.clone();
        let (provider, fetcher) = (TransferTestNode::start(store), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        let (digest, layout) = (Digest::of(&blob), PieceLayout::for_size(blob.len() as u64));
        let pending = || provider.transfer.0.hash_chains.pending();
        tokio::select! {
            _ = fetcher.hash_chain(provider.id, digest, layout) => panic!("the store returns no bytes yet"),
            () = async { while pending() == 0 { tokio::task::yield_now().await } } => {}
        }
        while pending() > 0 {
            tokio::task::yield_now().await;
        }
        open.send(true).unwrap();
        assert_eq!(fetcher.hash_chain(provider.id, digest, layout).await.unwrap(), *hash_chain_of(&blob));
        assert_eq!(reads.load(Ordering::Relaxed), blob.len());
    })
    .await;
}

#[tokio::test]
async fn a_hash_chain_of_another_length_breaks_the_protocol_and_a_stalled_chain_times_out() {
    let blob = blob(4 * PIECE);
    let cases = [(2, false, "protocol"), (4, false, "protocol"), (3, true, "stalled"), (2, true, "stalled")];
    for (states, hangs, label) in cases {
        with_deadline(async {
            let rogue = Rogue::start(move |_, mut send| async move {
                answer_blob(&mut send, 4 * PIECE as u64).await;
                send.write_all(&vec![7; 32 * states]).await.unwrap();
                if hangs {
                    let _ = send.stopped().await;
                }
            });
            let limits = Timeouts { stall: BRIEF, ..Timeouts::DEFAULT };
            let fetcher = TransferTestNode::start_with(
                &Identity::generate(),
                TestStore::default(),
                TestAdmission::default(),
                limits,
            );
            fetcher.dial(rogue.address).await;
            let layout = PieceLayout::for_size(blob.len() as u64);
            let error = fetcher.hash_chain(rogue.id, Digest::of(&blob), layout).await.unwrap_err();
            assert_eq!(error.label(), label, "{states} states: {error}");
        })
        .await;
    }
}
