//! Only complete, verified blobs become visible, whatever happens to their writers.

use super::*;

pub(super) async fn a_dropped_writer_leaves_nothing(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("dropped", 700_000);
    let mut writer = store.create(blob.digest, blob.size(), &pin).await?;
    // Not the blob's bytes: a store that kept these bytes would return them after the second
    // attempt.
    writer.append(&[Bytes::from(vec![b'x'; 400_000])]).await?;
    drop(writer);

    ensure(!blob.is_in(store.as_ref()).await?, "half of a blob exists")?;
    let opened = store.open(blob.digest).await.map(|_| ());
    ensure(matches!(opened, Err(StoreError::Absent(_))), format!("open: {opened:?}"))?;
    ensure(list_digests(store.as_ref()).await?.is_empty(), "half of a blob is listed")?;

    blob.write(store.as_ref(), &pin, &[]).await?;
    blob.check_content(store.as_ref()).await
}

pub(super) async fn a_proof_of_another_blob_is_rejected(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let (wanted, other) = (TestBlob::of("wanted", 1000), TestBlob::of("not wanted", 1000));
    let mut writer = store.create(wanted.digest, wanted.size(), &pin).await?;
    writer.append(std::slice::from_ref(&other.bytes)).await?;
    let committed = writer.commit(other.proof()?, &BlobMetadata::default()).await;
    ensure(matches!(committed, Err(StoreError::Other(_))), format!("commit: {committed:?}"))?;
    ensure(list_digests(store.as_ref()).await?.is_empty(), "a blob exists after the rejected commit")
}

pub(super) async fn a_blob_of_another_length_is_rejected(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("length", 300_000);
    let longer = [&blob.bytes[..], b"!"].concat();
    for (what, bytes) in
        [("a byte short", blob.bytes.slice(1..)), ("a byte long", longer.into()), ("none", Bytes::new())]
    {
        let mut writer = store.create(blob.digest, blob.size(), &pin).await?;
        // A store may reject the bytes already here.
        if writer.append(&[bytes]).await.is_ok() {
            let committed = writer.commit(blob.proof()?, &BlobMetadata::default()).await;
            ensure(matches!(committed, Err(StoreError::Other(_))), format!("{what}: {committed:?}"))?;
        }
        ensure(list_digests(store.as_ref()).await?.is_empty(), format!("{what}: the blob exists nevertheless"))?;
    }
    Ok(())
}

pub(super) async fn a_blob_has_one_writer_at_a_time(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("two writers", 700_000);
    let (begin, end) = (blob.bytes.slice(..400_000), blob.bytes.slice(400_000..));
    let mut first = store.create(blob.digest, blob.size(), &pin).await?;
    first.append(&[begin]).await?;

    let second = tokio::time::timeout(Duration::from_secs(3), store.create(blob.digest, blob.size(), &pin)).await;
    // Waiting for the first writer is also correct.
    let is_rejected = match &second {
        Err(_) => true,
        Ok(answer) => matches!(answer, Err(StoreError::Busy(_))),
    };
    ensure(is_rejected, "one blob has two writers")?;

    first.append(&[end]).await?;
    first.commit(blob.proof()?, &BlobMetadata::default()).await?;
    blob.check_content(store.as_ref()).await
}

pub(super) async fn only_whole_blobs_survive_a_kill(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let (named, pinned) = (TestBlob::of("named before the kill", 1000), TestBlob::of("pinned before the kill", 1000));
    let half = TestBlob::of("half written before the kill", 700_000);
    let record = named.record("example.org/kept:1");
    let unfinished = {
        let store = subject.store();
        let first_pin = store.pin(HOUR).await?;
        named.write(store.as_ref(), &first_pin, &[]).await?;
        store.put_image(&record).await?;
        store.release(first_pin).await?;
        let pin = store.pin(HOUR).await?;
        pinned.write(store.as_ref(), &pin, &[]).await?;
        let mut unfinished = store.create(half.digest, half.size(), &pin).await?;
        unfinished.append(&[Bytes::from(vec![b'x'; 400_000])]).await?;
        unfinished
    };
    subject.restart(UnfinishedWrite::Written(unfinished)).await;
    subject.collect().await;

    let store = subject.store();
    let found = list_digests(store.as_ref()).await?;
    ensure(found == digests(&[&named, &pinned]), format!("listed after the kill: {found:?}"))?;
    named.check_content(store.as_ref()).await?;
    let images = store.images().await?;
    ensure(images == [record], format!("records after the kill: {images:?}"))?;
    let pin = store.pin(HOUR).await?;
    half.write(store.as_ref(), &pin, &[]).await?;
    half.check_content(store.as_ref()).await
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
