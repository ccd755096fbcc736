//! What every [`Unpacker`] promises, as checks that run on each of them.

use super::*;
use crate::oci::StackedLayer;
use crate::ports::{UnpackError, Unpacked, Unpacker};
use crate::testing::image::{MadeImage, Packing, Recipe, make_image};

/// A store that unpacks, under test.
#[async_trait]
pub trait Unpacks: Subject {
    /// Unpacks what is in the store.
    fn unpacker(&self) -> Arc<dyn Unpacker>;

    /// The chain IDs of all layers that are unpacked.
    async fn unpacked(&self) -> BTreeSet<Digest>;

    /// How many layers are half unpacked.
    async fn half_unpacked(&self) -> usize;
}

/// Runs every check on a store of its own and panics with all that failed.
///
/// # Panics
/// When a promise is broken; the message names the check.
pub async fn unpacks_as_promised<S: Unpacks>(name: &str, make: impl AsyncFn() -> S) {
    let broken = promises_broken_in_unpacking(make).await;
    assert!(broken.is_empty(), "{name} breaks the contract:\n{}", broken.join("\n"));
}

/// Runs every check on a store of its own; one line for each that failed, which begins with its name.
pub(super) async fn promises_broken_in_unpacking<S: Unpacks>(make: impl AsyncFn() -> S) -> Vec<String> {
    let mut broken = Vec::new();
    for (name, check) in checks() {
        let subject = make().await;
        match tokio::time::timeout(DEADLINE, check(&subject)).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => broken.push(format!("{name}: {failure}")),
            Err(_) => broken.push(format!("{name}: not done after {} s", DEADLINE.as_secs())),
        }
    }
    broken
}

type Check = for<'a> fn(&'a dyn Unpacks) -> Pinned<Box<dyn Future<Output = Outcome> + 'a>>;

fn checks() -> impl IntoIterator<Item = (&'static str, Check)> {
    macro_rules! named {
        ($($check:ident),* $(,)?) => {
            [$((stringify!($check), (|subject| Box::pin($check(subject))) as Check)),*]
        };
    }
    named![
        every_packing_is_unpacked_under_its_chain_id,
        what_is_unpacked_is_found_by_its_chain_id,
        what_is_unpacked_is_left_as_it_is,
        another_image_on_the_same_layers_shares_them,
        another_diff_is_refused_and_nothing_is_left,
        a_layer_that_is_not_here_is_an_error_and_nothing_is_left,
        a_layer_needs_the_one_beneath,
        a_pin_holds_what_was_unpacked_under_it,
        a_renewed_pin_holds_what_was_unpacked_under_it,
        a_pin_holds_what_it_found_unpacked,
        what_is_kept_lives_as_long_as_its_image,
        only_a_configuration_that_is_there_keeps,
    ]
}

impl From<UnpackError> for Broken {
    fn from(error: UnpackError) -> Self {
        Self(format!("unpacking failed: {error}"))
    }
}

async fn image(subject: &dyn Unpacks, name: &str, layers: &[u64], packing: Packing) -> Result<MadeImage, Broken> {
    let recipe = Recipe { layers: layers.to_vec(), packing, ..Recipe::default() };
    let seed = name.bytes().fold(0, |seed, byte| seed << 5 ^ seed >> 59 ^ u64::from(byte));
    Ok(make_image(&*subject.store(), &[format!("r.test/unpacked/{name}:1")], &recipe, seed).await?)
}

async fn unpack_all(subject: &dyn Unpacks, image: &MadeImage, pin: &Pin, expected: Unpacked) -> Outcome {
    for layer in &image.layers {
        let unpacked = subject.unpacker().unpack(layer, pin).await?;
        ensure(unpacked == expected, format!("{} was unpacked {unpacked:?}", layer.blob.digest))?;
    }
    Ok(())
}

fn names(layers: &[StackedLayer]) -> BTreeSet<Digest> {
    layers.iter().map(|layer| layer.chain_id).collect()
}

