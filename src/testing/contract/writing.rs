//! Only complete, verified blobs become visible, whatever happens to their writers.

use super::*;
use crate::oci::MAX_DOCUMENT_BYTES;

/// A size of several messages of any store that sends messages.
const SIZE: usize = (2 << 20) + 345;

pub(super) async fn a_canceled_put_leaves_the_whole_blob_or_nothing(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let mut written = BTreeSet::new();
    for polls in 0.. {
        let explain = |Violation(failure)| Violation(format!("after {polls} polls: {failure}"));
        let blob = TestBlob::of(&format!("canceled after {polls}"), SIZE);
        let metadata = BlobMetadata::default();
        let inner = store.put(blob.bytes.clone(), blob.proof()?, &metadata, &pin);
        let ended = AbortAfter { inner, polls }.await;
        written.insert(blob.digest);
        if blob.is_in(store.as_ref()).await? {
            blob.check_content(store.as_ref()).await.map_err(explain)?;
        } else {
            let opened = store.open(blob.digest).await.map(|_| ());
            ensure(matches!(opened, Err(StoreError::Absent(_))), format!("open: {opened:?}")).map_err(explain)?;
        }
        if let Some(ended) = ended {
            return Ok(ended?);
        }
        write_when_free(store.as_ref(), &blob, &pin).await.map_err(explain)?;
        blob.check_content(store.as_ref()).await.map_err(explain)?;
        ensure(list_digests(store.as_ref()).await? == written, "other blobs are listed").map_err(explain)?;
    }
    Ok(())
}

/// Work of a canceled call may still run on another thread.
async fn write_when_free(store: &dyn ContentStore, blob: &TestBlob, pin: &Pin) -> CheckResult {
    loop {
        match store.put(blob.bytes.clone(), blob.proof()?, &BlobMetadata::default(), pin).await {
            Err(StoreError::Busy(_)) => tokio::time::sleep(Duration::from_millis(5)).await,
            written => return Ok(written?),
        }
    }
}

/// Verifies that a `put` is rejected and leaves no blob.
async fn check_rejected(store: &dyn ContentStore, bytes: Bytes, proof: BlobProof, pin: &Pin) -> CheckResult {
    let put = store.put(bytes, proof, &BlobMetadata::default(), pin).await;
    ensure(matches!(put, Err(StoreError::Other(_))), format!("put: {put:?}"))?;
    ensure(list_digests(store).await?.is_empty(), "a blob exists nevertheless")
}

pub(super) async fn a_proof_of_another_blob_is_rejected(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let (wanted, other) = (TestBlob::of("wanted", 1000), TestBlob::of("not wanted", 1000));
    check_rejected(store.as_ref(), other.bytes, wanted.proof()?, &pin).await
}

pub(super) async fn a_blob_of_another_length_is_rejected(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("length", 300_000);
    let longer = [&blob.bytes[..], b"!"].concat();
    for (what, bytes) in
        [("a byte short", blob.bytes.slice(1..)), ("a byte long", longer.into()), ("none", Bytes::new())]
    {
        let explain = |Violation(failure)| Violation(format!("{what}: {failure}"));
        check_rejected(store.as_ref(), bytes, blob.proof()?, &pin).await.map_err(explain)?;
    }
    Ok(())
}

pub(super) async fn a_document_over_the_limit_is_rejected(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let limit = usize::try_from(MAX_DOCUMENT_BYTES).expect("a few MiB");
    let (largest, too_large) = (TestBlob::of("at the limit", limit), TestBlob::of("over the limit", limit + 1));
    check_rejected(store.as_ref(), too_large.bytes.clone(), too_large.proof()?, &pin).await?;
    largest.write(store.as_ref(), &pin, &[]).await?;
    largest.check_content(store.as_ref()).await
}

