//! The effect of our own rate limits on transfers: every byte passes the limiter, and no transfer
//! fails. The tests of [`crate::transfer::rate_limiter`] show how fast bytes pass.

use futures::future::{join_all, try_join_all};

use super::*;
use crate::decide::byte_bucket::{CHUNK, MIN_RATE};

/// A node whose rates can be changed.
struct RateLimitedNode {
    node: TransferTestNode,
    policy: watch::Sender<Arc<Policy>>,
}

impl RateLimitedNode {
    fn start(store: TestStore, down: u64, up: u64, timeouts: Timeouts) -> Self {
        let (sender, receiver) = watch::channel(rates_policy(down, up));
        let options = TransferOptions { timeouts, policy: Some(receiver), versions: Versions::TRANSFER };
        let node = TransferTestNode::start_with_options(
            "127.0.0.1:0",
            &Identity::generate(),
            store,
            TestAdmission::default(),
            options,
        );
        Self { node, policy: sender }
    }
}

fn store(blobs: &[Bytes]) -> TestStore {
    TestStore { blobs: blobs.iter().map(|b| (Digest::of(b), b.clone())).collect(), ..TestStore::default() }
}

/// Blobs of different lengths, as equal content would be one blob.
fn blobs(count: usize, size: usize) -> Vec<Bytes> {
    (0..count).map(|number| blob(size + number)).collect()
}

/// Timeouts that our own rate limit must not exceed. A chunk at the lowest rate takes a second, and
/// two streams share the rate.
const SHORT: Timeouts =
    Timeouts { stall: Duration::from_secs(4), slow_reader: Duration::from_secs(4), ..Timeouts::DEFAULT };

#[tokio::test]
async fn every_downloaded_byte_passes_the_rate_limiter_and_no_stream_stalls() {
    let blobs = blobs(6, 5 * CHUNK as usize / 2);
    with_deadline(async {
        let provider =
            TransferTestNode::start_with(&Identity::generate(), store(&blobs), TestAdmission::default(), SHORT);
        let fetcher = RateLimitedNode::start(TestStore::default(), 2 * MIN_RATE, 0, SHORT).node;
        fetcher.dial(provider.address()).await;
        let fetches = blobs.iter().map(|b| fetcher.fetch(provider.id, Digest::of(b), b.len() as u64));
        try_join_all(fetches).await.unwrap();
        let bytes: usize = blobs.iter().map(Bytes::len).sum();
        assert_eq!(fetcher.transfer.0.download_limiter.limited_bytes(), bytes as u64);
    })
    .await;
}

#[tokio::test]
async fn every_uploaded_byte_passes_the_rate_limiter_and_a_request_without_a_permit_is_answered_busy() {
    let blobs = blobs(3, 5 * CHUNK as usize / 2);
    with_deadline(async {
        let provider = RateLimitedNode::start(store(&blobs), 0, MIN_RATE, SHORT).node;
        let fetcher =
            TransferTestNode::start_with(&Identity::generate(), TestStore::default(), TestAdmission::default(), SHORT);
        fetcher.dial(provider.address()).await;
        let fetches = blobs.iter().map(|b| fetcher.fetch(provider.id, Digest::of(b), b.len() as u64));
        let (fetched, rejected): (Vec<_>, Vec<_>) = join_all(fetches).await.into_iter().partition(Result::is_ok);
        assert_eq!((fetched.len(), rejected.len()), (2, 1));
        assert!(matches!(rejected[0], Err(FetchError::Busy { .. })), "{:?}", rejected[0]);
        let bytes: usize = fetched.iter().flatten().map(|(_, bytes)| bytes.len()).sum();
        assert_eq!(provider.transfer.0.upload_limiter.limited_bytes(), bytes as u64);
        assert!(provider.metric(&format!("served_bytes_total {bytes}")));
    })
    .await;
}