async fn ensure_unpacked(subject: &dyn Unpacks, expected: BTreeSet<Digest>, when: &str) -> Outcome {
    let found = subject.unpacked().await;
    ensure(found == expected, format!("{when}: {found:?} is unpacked, and should be {expected:?}"))?;
    ensure(subject.half_unpacked().await == 0, format!("{when}: something is half unpacked"))
}

async fn what_is_unpacked_is_found_by_its_chain_id(subject: &dyn Unpacks) -> Outcome {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "found", &[1000, 10], Packing::Gzip).await?;
    for layer in &image.layers {
        let before = subject.store().snapshots(layer.chain_id).await?.snapshotters;
        ensure(before.is_empty(), format!("{} is in {before:?} before it is unpacked", layer.chain_id))?;
        subject.unpacker().unpack(layer, &pin).await?;
        let found = subject.store().snapshots(layer.chain_id).await?.snapshotters;
        ensure(found.len() == 1, format!("{} is in {found:?}", layer.chain_id))?;
    }
    Ok(())
}

async fn every_packing_is_unpacked_under_its_chain_id(subject: &dyn Unpacks) -> Outcome {
    let pin = subject.store().pin(HOUR).await?;
    let mut expected = BTreeSet::new();
    for (name, packing) in [("plain", Packing::Plain), ("gzip", Packing::Gzip), ("zstd", Packing::Zstd)] {
        let image = image(subject, name, &[300_000, 10], packing).await?;
        unpack_all(subject, &image, &pin, Unpacked::Now).await?;
        expected.extend(names(&image.layers));
        ensure_unpacked(subject, expected.clone(), name).await?;
    }
    Ok(())
}

async fn what_is_unpacked_is_left_as_it_is(subject: &dyn Unpacks) -> Outcome {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "twice", &[1000, 10], Packing::Gzip).await?;
    unpack_all(subject, &image, &pin, Unpacked::Now).await?;
    unpack_all(subject, &image, &pin, Unpacked::Before).await?;
    ensure_unpacked(subject, names(&image.layers), "twice").await
}

/// The same seed makes the same first layers.
async fn another_image_on_the_same_layers_shares_them(subject: &dyn Unpacks) -> Outcome {
    let pin = subject.store().pin(HOUR).await?;
    let base = image(subject, "shared", &[1000, 10], Packing::Gzip).await?;
    let more = image(subject, "shared", &[1000, 10, 20], Packing::Gzip).await?;
    unpack_all(subject, &base, &pin, Unpacked::Now).await?;
    let mut how = Vec::new();
    for layer in &more.layers {
        how.push(subject.unpacker().unpack(layer, &pin).await?);
    }
    ensure(how == [Unpacked::Before, Unpacked::Before, Unpacked::Now], format!("unpacked {how:?}"))?;
    ensure_unpacked(subject, names(&more.layers), "two images").await
}

async fn another_diff_is_refused_and_nothing_is_left(subject: &dyn Unpacks) -> Outcome {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "false", &[1000, 10], Packing::Gzip).await?;
    let [base, top] = &image.layers[..] else { return ensure(false, "an image of two layers has others") };
    subject.unpacker().unpack(base, &pin).await?;
    let false_id = StackedLayer { diff_id: Digest::of(b"something else"), ..top.clone() };
    let refused = subject.unpacker().unpack(&false_id, &pin).await;
    let is_told = matches!(&refused, Err(UnpackError::OtherDiff { expected, actual })
        if *expected == false_id.diff_id && *actual == top.diff_id.to_string());
    ensure(is_told, format!("another diff: {refused:?}"))?;
    ensure_unpacked(subject, names(&image.layers[..1]), "refused").await?;
    subject.unpacker().unpack(top, &pin).await?;
    ensure_unpacked(subject, names(&image.layers), "the right one afterwards").await
}

