//! Contract of every [`Unpacker`], as checks for each implementation.

use super::*;
use crate::oci::StackedLayer;
use crate::ports::{UnpackError, UnpackOutcome, Unpacker};
use crate::testing::image::{Compression, MadeImage, Recipe, make_image};

/// A store with an unpacker, under test.
#[async_trait]
pub trait UnpackingStore: StoreUnderTest {
    /// Unpacks layers of the store.
    fn unpacker(&self) -> Arc<dyn Unpacker>;

    /// Chain IDs of all unpacked layers.
    async fn unpacked(&self) -> BTreeSet<Digest>;

    /// Number of partial snapshots.
    async fn half_unpacked(&self) -> usize;
}

/// Runs every check on a new store and panics with all failures.
///
/// # Panics
/// When the store violates the contract; the message names the check.
pub async fn assert_unpacking_contract<S: UnpackingStore>(name: &str, make: impl AsyncFn() -> S) {
    let violations = unpacking_violations(make).await;
    assert!(violations.is_empty(), "{name} violates the contract:\n{}", violations.join("\n"));
}

/// Runs every check on a new store. Returns one line per failure, which begins with the check's
/// name.
pub(super) async fn unpacking_violations<S: UnpackingStore>(make: impl AsyncFn() -> S) -> Vec<String> {
    let mut violations = Vec::new();
    for (name, check) in checks() {
        let subject = make().await;
        match tokio::time::timeout(DEADLINE, check(&subject)).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => violations.push(format!("{name}: {failure}")),
            Err(_) => violations.push(format!("{name}: not done after {} s", DEADLINE.as_secs())),
        }
    }
    violations
}

type Check = for<'a> fn(&'a dyn UnpackingStore) -> Pinned<Box<dyn Future<Output = CheckResult> + 'a>>;

fn checks() -> impl IntoIterator<Item = (&'static str, Check)> {
    macro_rules! named {
        ($($check:ident),* $(,)?) => {
            [$((stringify!($check), (|subject| Box::pin($check(subject))) as Check)),*]
        };
    }
    named![
        every_compression_is_unpacked_under_the_chain_id,
        an_unpacked_layer_is_found_by_chain_id,
        an_unpacked_layer_is_not_unpacked_again,
        images_share_unpacked_layers,
        a_diff_id_mismatch_is_rejected_and_leaves_nothing,
        an_absent_layer_is_an_error_and_leaves_nothing,
        a_layer_needs_the_parent_layer,
        a_pin_protects_layers_unpacked_under_the_pin,
        a_renewed_pin_protects_layers_unpacked_under_the_pin,
        a_pin_protects_layers_unpacked_before,
        a_kept_snapshot_lives_as_long_as_the_image,
        an_absent_configuration_keeps_no_snapshot,
    ]
}

impl From<UnpackError> for Violation {
    fn from(error: UnpackError) -> Self {
        Self(format!("unpacking failed: {error}"))
    }
}

async fn image(
    subject: &dyn UnpackingStore,
    name: &str,
    layers: &[u64],
    compression: Compression,
) -> Result<MadeImage, Violation> {
    let recipe = Recipe { layers: layers.to_vec(), compression, ..Recipe::default() };
    let seed = name.bytes().fold(0, |seed, byte| seed << 5 ^ seed >> 59 ^ u64::from(byte));
    Ok(make_image(&*subject.store(), &[format!("r.test/unpacked/{name}:1")], &recipe, seed).await?)
}

async fn unpack_all(
    subject: &dyn UnpackingStore,
    image: &MadeImage,
    pin: &Pin,
    expected: UnpackOutcome,
) -> CheckResult {
    for layer in &image.layers {
        let unpacked = subject.unpacker().unpack(layer, pin).await?;
        ensure(unpacked == expected, format!("{} was unpacked {unpacked:?}", layer.blob.digest))?;
    }
    Ok(())
}

fn chain_ids(layers: &[StackedLayer]) -> BTreeSet<Digest> {
    layers.iter().map(|layer| layer.chain_id).collect()
}

