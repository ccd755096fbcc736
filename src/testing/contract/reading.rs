//! Complete blobs can be read, and no other bytes.

use super::*;

pub(super) async fn an_absent_blob_is_none(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let blob = TestBlob::of("never written", 64);
    ensure(store.blob(blob.digest).await?.is_none(), "a blob that was never written exists")?;
    ensure(store.blobs().await?.is_empty(), "an empty store lists blobs")?;
    ensure(store.images().await?.is_empty(), "an empty store lists images")?;
    let opened = store.open(blob.digest).await.map(|_| ());
    ensure(matches!(opened, Err(StoreError::Absent(_))), format!("open: {opened:?}"))?;
    let added = store.add_metadata(blob.digest, &BlobMetadata::default()).await;
    ensure(matches!(added, Err(StoreError::Absent(_))), format!("remember: {added:?}"))
}

pub(super) async fn a_committed_blob_reads_back_at_any_offset(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    for (size, reason) in [
        (0, "an empty layer is a blob too"),
        (1, "the shortest blob with bytes"),
        (63, "one less than a SHA-256 block"),
        (64, "a SHA-256 block"),
        (65, "one more"),
        ((1 << 20) - 1, "one less than containerd's message"),
        (1 << 20, "exactly a message"),
        ((1 << 20) + 1, "one more"),
        (3 << 20, "several messages of any store that sends messages"),
    ] {
        let explain = |Violation(failure)| Violation(format!("{size} bytes ({reason}): {failure}"));
        let blob = TestBlob::of("reads back", size);
        blob.write(store.as_ref(), &pin, &[]).await.map_err(explain)?;
        blob.check_content(store.as_ref()).await.map_err(explain)?;
        check_reads_at_any_offset(store.as_ref(), &blob).await.map_err(explain)?;
    }
    Ok(())
}

/// Reads forwards, backwards, across the end and beyond.
async fn check_reads_at_any_offset(store: &dyn ContentStore, blob: &TestBlob) -> CheckResult {
    let mut reader = store.open(blob.digest).await?;
    let size = blob.bytes.len();
    for offset in [0, size / 2, size / 3, size.saturating_sub(1), size, size + 1, 1] {
        for limit in [0, 1, 1000, 1 << 20] {
            let read = reader.read_at(offset as u64, limit).await?;
            let rest = blob.bytes.get(offset..).unwrap_or_default();
            ensure(read.len() <= limit, format!("{} bytes for a read of at most {limit}", read.len()))?;
            ensure(rest.starts_with(&read), format!("other bytes at {offset}"))?;
            let at_end = limit == 0 || rest.is_empty();
            ensure(read.is_empty() == at_end, format!("{} bytes of {limit} at {offset}", read.len()))?;
        }
    }
    Ok(())
}

pub(super) async fn the_list_contains_exactly_the_whole_blobs(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let (one, two, half) =
        (TestBlob::of("listed one", 100), TestBlob::of("listed two", 2000), TestBlob::of("half written", 600_000));
    one.write(store.as_ref(), &pin, &[]).await?;
    two.write(store.as_ref(), &pin, &[]).await?;
    let unfinished = store.stage(half.digest, half.size(), &pin).await?;
    unfinished.write_at(0, &[half.bytes.slice(..300_000)]).await?;

    let mut blobs = store.blobs().await?;
    blobs.sort_by_key(|blob| blob.size);
    let found: Vec<_> = blobs.iter().map(|blob| (blob.digest, blob.size)).collect();
    ensure(found == [(one.digest, 100), (two.digest, 2000)], format!("listed: {found:?}"))?;
    let info = store.blob(two.digest).await?;
    ensure(info.as_ref() == Some(&blobs[1]), format!("a single lookup returns {info:?}"))?;
    ensure(!half.is_in(store.as_ref()).await?, "a half-written blob exists")
}
