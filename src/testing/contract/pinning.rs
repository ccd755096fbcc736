//! Content under a pin or a record stays; other content is collected.

use super::*;

pub(super) async fn a_pin_protects_blobs_written_under_the_pin(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let (pin, other) = (store.pin(HOUR).await?, store.pin(HOUR).await?);
    let (pinned, child) = (TestBlob::of("held", 1000), TestBlob::of("child of the held", 1000));
    child.write(store.as_ref(), &other, &[]).await?;
    pinned.write(store.as_ref(), &pin, &[(&child, ChildKind::Layer)]).await?;
    store.release(other).await?;
    subject.collect().await;
    ensure(list_digests(store.as_ref()).await? == digests(&[&pinned, &child]), "pinned content was collected")?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(list_digests(store.as_ref()).await?.is_empty(), "released content without a record is not collected")
}

pub(super) async fn a_pin_protects_blobs_that_existed_before(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let (first, second) = (store.pin(HOUR).await?, store.pin(HOUR).await?);
    let blob = TestBlob::of("found", 1000);
    blob.write(store.as_ref(), &first, &[]).await?;
    blob.write(store.as_ref(), &second, &[]).await?;
    store.release(first).await?;
    subject.collect().await;
    ensure(blob.is_in(store.as_ref()).await?, "the second pin does not hold the existing blob")?;
    store.release(second).await?;
    subject.collect().await;
    ensure(!blob.is_in(store.as_ref()).await?, "a released pin holds the blob")
}

pub(super) async fn a_pin_expires(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(Duration::ZERO).await?;
    let blob = TestBlob::of("forgotten", 1000);
    blob.write(store.as_ref(), &pin, &[]).await?;
    subject.collect().await;
    ensure(!blob.is_in(store.as_ref()).await?, "a pin outlives its life")
}

pub(super) async fn a_renewed_pin_protects_earlier_and_later_blobs(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    // containerd collects on its own after a hundred changes of its metadata, counted anew from
    // here.
    subject.collect().await;
    let pin = store.pin(Duration::ZERO).await?;
    let blob = |what: &str| TestBlob::of(&format!("renewed {what}"), 500);
    let (before, half, after) = (blob("before"), blob("half"), blob("after"));
    before.write(store.as_ref(), &pin, &[]).await?;
    let staged = store.stage(half.digest, half.size(), &pin).await?;
    store.renew(&pin, HOUR).await?;
    subject.collect().await;
    ensure(before.is_in(store.as_ref()).await?, "the blob from before the renewal was collected")?;
    staged.write_at(0, std::slice::from_ref(&half.bytes)).await?;
    staged.commit(half.proof()?, &BlobMetadata::default()).await?;
    after.write(store.as_ref(), &pin, &[]).await?;
    store.renew(&pin, HOUR).await?;
    subject.collect().await;
    let found = list_digests(store.as_ref()).await?;
    ensure(found == digests(&[&before, &half, &after]), format!("after two renewals {found:?} are left"))?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(list_digests(store.as_ref()).await?.is_empty(), "a renewed pin holds content after its release")
}

pub(super) async fn a_renewed_pin_expires(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    subject.collect().await;
    let pin = store.pin(Duration::ZERO).await?;
    let blob = TestBlob::of("renewed and forgotten", 500);
    blob.write(store.as_ref(), &pin, &[]).await?;
    store.renew(&pin, Duration::ZERO).await?;
    let unfinished = store.stage(TestBlob::of("renewed and unfinished", 500).digest, 500, &pin).await?;
    subject.restart(UnfinishedWrite::Staged(unfinished)).await;
    subject.collect().await;
    let store = subject.store();
    ensure(!blob.is_in(store.as_ref()).await?, "a renewed pin outlives its life")?;
    let renewed = store.renew(&pin, HOUR).await;
    ensure(renewed.is_err(), "a pin that has ended can be renewed")
}

pub(super) async fn a_second_release_is_no_error(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    store.release(pin.clone()).await?;
    Ok(store.release(pin).await?)
}