async fn ensure_unpacked(subject: &dyn UnpackingStore, expected: BTreeSet<Digest>, when: &str) -> CheckResult {
    let found = subject.unpacked().await;
    ensure(found == expected, format!("{when}: unpacked are {found:?} instead of {expected:?}"))?;
    ensure(subject.half_unpacked().await == 0, format!("{when}: a partial snapshot is left"))
}

async fn an_unpacked_layer_is_found_by_chain_id(subject: &dyn UnpackingStore) -> CheckResult {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "found", &[1000, 10], Compression::Gzip).await?;
    for layer in &image.layers {
        let before = subject.store().snapshots(layer.chain_id).await?.snapshotters;
        ensure(before.is_empty(), format!("{} is in {before:?} before it is unpacked", layer.chain_id))?;
        subject.unpacker().unpack(layer, &pin).await?;
        let found = subject.store().snapshots(layer.chain_id).await?.snapshotters;
        ensure(found.len() == 1, format!("{} is in {found:?}", layer.chain_id))?;
    }
    Ok(())
}

async fn every_compression_is_unpacked_under_the_chain_id(subject: &dyn UnpackingStore) -> CheckResult {
    let pin = subject.store().pin(HOUR).await?;
    let mut expected = BTreeSet::new();
    for (name, compression) in [("plain", Compression::Plain), ("gzip", Compression::Gzip), ("zstd", Compression::Zstd)]
    {
        let image = image(subject, name, &[300_000, 10], compression).await?;
        unpack_all(subject, &image, &pin, UnpackOutcome::Unpacked).await?;
        expected.extend(chain_ids(&image.layers));
        ensure_unpacked(subject, expected.clone(), name).await?;
    }
    Ok(())
}

async fn an_unpacked_layer_is_not_unpacked_again(subject: &dyn UnpackingStore) -> CheckResult {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "twice", &[1000, 10], Compression::Gzip).await?;
    unpack_all(subject, &image, &pin, UnpackOutcome::Unpacked).await?;
    unpack_all(subject, &image, &pin, UnpackOutcome::AlreadyUnpacked).await?;
    ensure_unpacked(subject, chain_ids(&image.layers), "twice").await
}

/// Both images have the same seed, so their first layers are the same.
async fn images_share_unpacked_layers(subject: &dyn UnpackingStore) -> CheckResult {
    let pin = subject.store().pin(HOUR).await?;
    let base = image(subject, "shared", &[1000, 10], Compression::Gzip).await?;
    let more = image(subject, "shared", &[1000, 10, 20], Compression::Gzip).await?;
    unpack_all(subject, &base, &pin, UnpackOutcome::Unpacked).await?;
    let mut outcomes = Vec::new();
    for layer in &more.layers {
        outcomes.push(subject.unpacker().unpack(layer, &pin).await?);
    }
    ensure(
        outcomes == [UnpackOutcome::AlreadyUnpacked, UnpackOutcome::AlreadyUnpacked, UnpackOutcome::Unpacked],
        format!("unpacked {outcomes:?}"),
    )?;
    ensure_unpacked(subject, chain_ids(&more.layers), "two images").await
}

async fn a_diff_id_mismatch_is_rejected_and_leaves_nothing(subject: &dyn UnpackingStore) -> CheckResult {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "false", &[1000, 10], Compression::Gzip).await?;
    let [base, top] = &image.layers[..] else { return ensure(false, "the image does not have two layers") };
    subject.unpacker().unpack(base, &pin).await?;
    let false_id = StackedLayer { diff_id: Digest::of(b"something else"), ..top.clone() };
    let rejected = subject.unpacker().unpack(&false_id, &pin).await;
    let is_reported = matches!(&rejected, Err(UnpackError::DiffIdMismatch { expected, actual })
        if *expected == false_id.diff_id && *actual == top.diff_id.to_string());
    ensure(is_reported, format!("another diff ID: {rejected:?}"))?;
    ensure_unpacked(subject, chain_ids(&image.layers[..1]), "refused").await?;
    subject.unpacker().unpack(top, &pin).await?;
    ensure_unpacked(subject, chain_ids(&image.layers), "the right layer afterwards").await
}

