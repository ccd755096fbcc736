//! Pieces in any order make a blob once they are verified, and no blob before.

use std::ops::Range;

use super::*;

/// Three of the smallest pieces, and a bit.
const SIZE: usize = (3 << 18) + 12_345;

/// Writes the whole blob, the end first, in batches of chunks of any length, some of them empty.
async fn write_backwards(staged: &dyn StagedBlob, blob: &TestBlob) -> CheckResult {
    staged.write_at(0, &[]).await?;
    for piece in (0..blob.bytes.len().div_ceil(1 << 18)).rev() {
        let begin = piece << 18;
        let bytes = blob.bytes.slice(begin..blob.bytes.len().min(begin + (1 << 18)));
        for (number, batch) in bytes.chunks(100_000).enumerate().collect::<Vec<_>>().into_iter().rev() {
            let mut chunks: Vec<_> = batch.chunks(33_001).map(|chunk| bytes.slice_ref(chunk)).collect();
            chunks.push(Bytes::new());
            staged.write_at((begin + 100_000 * number) as u64, &chunks).await?;
        }
    }
    Ok(())
}

/// Reads a range, with as many reads as necessary.
async fn read(staged: &dyn StagedBlob, range: Range<usize>) -> Result<Vec<u8>, Violation> {
    let mut bytes = Vec::new();
    while bytes.len() < range.len() {
        let read = staged.read_at((range.start + bytes.len()) as u64, range.len() - bytes.len()).await?;
        ensure(!read.is_empty(), format!("no bytes at {} of {range:?}", bytes.len()))?;
        bytes.extend_from_slice(&read);
    }
    ensure(bytes.len() == range.len(), "a read returned more than its limit")?;
    Ok(bytes)
}

fn covers(ranges: &[Range<u64>], range: &Range<usize>) -> bool {
    ranges.iter().any(|part| part.start <= range.start as u64 && range.end as u64 <= part.end)
}

pub(super) async fn pieces_in_any_order_make_the_blob(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    for (size, reason) in [
        (0, "an empty layer is a blob too"),
        (1, "the shortest blob with bytes"),
        (1 << 18, "exactly a piece"),
        (SIZE, "several pieces with a short last one"),
        (5 << 20, "several messages of any store that sends messages"),
    ] {
        let explain = |Violation(failure)| Violation(format!("{size} bytes ({reason}): {failure}"));
        let blob = TestBlob::of("any order", size);
        let staged = store.stage(blob.digest, blob.size(), &pin).await?;
        ensure(staged.resumed_ranges().is_empty(), "a new staged blob has earlier pieces").map_err(explain)?;
        write_backwards(&*staged, &blob).await.map_err(explain)?;
        staged.commit(blob.proof()?, &BlobMetadata::default()).await.map_err(Violation::from).map_err(explain)?;
        blob.check_content(store.as_ref()).await.map_err(explain)?;
        ensure(read(&*staged, 0..size).await? == blob.bytes, "other bytes after the commit").map_err(explain)?;
    }
    Ok(())
}

pub(super) async fn a_staged_blob_is_invisible_before_the_commit(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("not there yet", SIZE);
    let staged = store.stage(blob.digest, blob.size(), &pin).await?;
    let last = SIZE - 12_345..SIZE;
    staged.write_at(last.start as u64, &[blob.bytes.slice(last.clone())]).await?;
    ensure(read(&*staged, last.clone()).await? == blob.bytes[last.clone()], "the bytes differ from those written")?;
    ensure(read(&*staged, 5000..6000).await? == [0; 1000], "unwritten bytes are not zeros")?;
    ensure(staged.read_at(SIZE as u64, 10).await?.is_empty(), "a read beyond the end returned bytes")?;
    let beyond = staged.write_at(SIZE as u64 - 1, &[Bytes::from_static(b"xy")]).await;
    ensure(matches!(beyond, Err(StoreError::Other(_))), format!("a write beyond the end: {beyond:?}"))?;

    write_backwards(&*staged, &blob).await?;
    subject.collect().await;
    ensure(!blob.is_in(store.as_ref()).await?, "a staged blob exists before its commit")?;
    ensure(list_digests(store.as_ref()).await?.is_empty(), "a staged blob is listed before its commit")?;
    let opened = store.open(blob.digest).await.map(|_| ());
    ensure(matches!(opened, Err(StoreError::Absent(_))), format!("open: {opened:?}"))
}