async fn a_layer_that_is_not_here_is_an_error_and_nothing_is_left(subject: &dyn Unpacks) -> Outcome {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "absent", &[1000], Packing::Plain).await?;
    let mut absent = image.layers[0].clone();
    absent.blob.digest = Digest::of(b"a layer that is nowhere");
    let failed = subject.unpacker().unpack(&absent, &pin).await;
    ensure(matches!(failed, Err(UnpackError::Store(_))), format!("an absent layer: {failed:?}"))?;
    ensure_unpacked(subject, BTreeSet::new(), "absent").await
}

async fn a_layer_needs_the_one_beneath(subject: &dyn Unpacks) -> Outcome {
    let pin = subject.store().pin(HOUR).await?;
    let image = image(subject, "upper", &[1000, 10], Packing::Plain).await?;
    let failed = subject.unpacker().unpack(&image.layers[1], &pin).await;
    ensure(matches!(failed, Err(UnpackError::Store(_))), format!("without the layer beneath: {failed:?}"))?;
    ensure_unpacked(subject, BTreeSet::new(), "without the layer beneath").await
}

async fn a_pin_holds_what_was_unpacked_under_it(subject: &dyn Unpacks) -> Outcome {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let image = image(subject, "pinned", &[1000, 10], Packing::Gzip).await?;
    unpack_all(subject, &image, &pin, Unpacked::Now).await?;
    subject.collect().await;
    ensure_unpacked(subject, names(&image.layers), "pinned").await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure_unpacked(subject, BTreeSet::new(), "released").await
}

async fn a_renewed_pin_holds_what_was_unpacked_under_it(subject: &dyn Unpacks) -> Outcome {
    let store = subject.store();
    let image = image(subject, "renewed", &[1000, 10], Packing::Gzip).await?;
    // containerd collects by itself after a hundred changes of its metadata, counted anew from here.
    subject.collect().await;
    let pin = store.pin(Duration::ZERO).await?;
    unpack_all(subject, &image, &pin, Unpacked::Now).await?;
    store.renew(&pin, HOUR).await?;
    subject.collect().await;
    ensure_unpacked(subject, names(&image.layers), "renewed").await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure_unpacked(subject, BTreeSet::new(), "released").await
}

async fn a_pin_holds_what_it_found_unpacked(subject: &dyn Unpacks) -> Outcome {
    let store = subject.store();
    let (first, second) = (store.pin(HOUR).await?, store.pin(HOUR).await?);
    let image = image(subject, "found", &[1000, 10], Packing::Gzip).await?;
    unpack_all(subject, &image, &first, Unpacked::Now).await?;
    unpack_all(subject, &image, &second, Unpacked::Before).await?;
    store.release(first).await?;
    subject.collect().await;
    ensure_unpacked(subject, names(&image.layers), "held by the second").await
}

async fn what_is_kept_lives_as_long_as_its_image(subject: &dyn Unpacks) -> Outcome {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    let image = image(subject, "kept", &[1000, 10], Packing::Gzip).await?;
    unpack_all(subject, &image, &pin, Unpacked::Now).await?;
    subject.unpacker().keep(image.blobs[0].digest, image.layers[1].chain_id).await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure_unpacked(subject, names(&image.layers), "kept").await?;
    store.remove_image("r.test/unpacked/kept:1", image.root.digest).await?;
    subject.collect().await;
    ensure_unpacked(subject, BTreeSet::new(), "without the image").await
}

async fn only_a_configuration_that_is_there_keeps(subject: &dyn Unpacks) -> Outcome {
    let absent = Digest::of(b"a configuration that is nowhere");
    let kept = subject.unpacker().keep(absent, Digest::of(b"top")).await;
    let is_told = matches!(kept, Err(UnpackError::Store(StoreError::Absent(digest))) if digest == absent);
    ensure(is_told, format!("an absent configuration: {kept:?}"))
}
