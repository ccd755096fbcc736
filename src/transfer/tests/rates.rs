//! What our own limits do to transfers: they slow them, evenly, and break none.

use futures::future::{join_all, try_join_all};
use tokio::time::Instant;

use super::*;
use crate::decide::bucket::{Bucket, CHUNK, MIN_RATE};

/// Peers whose rates can be changed.
struct Limited {
    node: Node,
    rules: watch::Sender<Arc<Rules>>,
}

impl Limited {
    fn start(shelf: Shelf, down: u64, up: u64, limits: Limits) -> Self {
        let (sender, receiver) = watch::channel(rules(down, up));
        let bounds = Bounds { limits, rules: Some(receiver), versions: Versions::TRANSFER };
        let node = Node::start_within("127.0.0.1:0", &Identity::generate(), shelf, Guests::default(), bounds);
        Self { node, rules: sender }
    }
}

fn shelf(blobs: &[Bytes]) -> Shelf {
    Shelf { blobs: blobs.iter().map(|b| (Digest::of(b), b.clone())).collect(), ..Shelf::default() }
}

/// Different ones, as equal ones would be one.
fn blobs(count: usize, size: usize) -> Vec<Bytes> {
    (0..count).map(|number| blob(size + number)).collect()
}

/// Waits that our own slowness must not run out. A chunk at the lowest rate takes a second, and two streams share it.
const SHORT: Limits = Limits { stall: Duration::from_secs(4), reader: Duration::from_secs(4), ..Limits::DEFAULT };

/// The least time in which so many bytes may have passed.
fn least(bytes: usize, rate: u64) -> f64 {
    let capacity = Bucket::new(rate, Instant::now().into_std()).capacity();
    (bytes as u64).saturating_sub(capacity) as f64 / rate as f64
}

#[tokio::test]
async fn what_comes_keeps_to_the_rate_and_nobody_stalls() {
    let blobs = blobs(6, 5 * CHUNK as usize / 2);
    within(async {
        let holder = Node::start_with(&Identity::generate(), shelf(&blobs), Guests::default(), SHORT);
        let fetcher = Limited::start(Shelf::default(), 2 * MIN_RATE, 0, SHORT).node;
        fetcher.meet(holder.address()).await;
        let began = Instant::now();
        let fetches = blobs.iter().map(|b| fetcher.fetch(holder.id, Digest::of(b), b.len() as u64));
        try_join_all(fetches).await.unwrap();
        let (took, least) = (began.elapsed().as_secs_f64(), least(blobs.iter().map(Bytes::len).sum(), 2 * MIN_RATE));
        assert!(took >= least, "{took} s where {least} are the least");
    })
    .await;
}

#[tokio::test]
async fn what_goes_keeps_to_the_rate_and_whoever_finds_no_place_is_told_that_we_are_busy() {
    let blobs = blobs(3, 5 * CHUNK as usize / 2);
    within(async {
        let holder = Limited::start(shelf(&blobs), 0, MIN_RATE, SHORT).node;
        let fetcher = Node::start_with(&Identity::generate(), Shelf::default(), Guests::default(), SHORT);
        fetcher.meet(holder.address()).await;
        let began = Instant::now();
        let fetches = blobs.iter().map(|b| fetcher.fetch(holder.id, Digest::of(b), b.len() as u64));
        let (fetched, refused): (Vec<_>, Vec<_>) = join_all(fetches).await.into_iter().partition(Result::is_ok);
        assert_eq!((fetched.len(), refused.len()), (2, 1));
        assert!(matches!(refused[0], Err(FetchError::Busy { .. })), "{:?}", refused[0]);
        let bytes = fetched.iter().flatten().map(|(_, bytes)| bytes.len()).sum();
        let (took, least) = (began.elapsed().as_secs_f64(), least(bytes, MIN_RATE));
        assert!(took >= least, "{took} s where {least} are the least");
        assert!(holder.metric(&format!("served_bytes_total {bytes}")));
    })
    .await;
}

#[tokio::test]
async fn a_rate_that_is_lifted_lets_what_is_under_way_go_on_at_once() {
    let large = blob(64 << 20);
    within(async {
        // A quarter of an hour at this rate.
        let holder = Limited::start(Shelf::with(&large), 0, MIN_RATE, Limits::DEFAULT);
        let fetcher = Limited::start(Shelf::default(), MIN_RATE, 0, Limits::DEFAULT);
        fetcher.node.meet(holder.node.address()).await;
        let fetch = fetcher.node.fetch(holder.node.id, Digest::of(&large), large.len() as u64);
        let lift = async {
            while holder.node.metric("served_bytes_total 0") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            holder.rules.send_replace(rules(0, 0));
            fetcher.rules.send_replace(rules(0, 0));
        };
        let (fetched, ()) = tokio::join!(fetch, lift);
        assert!(fetched.unwrap().1 == large);
    })
    .await;
}

#[tokio::test]
async fn a_manifest_does_not_wait_for_the_layers_before_it() {
    let (large, small) = (blobs(2, 64 << 20), blob(1000));
    within(async {
        let holder = Node::start(shelf(&[&large[..], std::slice::from_ref(&small)].concat()));
        let fetcher = Limited::start(Shelf::default(), MIN_RATE, 0, Limits::DEFAULT).node;
        fetcher.meet(holder.address()).await;
        let layers = join_all(large.iter().map(|b| fetcher.fetch(holder.id, Digest::of(b), b.len() as u64)));
        let manifest = async {
            while holder.metric("served_bytes_total 0") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            fetcher.fetch(holder.id, Digest::of(&small), 1000).await
        };
        tokio::select! {
            _ = layers => panic!("that takes half an hour"),
            fetched = manifest => assert!(fetched.unwrap().1 == small),
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_drips_is_given_up_under_a_limit_too() {
    within(async {
        let rogue = Rogue::start(|_, mut send| async move {
            promise(&mut send, 10 * CHUNK).await;
            while send.write_all(&[7; 10]).await.is_ok() {
                tokio::time::sleep(BRIEF / 20).await;
            }
        });
        let limits = Limits { stall: BRIEF, ..Limits::DEFAULT };
        let fetcher = Limited::start(Shelf::default(), MIN_RATE, 0, limits).node;
        fetcher.meet(rogue.address).await;
        let error = fetcher.fetch(rogue.id, Digest::of(b"any"), 10 * CHUNK).await.unwrap_err();
        assert!(matches!(error, FetchError::Stalled { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn the_time_that_we_wait_ourselves_is_not_the_senders() {
    within(async {
        let content = blob(200);
        let (digest, first, rest) = (Digest::of(&content), content.slice(..100), content.slice(100..));
        let rogue = Rogue::start(move |_, mut send| {
            let (first, rest) = (first.clone(), rest.clone());
            async move {
                promise(&mut send, 200).await;
                send.write_chunk(first).await.unwrap();
                // Twice what the fetcher puts up with, but for three seconds of it it stands in its own queue.
                tokio::time::sleep(Duration::from_secs(4)).await;
                send.write_chunk(rest).await.unwrap();
            }
        });
        let limits = Limits { stall: Duration::from_secs(2), ..Limits::DEFAULT };
        let fetcher = Limited::start(Shelf::default(), MIN_RATE, 0, limits).node;
        fetcher.meet(rogue.address).await;
        let others = join_all((0..3).map(|_| fetcher.transfer.0.down.pass(100 * CHUNK)));
        tokio::select! {
            _ = others => panic!("that takes five minutes"),
            fetched = fetcher.fetch(rogue.id, digest, 200) => assert!(fetched.unwrap().1 == content),
        }
    })
    .await;
}