pub(super) async fn a_blob_has_one_writer_at_a_time(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("two writers", SIZE);
    let (proof, metadata) = (blob.proof()?, BlobMetadata::default());
    let put = || store.put(blob.bytes.clone(), proof, &metadata, &pin);
    let (first, second) = tokio::join!(put(), put());
    // Waiting for the first writer is also correct.
    let is_right = |put: &Result<(), StoreError>| matches!(put, Ok(()) | Err(StoreError::Busy(_)));
    ensure(is_right(&first) && is_right(&second), format!("two writers: {first:?}, {second:?}"))?;
    ensure(first.is_ok() || second.is_ok(), "both writers are rejected")?;
    blob.check_content(store.as_ref()).await
}

pub(super) async fn only_whole_blobs_survive_a_kill(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let (named, pinned) = (TestBlob::of("named before the kill", 1000), TestBlob::of("pinned before the kill", 1000));
    let record = named.record("example.org/kept:1");
    let store = subject.store();
    let first_pin = store.pin(HOUR).await?;
    named.write(store.as_ref(), &first_pin, &[]).await?;
    store.put_image(&record).await?;
    store.release(first_pin).await?;
    let pin = store.pin(HOUR).await?;
    pinned.write(store.as_ref(), &pin, &[]).await?;
    let mut whole = digests(&[&named, &pinned]);
    // In containerd the later polls are in the middle of the messages.
    for polls in [1, 4, 8, 12, 16] {
        let explain = |Violation(failure)| Violation(format!("killed after {polls} polls: {failure}"));
        let unfinished = TestBlob::of(&format!("written until the kill after {polls}"), SIZE);
        let put = begin_put(subject.store(), &unfinished, &pin, polls).await?;
        subject.restart(UnfinishedWrite::Put(put)).await;
        subject.collect().await;

        let store = subject.store();
        if unfinished.is_in(store.as_ref()).await? {
            whole.insert(unfinished.digest);
        }
        let found = list_digests(store.as_ref()).await?;
        ensure(found == whole, format!("listed: {found:?}")).map_err(explain)?;
        let images = store.images().await?;
        ensure(images == [record.clone()], format!("records: {images:?}")).map_err(explain)?;
        let pin = store.pin(HOUR).await?;
        write_when_free(store.as_ref(), &unfinished, &pin).await.map_err(explain)?;
        for blob in [&named, &pinned, &unfinished] {
            blob.check_content(store.as_ref()).await.map_err(explain)?;
        }
        whole.insert(unfinished.digest);
    }
    Ok(())
}

/// Polls a `put` so many times.
async fn begin_put(
    store: Arc<dyn ContentStore>,
    blob: &TestBlob,
    pin: &Pin,
    polls: usize,
) -> Result<Pinned<Box<dyn Future<Output = Result<(), StoreError>> + Send>>, Violation> {
    let (bytes, proof, pin) = (blob.bytes.clone(), blob.proof()?, pin.clone());
    let mut put: Pinned<Box<dyn Future<Output = _> + Send>> =
        Box::pin(async move { store.put(bytes, proof, &BlobMetadata::default(), &pin).await });
    AbortAfter { inner: &mut put, polls }.await.transpose()?;
    Ok(put)
}

pub(super) async fn changes_are_counted(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let mut changes = store.changes();
    changes.mark_unchanged();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("counted", 10);
    blob.write(store.as_ref(), &pin, &[]).await?;
    wait_for_change(&mut changes, "a commit").await?;
    store.put_image(&blob.record("example.org/counted:1")).await?;
    wait_for_change(&mut changes, "a record").await?;
    store.release(pin).await?;
    wait_for_change(&mut changes, "a release, which may lose content").await
}

async fn wait_for_change(changes: &mut tokio::sync::watch::Receiver<u64>, after: &str) -> CheckResult {
    let changed = tokio::time::timeout(Duration::from_secs(5), changes.changed()).await;
    ensure(matches!(changed, Ok(Ok(()))), format!("the change counter did not move after {after}"))
}