#[tokio::test]
async fn a_lifted_rate_frees_running_transfers_at_once() {
    let large = blob(64 << 20);
    with_deadline(async {
        // The transfer takes a quarter of an hour at this rate.
        let provider = RateLimitedNode::start(TestStore::with(&large), 0, MIN_RATE, Timeouts::DEFAULT);
        let fetcher = RateLimitedNode::start(TestStore::default(), MIN_RATE, 0, Timeouts::DEFAULT);
        fetcher.node.dial(provider.node.address()).await;
        let fetch = fetcher.node.fetch(provider.node.id, Digest::of(&large), large.len() as u64);
        let lift = async {
            while provider.node.metric("served_bytes_total 0") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            provider.policy.send_replace(rates_policy(0, 0));
            fetcher.policy.send_replace(rates_policy(0, 0));
        };
        let (fetched, ()) = tokio::join!(fetch, lift);
        assert!(fetched.unwrap().1 == large);
    })
    .await;
}

#[tokio::test]
async fn a_manifest_does_not_wait_for_layers_under_a_rate_limit() {
    let (large, small) = (blobs(2, 64 << 20), blob(1000));
    with_deadline(async {
        let provider = TransferTestNode::start(store(&[&large[..], std::slice::from_ref(&small)].concat()));
        let fetcher = RateLimitedNode::start(TestStore::default(), MIN_RATE, 0, Timeouts::DEFAULT).node;
        fetcher.dial(provider.address()).await;
        let layers = join_all(large.iter().map(|b| fetcher.fetch(provider.id, Digest::of(b), b.len() as u64)));
        let manifest = async {
            while provider.metric("served_bytes_total 0") {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            fetcher.fetch(provider.id, Digest::of(&small), 1000).await
        };
        tokio::select! {
            _ = layers => panic!("the layers take half an hour"),
            fetched = manifest => assert!(fetched.unwrap().1 == small),
        }
    })
    .await;
}

#[tokio::test]
async fn a_dripping_peer_times_out_under_a_rate_limit_too() {
    with_deadline(async {
        let rogue = Rogue::start(|_, mut send| async move {
            answer_blob(&mut send, 10 * CHUNK).await;
            while send.write_all(&[7; 10]).await.is_ok() {
                tokio::time::sleep(BRIEF / 20).await;
            }
        });
        let limits = Timeouts { stall: BRIEF, ..Timeouts::DEFAULT };
        let fetcher = RateLimitedNode::start(TestStore::default(), MIN_RATE, 0, limits).node;
        fetcher.dial(rogue.address).await;
        let error = fetcher.fetch(rogue.id, Digest::of(b"any"), 10 * CHUNK).await.unwrap_err();
        assert!(matches!(error, FetchError::Stalled { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn the_rate_limiters_delay_is_not_counted_against_the_sender() {
    with_deadline(async {
        let content = blob(200);
        let (digest, first, rest) = (Digest::of(&content), content.slice(..100), content.slice(100..));
        let rogue = Rogue::start(move |_, mut send| {
            let (first, rest) = (first.clone(), rest.clone());
            async move {
                answer_blob(&mut send, 200).await;
                send.write_chunk(first).await.unwrap();
                // Twice the stall timeout of the fetcher, but for three seconds of this time the
                // fetcher waits for its own rate limiter.
                tokio::time::sleep(Duration::from_secs(4)).await;
                send.write_chunk(rest).await.unwrap();
            }
        });
        let limits = Timeouts { stall: Duration::from_secs(2), ..Timeouts::DEFAULT };
        let fetcher = RateLimitedNode::start(TestStore::default(), MIN_RATE, 0, limits).node;
        fetcher.dial(rogue.address).await;
        let others = join_all((0..3).map(|_| fetcher.transfer.0.download_limiter.acquire_bytes(100 * CHUNK)));
        tokio::select! {
            _ = others => panic!("the other waits take five minutes"),
            fetched = fetcher.fetch(rogue.id, digest, 200) => assert!(fetched.unwrap().1 == content),
        }
    })
    .await;
}
