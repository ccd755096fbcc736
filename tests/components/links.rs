//! Transfers over links that the kernel shapes. The rate limiter or the link sets the pace, and a
//! broken link makes the peer unreachable.

pub(crate) mod pair;

use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use futures::future::try_join_all;
use lighterman::decide::byte_bucket::ByteBucket;
use lighterman::oci::Digest;
use lighterman::ports::{BlobSink, FetchError, Fetcher, StoreError};
use lighterman::transfer::Transfer;

use pair::{Provider, Rates, VethLink, run_over_link};

/// Drops all bytes; the fetch itself verifies the content.
struct DiscardingSink;

#[async_trait]
impl BlobSink for DiscardingSink {
    async fn append(&mut self, _: &[Bytes]) -> Result<(), StoreError> {
        Ok(())
    }
}

/// Makes different blobs, because blobs of equal bytes are one blob.
fn blobs(count: u8, size: usize) -> Vec<Bytes> {
    (0..count).map(|number| vec![number; size].into()).collect()
}

/// Fetches all blobs at once and returns the bytes per second.
async fn fetch_all(transfer: &Transfer, provider: &Provider, blobs: &[Bytes]) -> Result<f64, FetchError> {
    let began = Instant::now();
    try_join_all(blobs.iter().map(async |blob| {
        transfer.fetch(provider.peer, Digest::of(blob), blob.len() as u64, &mut DiscardingSink).await.map(drop)
    }))
    .await?;
    let bytes: usize = blobs.iter().map(Bytes::len).sum();
    Ok(bytes as f64 / began.elapsed().as_secs_f64())
}

#[test]
fn the_configured_rate_holds_on_a_fast_link_in_either_direction() {
    const RATE: u64 = 2 << 20;
    for (direction, rates) in
        [("down", Rates { fetcher_down: RATE, provider_up: 0 }), ("up", Rates { fetcher_down: 0, provider_up: RATE })]
    {
        let blobs = blobs(6, 2 << 20);
        let bytes = blobs.iter().map(Bytes::len).sum::<usize>() as f64;
        let wanted = blobs.clone();
        let achieved = run_over_link("400mbit", rates, &blobs, async move |transfer, provider, _| {
            fetch_all(transfer, provider, &wanted).await.unwrap()
        });
        let capacity = ByteBucket::new(RATE).capacity() as f64;
        // The first content of the token bucket passes at once, and all other bytes at the rate.
        let max_rate = RATE as f64 * bytes / (bytes - capacity);
        assert!(achieved <= max_rate, "{direction}: {achieved:.0} bytes/s exceed the limit of {max_rate:.0}");
        let ratio = achieved / RATE as f64;
        println!("figure rate_kept_{direction} {ratio:.3} (6 blobs of 2 MiB at once, limit 2 MiB/s, link 400 Mbit/s)");
    }
}

#[test]
fn a_slow_link_sets_the_pace_and_stalls_no_transfer() {
    let rates = Rates { fetcher_down: 64 << 20, provider_up: 64 << 20 };
    let blobs = blobs(6, 1 << 20);
    let wanted = blobs.clone();
    let achieved = run_over_link("8mbit", rates, &blobs, async move |transfer, provider, _| {
        fetch_all(transfer, provider, &wanted).await.unwrap()
    });
    println!("figure link_used {:.3} (6 blobs of 1 MiB at once, limit 64 MiB/s, link 8 Mbit/s)", achieved * 8.0 / 8e6);
}

#[test]
fn blobs_of_one_peer_do_not_starve_each_other_on_a_slow_link() {
    let blobs = blobs(10, 5 << 20);
    let wanted = blobs.clone();
    run_over_link("20mbit", Rates::default(), &blobs, async move |transfer, provider, _| {
        fetch_all(transfer, provider, &wanted).await.unwrap()
    });
}

#[test]
fn blobs_of_one_peer_do_not_starve_each_other_under_the_configured_rate() {
    let blobs = blobs(10, 16 << 20);
    let wanted = blobs.clone();
    run_over_link(
        "4gbit",
        Rates { fetcher_down: 8 << 20, provider_up: 0 },
        &blobs,
        async move |transfer, provider, _| fetch_all(transfer, provider, &wanted).await.unwrap(),
    );
}

#[test]
fn a_peer_whose_link_breaks_is_unreachable_before_it_counts_as_stalled() {
    /// Cuts the link when the first bytes arrive.
    struct LinkCuttingSink<'a>(&'a VethLink);
    #[async_trait]
    impl BlobSink for LinkCuttingSink<'_> {
        async fn append(&mut self, _: &[Bytes]) -> Result<(), StoreError> {
            self.0.blackhole();
            Ok(())
        }
    }
    let blobs = blobs(1, 64 << 20);
    let (digest, size) = (Digest::of(&blobs[0]), 64 << 20);
    let error = run_over_link("100mbit", Rates::default(), &blobs, async move |transfer, provider, link| {
        transfer.fetch(provider.peer, digest, size, &mut LinkCuttingSink(link)).await.unwrap_err()
    });
    assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
}