pub(super) async fn added_metadata_replaces_nothing(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let parent = TestBlob::of("remembers", 500);
    let layers: Vec<_> = (0..12).map(|n| TestBlob::of(&format!("remembered layer {n}"), 100 + n)).collect();
    let config = TestBlob::of("remembered config", 50);
    for blob in layers.iter().chain([&config]) {
        blob.write(store.as_ref(), &pin, &[]).await?;
    }
    // Metadata at the commit, then more, then a repetition in another order, as when two recovered
    // images share a manifest.
    parent.write(store.as_ref(), &pin, &[(&layers[0], ChildKind::Layer), (&layers[1], ChildKind::Layer)]).await?;
    let more: Vec<_> = layers[2..].iter().map(|layer| (layer, ChildKind::Layer)).collect();
    store.add_metadata(parent.digest, &blob_metadata(&more)).await?;
    store.add_metadata(parent.digest, &blob_metadata(&[(&config, ChildKind::Config)])).await?;
    store.add_metadata(parent.digest, &blob_metadata(&[(&layers[5], ChildKind::Layer)])).await?;
    store.add_metadata(parent.digest, &BlobMetadata::default()).await?;

    store.put_image(&parent.record("example.org/remembers:1")).await?;
    store.release(pin).await?;
    subject.collect().await;
    let found = list_digests(store.as_ref()).await?;
    let lost: Vec<_> = layers.iter().chain([&config, &parent]).filter(|blob| !found.contains(&blob.digest)).collect();
    ensure(lost.is_empty(), format!("{} of 14 blobs were collected", lost.len()))
}

pub(super) async fn blobs_reachable_from_a_record_are_kept(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let blob = |what: &str| TestBlob::of(&format!("reached {what}"), 400);
    let (index, manifest, config, layer, stray) =
        (blob("index"), blob("manifest"), blob("config"), blob("layer"), blob("by nothing"));
    // The index also lists a manifest for another platform, which is not in the store.
    let elsewhere = blob("other platform");
    for leaf in [&config, &layer, &stray] {
        leaf.write(store.as_ref(), &pin, &[]).await?;
    }
    manifest.write(store.as_ref(), &pin, &[(&config, ChildKind::Config), (&layer, ChildKind::Layer)]).await?;
    index.write(store.as_ref(), &pin, &[(&elsewhere, ChildKind::Manifest), (&manifest, ChildKind::Manifest)]).await?;
    store.put_image(&index.record("example.org/reached:1")).await?;
    store.release(pin).await?;
    subject.collect().await;
    let found = list_digests(store.as_ref()).await?;
    ensure(found == digests(&[&index, &manifest, &config, &layer]), format!("left: {found:?}"))
}

pub(super) async fn metadata_of_a_written_blob_is_listed(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let (parent, child) = (TestBlob::of("seen parent", 300), TestBlob::of("seen child", 30));
    let from = |path: &str| Some(Repository { registry: "10.0.0.1:5000".into(), path: path.into() });
    child.write(store.as_ref(), &pin, &[]).await?;
    let (bytes, proof) = (&parent.bytes, parent.proof()?);
    let put = async |metadata| store.put(bytes.clone(), proof, &metadata, &pin).await;
    put(BlobMetadata { source: from("team/b"), children: Vec::new() }).await?;
    // The second call finds the blob, and adds metadata.
    put(blob_metadata(&[(&child, ChildKind::Config)])).await?;
    store.add_metadata(parent.digest, &BlobMetadata { source: from("team/a"), children: Vec::new() }).await?;

    let sources = [from("team/a"), from("team/b")].into_iter().flatten().collect();
    let expected = [
        BlobInfo { digest: child.digest, size: 30, sources: Vec::new(), has_children: false },
        BlobInfo { digest: parent.digest, size: 300, sources, has_children: true },
    ];
    let mut found = store.blobs().await?;
    found.sort_by_key(|blob| blob.size);
    ensure(found == expected, format!("listed: {found:?}"))?;
    let found = store.blob(parent.digest).await?;
    ensure(found.as_ref() == Some(&expected[1]), format!("a single lookup returns {found:?}"))
}

pub(super) async fn a_discarded_blob_can_be_written_again(subject: &mut dyn StoreUnderTest) -> CheckResult {
    let store = subject.store();
    let (first, pin) = (store.pin(HOUR).await?, store.pin(HOUR).await?);
    let (parent, child) = (TestBlob::of("discarded parent", 300), TestBlob::of("discarded child", 30));
    let record = parent.record("example.org/discarded:1");
    child.write(store.as_ref(), &first, &[]).await?;
    parent.write(store.as_ref(), &first, &[(&child, ChildKind::Layer)]).await?;
    store.put_image(&record).await?;
    store.release(first).await?;

    store.discard(parent.digest, &pin).await?;
    store.discard(parent.digest, &pin).await?;
    ensure(!parent.is_in(store.as_ref()).await?, "a discarded blob still exists")?;
    subject.collect().await;
    ensure(child.is_in(store.as_ref()).await?, "the child of the discarded blob was collected")?;
    let images = store.images().await?;
    ensure(images == [record], format!("records: {images:?}"))?;

    parent.write(store.as_ref(), &pin, &[(&child, ChildKind::Layer)]).await?;
    parent.check_content(store.as_ref()).await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(
        list_digests(store.as_ref()).await? == digests(&[&parent, &child]),
        "the record does not hold the blob that was written again",
    )
}
