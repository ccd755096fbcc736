//! Pieces in any order make a blob when they are proved, and nothing before.

use std::ops::Range;

use super::*;

/// Three of the smallest pieces that are cut, and a bit.
const SIZE: usize = (3 << 18) + 12_345;

/// Everything, the end first, in batches of chunks that end anywhere; some of them are empty.
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

/// The bytes of a range, however many come at once.
async fn read(staged: &dyn StagedBlob, range: Range<usize>) -> Result<Vec<u8>, Violation> {
    let mut bytes = Vec::new();
    while bytes.len() < range.len() {
        let read = staged.read_at((range.start + bytes.len()) as u64, range.len() - bytes.len()).await?;
        ensure(!read.is_empty(), format!("nothing to read {} bytes into {range:?}", bytes.len()))?;
        bytes.extend_from_slice(&read);
    }
    ensure(bytes.len() == range.len(), "more is read than was asked for")?;
    Ok(bytes)
}

fn covers(left: &[Range<u64>], range: &Range<usize>) -> bool {
    left.iter().any(|part| part.start <= range.start as u64 && range.end as u64 <= part.end)
}

pub(super) async fn pieces_in_any_order_make_the_blob(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    for (size, reason) in [
        (0, "an empty layer is a blob too"),
        (1, "the shortest that has bytes"),
        (1 << 18, "exactly a piece"),
        (SIZE, "several pieces, of which the last is short"),
        (5 << 20, "several messages of any store that sends messages"),
    ] {
        let explain = |Violation(failure)| Violation(format!("{size} bytes ({reason}): {failure}"));
        let blob = TestBlob::of("any order", size);
        let staged = store.stage(blob.digest, blob.size(), &pin).await?;
        ensure(staged.resumed_ranges().is_empty(), "something is left of what was never staged").map_err(explain)?;
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
    ensure(read(&*staged, last.clone()).await? == blob.bytes[last.clone()], "other bytes than were written")?;
    ensure(read(&*staged, 5000..6000).await? == [0; 1000], "no zeros where nothing was written")?;
    ensure(staged.read_at(SIZE as u64, 10).await?.is_empty(), "there are bytes beyond the end")?;
    let beyond = staged.write_at(SIZE as u64 - 1, &[Bytes::from_static(b"xy")]).await;
    ensure(matches!(beyond, Err(StoreError::Other(_))), format!("a write beyond the end: {beyond:?}"))?;

    write_backwards(&*staged, &blob).await?;
    subject.collect().await;
    ensure(!blob.is_in(store.as_ref()).await?, "what is staged is there")?;
    ensure(listed(store.as_ref()).await?.is_empty(), "what is staged is listed")?;
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
    ensure(listed(store.as_ref()).await?.is_empty(), "something is there nevertheless")
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
    // What came to be a blob stays one.
    staged.abandon().await;
    ensure(read(&*staged, 0..SIZE).await? == blob.bytes, "it cannot be read any more where it was staged")?;
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

/// Finds again what was written, and finishes.
async fn resume_and_commit(store: &dyn ContentStore, blob: &TestBlob, pin: &Pin, written: Range<usize>) -> CheckResult {
    let staged = store.stage(blob.digest, blob.size(), pin).await?;
    let left = staged.resumed_ranges();
    ensure(covers(&left, &written), format!("{written:?} was written, left is {left:?}"))?;
    ensure(left.iter().all(|part| part.start < part.end && part.end <= blob.size()), format!("left is {left:?}"))?;
    ensure(left.windows(2).all(|pair| pair[0].end < pair[1].start), format!("left is {left:?}"))?;
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
    ensure(listed(store.as_ref()).await?.is_empty(), "half of a blob is listed")?;
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
    ensure(listed(store.as_ref()).await?.is_empty(), "half of a blob is listed after the kill")?;
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
    ensure(matches!(wrong, Err(StoreError::Other(_))), format!("a write to what was abandoned: {wrong:?}"))?;
    let committed = staged.commit(blob.proof()?, &BlobMetadata::default()).await;
    ensure(matches!(committed, Err(StoreError::Other(_))), format!("a commit of what was abandoned: {committed:?}"))?;
    drop(staged);
    ensure(listed(store.as_ref()).await?.is_empty(), "what was abandoned is listed")?;
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
    let writer = store.create(blob.digest, blob.size(), &pin).await.map(|_| ());
    ensure(matches!(writer, Err(StoreError::Busy(_))), format!("a writer beside it: {writer:?}"))?;
    write_backwards(&*staged, &blob).await?;
    staged.commit(blob.proof()?, &BlobMetadata::default()).await?;
    drop(staged);

    let again = store.stage(blob.digest, blob.size(), &other).await.map(|_| ());
    ensure(matches!(again, Err(StoreError::AlreadyExists(_))), format!("staged when it is there: {again:?}"))?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(blob.is_in(store.as_ref()).await?, "what was there already is not held by the second pin")?;
    let gone = store.stage(TestBlob::of("staged for nobody", 10).digest, 10, &Pin("nobody's".into())).await.map(|_| ());
    ensure(matches!(gone, Err(StoreError::Other(_))), format!("staged under a pin that is gone: {gone:?}"))
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
    ensure(!blob.is_in(store.as_ref()).await?, "released content that nothing names is not collected")
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
    let known = BlobMetadata { source: Some(source.clone()), ..remembered(&[(&child, ChildKind::Layer)]) };
    staged.commit(parent.proof()?, &known).await?;
    ensure(changes.has_changed().unwrap_or_default(), "the counter does not move after a commit")?;
    let expected = BlobInfo { digest: parent.digest, size: 300, sources: vec![source], has_children: true };
    let found = store.blob(parent.digest).await?;
    ensure(found == Some(expected), format!("it says {found:?}"))?;
    store.release(other).await?;
    subject.collect().await;
    ensure(child.is_in(store.as_ref()).await?, "the child of what was staged was collected")
}