async fn an_absent_layer_is_an_error_and_leaves_nothing(subject: &dyn UnpackingStore) -> CheckResult {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "absent", &[1000], Compression::Plain).await?;
    let mut absent = image.layers[0].clone();
    absent.blob.digest = Digest::of(b"a layer that is nowhere");
    let failed = subject.unpacker().unpack(&absent, &pin).await;
    ensure(matches!(failed, Err(UnpackError::Store(_))), format!("an absent layer: {failed:?}"))?;
    ensure_unpacked(subject, BTreeSet::new(), "absent").await
}

async fn a_layer_needs_the_parent_layer(subject: &dyn UnpackingStore) -> CheckResult {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "upper", &[1000, 10], Compression::Plain).await?;
    let failed = subject.unpacker().unpack(&image.layers[1], &pin).await;
    ensure(matches!(failed, Err(UnpackError::Store(_))), format!("without the parent layer: {failed:?}"))?;
    ensure_unpacked(subject, BTreeSet::new(), "without the parent layer").await
}

async fn a_pin_protects_layers_unpacked_under_the_pin(subject: &dyn UnpackingStore) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let image = image(subject, "pinned", &[1000, 10], Compression::Gzip).await?;
    unpack_all(subject, &image, &pin, UnpackOutcome::Unpacked).await?;
    subject.collect().await;
    ensure_unpacked(subject, chain_ids(&image.layers), "pinned").await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure_unpacked(subject, BTreeSet::new(), "released").await
}

async fn a_renewed_pin_protects_layers_unpacked_under_the_pin(subject: &dyn UnpackingStore) -> CheckResult {
    let store = subject.store();
    let image = image(subject, "renewed", &[1000, 10], Compression::Gzip).await?;
    // containerd collects on its own after a hundred changes of its metadata, counted anew from
    // here.
    subject.collect().await;
    let pin = store.pin(Duration::ZERO).await?;
    unpack_all(subject, &image, &pin, UnpackOutcome::Unpacked).await?;
    store.renew(&pin, HOUR).await?;
    subject.collect().await;
    ensure_unpacked(subject, chain_ids(&image.layers), "renewed").await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure_unpacked(subject, BTreeSet::new(), "released").await
}

async fn a_pin_protects_layers_unpacked_before(subject: &dyn UnpackingStore) -> CheckResult {
    let store = subject.store();
    let (first, second) = (store.pin(HOUR).await?, store.pin(HOUR).await?);
    let image = image(subject, "found", &[1000, 10], Compression::Gzip).await?;
    unpack_all(subject, &image, &first, UnpackOutcome::Unpacked).await?;
    unpack_all(subject, &image, &second, UnpackOutcome::AlreadyUnpacked).await?;
    store.release(first).await?;
    subject.collect().await;
    ensure_unpacked(subject, chain_ids(&image.layers), "held by the second pin").await
}

async fn a_kept_snapshot_lives_as_long_as_the_image(subject: &dyn UnpackingStore) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let image = image(subject, "kept", &[1000, 10], Compression::Gzip).await?;
    unpack_all(subject, &image, &pin, UnpackOutcome::Unpacked).await?;
    subject.unpacker().keep_snapshot(image.blobs[0].digest, image.layers[1].chain_id).await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure_unpacked(subject, chain_ids(&image.layers), "kept").await?;
    store.remove_image("r.test/unpacked/kept:1", image.target.digest).await?;
    subject.collect().await;
    ensure_unpacked(subject, BTreeSet::new(), "without the image").await
}

async fn an_absent_configuration_keeps_no_snapshot(subject: &dyn UnpackingStore) -> CheckResult {
    let absent = Digest::of(b"a configuration that is nowhere");
    let result = subject.unpacker().keep_snapshot(absent, Digest::of(b"top")).await;
    let is_reported = matches!(result, Err(UnpackError::Store(StoreError::Absent(digest))) if digest == absent);
    ensure(is_reported, format!("an absent configuration: {result:?}"))
}