pub(super) async fn a_staged_blob_rejects_the_proof_of_another_blob(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let (wanted, other) = (TestBlob::of("staged", 1000), TestBlob::of("not staged", 1000));
    let staged = store.stage(wanted.digest, wanted.size(), &pin).await?;
    staged.write_at(0, std::slice::from_ref(&other.bytes)).await?;
    let committed = staged.commit(other.proof()?, &BlobMetadata::default()).await;
    ensure(matches!(committed, Err(StoreError::Other(_))), format!("commit: {committed:?}"))?;
    ensure(list_digests(store.as_ref()).await?.is_empty(), "a blob exists after the rejected commit")
}

pub(super) async fn writes_after_the_commit_are_rejected(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("committed and then written to", SIZE);
    let staged = store.stage(blob.digest, blob.size(), &pin).await?;
    write_backwards(&*staged, &blob).await?;
    staged.commit(blob.proof()?, &BlobMetadata::default()).await?;
    let wrong = staged.write_at(1000, &[Bytes::from_static(b"wrong")]).await;
    ensure(matches!(wrong, Err(StoreError::Other(_))), format!("a write after the commit: {wrong:?}"))?;
    // A committed blob stays.
    staged.abandon().await;
    ensure(read(&*staged, 0..SIZE).await? == blob.bytes, "the handle cannot read the committed blob")?;
    drop(staged);
    blob.check_content(store.as_ref()).await
}

/// Stages the second half of a blob.
async fn stage_second_half(
    store: &dyn ContentStore,
    blob: &TestBlob,
    pin: &Pin,
) -> Result<(Arc<dyn StagedBlob>, Range<usize>), Violation> {
    let staged = store.stage(blob.digest, blob.size(), pin).await?;
    let written = SIZE / 2..SIZE;
    staged.write_at(written.start as u64, &[blob.bytes.slice(written.clone())]).await?;
    Ok((staged, written))
}

/// Resumes from the written range and commits.
async fn resume_and_commit(store: &dyn ContentStore, blob: &TestBlob, pin: &Pin, written: Range<usize>) -> CheckResult {
    let staged = store.stage(blob.digest, blob.size(), pin).await?;
    let ranges = staged.resumed_ranges();
    ensure(covers(&ranges, &written), format!("{written:?} was written, left is {ranges:?}"))?;
    ensure(ranges.iter().all(|part| part.start < part.end && part.end <= blob.size()), format!("left is {ranges:?}"))?;
    ensure(ranges.windows(2).all(|pair| pair[0].end < pair[1].start), format!("left is {ranges:?}"))?;
    ensure(read(&*staged, written.clone()).await? == blob.bytes[written.clone()], "other bytes are left")?;
    staged.write_at(0, &[blob.bytes.slice(..written.start)]).await?;
    staged.commit(blob.proof()?, &BlobMetadata::default()).await?;
    blob.check_content(store).await
}

pub(super) async fn a_dropped_staged_blob_is_resumed(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("staged and dropped", SIZE);
    let (staged, written) = stage_second_half(store.as_ref(), &blob, &pin).await?;
    drop(staged);
    ensure(list_digests(store.as_ref()).await?.is_empty(), "half of a blob is listed")?;
    resume_and_commit(store.as_ref(), &blob, &pin, written).await
}

pub(super) async fn a_staged_blob_is_resumed_after_a_kill(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let blob = TestBlob::of("staged before the kill", SIZE);
    let (unfinished, written) = {
        let store = subject.store();
        let pin = store.pin(HOUR).await?;
        stage_second_half(store.as_ref(), &blob, &pin).await?
    };
    subject.restart(UnfinishedWrite::Staged(unfinished)).await;
    subject.collect().await;
    let store = subject.store();
    ensure(list_digests(store.as_ref()).await?.is_empty(), "half of a blob is listed after the kill")?;
    let pin = store.pin(HOUR).await?;
    resume_and_commit(store.as_ref(), &blob, &pin, written).await
}

