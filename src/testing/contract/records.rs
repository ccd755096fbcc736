//! Image records name existing blobs.

use super::*;

pub(super) async fn a_record_needs_its_target(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let blob = TestBlob::of("target that is not there", 64);
    let put = store.put_image(&blob.record("example.org/nothing:1")).await;
    ensure(matches!(put, Err(StoreError::Absent(_))), format!("put_image: {put:?}"))?;
    ensure(store.images().await?.is_empty(), "a record without a target is listed")
}

pub(super) async fn a_record_replaces_the_record_of_the_same_name(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let (old, new) = (TestBlob::of("old target", 100), TestBlob::of("new target", 200));
    old.write(store.as_ref(), &pin, &[]).await?;
    new.write(store.as_ref(), &pin, &[]).await?;
    let name = "example.org/moved:1";
    store.put_image(&old.record(name)).await?;
    store.put_image(&new.record(name)).await?;
    let images = store.images().await?;
    ensure(images == [new.record(name)], format!("records: {images:?}"))?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(list_digests(store.as_ref()).await? == digests(&[&new]), "the record still holds its former target")
}

pub(super) async fn a_record_is_removed_only_with_the_right_target(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let (gone, kept) = (TestBlob::of("target of the removed", 100), TestBlob::of("target of the kept", 200));
    gone.write(store.as_ref(), &pin, &[]).await?;
    kept.write(store.as_ref(), &pin, &[]).await?;
    let (removed, other) = (gone.record("example.org/removed:1"), kept.record("example.org/removed:10"));
    store.put_image(&removed).await?;
    store.put_image(&other).await?;
    store.release(pin).await?;

    store.remove_image(&removed.name, kept.digest).await?;
    store.remove_image("example.org/removed", gone.digest).await?;
    let images = store.images().await?;
    ensure(images.len() == 2, format!("after removing missing records: {images:?}"))?;
    let mut changes = store.changes();
    changes.mark_unchanged();
    store.remove_image(&removed.name, gone.digest).await?;
    ensure(changes.has_changed().unwrap_or(false), "the change counter did not move")?;
    store.remove_image(&removed.name, gone.digest).await?;
    let images = store.images().await?;
    ensure(images == [other], format!("left: {images:?}"))?;
    subject.collect().await;
    ensure(
        list_digests(store.as_ref()).await? == digests(&[&kept]),
        "the target of the removed record is not collected",
    )
}

pub(super) async fn concurrent_record_writes_all_succeed(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = TestBlob::of("target of many", 100);
    blob.write(store.as_ref(), &pin, &[]).await?;
    let by_digest = format!("example.org/many@{}", blob.digest);
    let names = ["example.org/many:1", "example.org:5000/many:2", "a name that is no reference", &by_digest];
    let mut writing = tokio::task::JoinSet::new();
    for name in names {
        let (store, record) = (store.clone(), blob.record(name));
        writing.spawn(async move { store.put_image(&record).await });
    }
    for put in writing.join_all().await {
        put?;
    }
    let mut found: Vec<_> = store.images().await?.into_iter().map(|record| record.name).collect();
    let mut expected = names.map(str::to_owned);
    found.sort();
    expected.sort();
    ensure(found == expected, format!("records: {found:?}"))
}