pub(super) async fn an_abandoned_staged_blob_is_not_resumed(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("abandoned", SIZE);
    let (staged, _) = stage_second_half(store.as_ref(), &blob, &pin).await?;
    staged.abandon().await;
    let wrong = staged.write_at(0, &[Bytes::from_static(b"wrong")]).await;
    ensure(matches!(wrong, Err(StoreError::Other(_))), format!("a write to an abandoned blob: {wrong:?}"))?;
    let committed = staged.commit(blob.proof()?, &BlobMetadata::default()).await;
    ensure(matches!(committed, Err(StoreError::Other(_))), format!("a commit of an abandoned blob: {committed:?}"))?;
    drop(staged);
    ensure(list_digests(store.as_ref()).await?.is_empty(), "an abandoned blob is listed")?;
    let staged = store.stage(blob.digest, blob.size(), &pin).await?;
    ensure(staged.resumed_ranges().is_empty(), format!("left is {:?}", staged.resumed_ranges()))?;
    write_backwards(&*staged, &blob).await?;
    staged.commit(blob.proof()?, &BlobMetadata::default()).await?;
    blob.check_content(store.as_ref()).await
}

pub(super) async fn a_blob_is_staged_once_and_only_while_absent(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let (pin, other) = (store.pin(HOUR).await?, store.pin(HOUR).await?);
    let blob = TestBlob::of("staged once", SIZE);
    let staged = store.stage(blob.digest, blob.size(), &pin).await?;
    let second = store.stage(blob.digest, blob.size(), &pin).await.map(|_| ());
    ensure(matches!(second, Err(StoreError::Busy(_))), format!("staged twice: {second:?}"))?;
    let put = store.put(blob.bytes.clone(), blob.proof()?, &BlobMetadata::default(), &pin).await;
    ensure(matches!(put, Err(StoreError::Busy(_))), format!("a document beside the staged blob: {put:?}"))?;
    write_backwards(&*staged, &blob).await?;
    staged.commit(blob.proof()?, &BlobMetadata::default()).await?;
    drop(staged);

    let again = store.stage(blob.digest, blob.size(), &other).await.map(|_| ());
    ensure(matches!(again, Err(StoreError::AlreadyExists(_))), format!("staged while the blob exists: {again:?}"))?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(blob.is_in(store.as_ref()).await?, "the second pin does not hold the existing blob")?;
    let unpinned =
        store.stage(TestBlob::of("staged without a pin", 10).digest, 10, &Pin("unknown".into())).await.map(|_| ());
    ensure(matches!(unpinned, Err(StoreError::Other(_))), format!("staged under an unknown pin: {unpinned:?}"))
}

pub(super) async fn a_pin_protects_blobs_staged_under_the_pin(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("staged and held", SIZE);
    let staged = store.stage(blob.digest, blob.size(), &pin).await?;
    write_backwards(&*staged, &blob).await?;
    staged.commit(blob.proof()?, &BlobMetadata::default()).await?;
    subject.collect().await;
    blob.check_content(store.as_ref()).await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(!blob.is_in(store.as_ref()).await?, "released content without a record is not collected")
}

pub(super) async fn metadata_of_a_staged_blob_is_listed(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let (pin, other) = (store.pin(HOUR).await?, store.pin(HOUR).await?);
    let (parent, child) = (TestBlob::of("staged parent", 300), TestBlob::of("staged child", 30));
    let source = Repository { registry: "10.0.0.1:5000".into(), path: "team/staged".into() };
    child.write(store.as_ref(), &other, &[]).await?;
    let mut changes = store.changes();
    changes.mark_unchanged();
    let staged = store.stage(parent.digest, parent.size(), &pin).await?;
    staged.write_at(0, std::slice::from_ref(&parent.bytes)).await?;
    let metadata = BlobMetadata { source: Some(source.clone()), ..blob_metadata(&[(&child, ChildKind::Layer)]) };
    staged.commit(parent.proof()?, &metadata).await?;
    ensure(changes.has_changed().unwrap_or_default(), "the change counter did not move after a commit")?;
    let expected = BlobInfo { digest: parent.digest, size: 300, sources: vec![source], has_children: true };
    let found = store.blob(parent.digest).await?;
    ensure(found == Some(expected), format!("a lookup returns {found:?}"))?;
    store.release(other).await?;
    subject.collect().await;
    ensure(child.is_in(store.as_ref()).await?, "the child of the staged blob was collected")
}
