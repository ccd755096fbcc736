//! Contract of every [`LayerLeases`], as checks for each implementation.

use std::time::SystemTime;

use super::*;
use crate::ports::{LayerLeases, Origin};

/// A store with leases on layers, under test.
pub trait LeasingStore: StoreUnderTest {
    /// The leases of the store.
    fn leases(&self) -> Arc<dyn LayerLeases>;
}

/// Runs every check on a new store and panics with all failures.
///
/// # Panics
/// When the store violates the contract; the message names the check.
pub async fn assert_layer_lease_contract<S: LeasingStore>(name: &str, make: impl AsyncFn() -> S) {
    let mut violations = Vec::new();
    for (check, run) in checks() {
        let subject = make().await;
        match tokio::time::timeout(DEADLINE, run(&subject)).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => violations.push(format!("{check}: {failure}")),
            Err(_) => violations.push(format!("{check}: not done after {} s", DEADLINE.as_secs())),
        }
    }
    assert!(violations.is_empty(), "{name} violates the contract:\n{}", violations.join("\n"));
}

type Check = for<'a> fn(&'a dyn LeasingStore) -> Pinned<Box<dyn Future<Output = CheckResult> + 'a>>;

fn checks() -> impl IntoIterator<Item = (&'static str, Check)> {
    macro_rules! named {
        ($($check:ident),* $(,)?) => {
            [$((stringify!($check), (|subject| Box::pin($check(subject))) as Check)),*]
        };
    }
    named![
        a_lease_protects_a_layer_committed_later,
        a_lease_does_not_protect_children_of_a_layer,
        an_ended_lease_protects_nothing,
        a_lease_is_listed_with_manifest_times_and_layers,
        an_expired_lease_protects_nothing,
        only_leases_on_layers_are_listed,
        manifest_labels_decide_whether_layers_are_kept,
        an_origin_has_no_port,
    ]
}

fn in_an_hour() -> SystemTime {
    SystemTime::now() + HOUR
}

/// Commits the blob under a pin and releases the pin, as a pull does.
async fn pull(subject: &dyn LeasingStore, blob: &TestBlob, children: &[(&TestBlob, ChildKind)]) -> CheckResult {
    let store = subject.store();
    let pin = store.pin(HOUR).await?;
    blob.write(&*store, &pin, children).await?;
    Ok(store.release(pin).await?)
}

async fn a_lease_protects_a_layer_committed_later(subject: &dyn LeasingStore) -> CheckResult {
    let (leases, store) = (subject.leases(), subject.store());
    let [manifest, layer, other] = ["manifest", "layer", "other"].map(|seed| TestBlob::of(seed, 400));
    let lease = leases.lease_layers(manifest.digest, None, in_an_hour()).await?;
    leases.add_layer(&lease, layer.digest).await?;
    leases.add_layer(&lease, layer.digest).await?;
    subject.collect().await;
    pull(subject, &layer, &[]).await?;
    pull(subject, &other, &[]).await?;
    subject.collect().await;
    ensure(layer.is_in(&*store).await?, "the layer that the lease names was collected")?;
    ensure(!other.is_in(&*store).await?, "a layer without a lease was not collected")
}

async fn a_lease_does_not_protect_children_of_a_layer(subject: &dyn LeasingStore) -> CheckResult {
    let (leases, store) = (subject.leases(), subject.store());
    let (parent, child) = (TestBlob::of("names", 400), TestBlob::of("named", 300));
    let pin = store.pin(HOUR).await?;
    child.write(&*store, &pin, &[]).await?;
    parent.write(&*store, &pin, &[(&child, ChildKind::Layer)]).await?;
    let lease = leases.lease_layers(parent.digest, None, in_an_hour()).await?;
    leases.add_layer(&lease, parent.digest).await?;
    store.release(pin).await?;
    subject.collect().await;
    ensure(parent.is_in(&*store).await?, "the blob of the lease was collected")?;
    ensure(!child.is_in(&*store).await?, "the lease also holds the child of its blob")
}

async fn an_ended_lease_protects_nothing(subject: &dyn LeasingStore) -> CheckResult {
    let (leases, store) = (subject.leases(), subject.store());
    let layer = TestBlob::of("ended", 400);
    let lease = leases.lease_layers(layer.digest, None, in_an_hour()).await?;
    leases.add_layer(&lease, layer.digest).await?;
    pull(subject, &layer, &[]).await?;
    leases.end_lease(lease.clone(), true).await?;
    ensure(!layer.is_in(&*store).await?, "`end_lease` returned before the layer was collected")?;
    ensure(leases.add_layer(&lease, layer.digest).await.is_err(), "an ended lease accepts a layer")?;
    leases.end_lease(lease, false).await?;
    ensure(leases.layer_leases().await?.is_empty(), "an ended lease is listed")
}

async fn a_lease_is_listed_with_manifest_times_and_layers(subject: &dyn LeasingStore) -> CheckResult {
    let leases = subject.leases();
    let (manifest, expires) = (Digest::of(b"its manifest"), in_an_hour());
    let last_use = SystemTime::now() - HOUR;
    let layers: BTreeSet<_> = [Digest::of(b"a"), Digest::of(b"b")].into();
    let lease = leases.lease_layers(manifest, Some(last_use), expires).await?;
    for layer in &layers {
        leases.add_layer(&lease, *layer).await?;
    }
    let listed = leases.layer_leases().await?;
    let [found] = &*listed else { return ensure(false, format!("one lease is listed as {listed:?}")) };
    let is_near = |one: SystemTime, other: SystemTime| {
        one.duration_since(other).or_else(|_| other.duration_since(one)).is_ok_and(|apart| apart.as_secs() < 1)
    };
    ensure(found.pin == lease && found.manifest == manifest && found.layers == layers, format!("{found:?}"))?;
    ensure(is_near(found.expires, expires), format!("{found:?} expires at {expires:?}"))?;
    ensure(found.last_use.is_some_and(|at| is_near(at, last_use)), format!("{found:?} was used at {last_use:?}"))
}

async fn an_expired_lease_protects_nothing(subject: &dyn LeasingStore) -> CheckResult {
    let (leases, store) = (subject.leases(), subject.store());
    let layer = TestBlob::of("expired", 400);
    let lease = leases.lease_layers(layer.digest, None, SystemTime::now()).await?;
    leases.add_layer(&lease, layer.digest).await?;
    pull(subject, &layer, &[]).await?;
    subject.collect().await;
    ensure(!layer.is_in(&*store).await?, "a lease outlives its end")
}

async fn only_leases_on_layers_are_listed(subject: &dyn LeasingStore) -> CheckResult {
    subject.store().pin(HOUR).await?;
    ensure(subject.leases().layer_leases().await?.is_empty(), "a pin of a recovery is listed")
}

async fn manifest_labels_decide_whether_layers_are_kept(subject: &dyn LeasingStore) -> CheckResult {
    let (leases, store) = (subject.leases(), subject.store());
    let [manifest, config, layer] = ["keeper", "its config", "its layer"].map(|seed| TestBlob::of(seed, 200));
    let pin = store.pin(HOUR).await?;
    ensure(!leases.has_layer_references(manifest.digest).await?, "an absent manifest keeps layers")?;
    manifest.write(&*store, &pin, &[(&config, ChildKind::Config)]).await?;
    ensure(!leases.has_layer_references(manifest.digest).await?, "a manifest without labels of layers keeps them")?;
    store.add_metadata(manifest.digest, &blob_metadata(&[(&layer, ChildKind::Layer)])).await?;
    ensure(leases.has_layer_references(manifest.digest).await?, "a manifest whose labels name a layer does not keep it")
}

async fn an_origin_has_no_port(subject: &dyn LeasingStore) -> CheckResult {
    let (leases, store) = (subject.leases(), subject.store());
    let manifest = TestBlob::of("with an origin", 200);
    let pin = store.pin(HOUR).await?;
    ensure(leases.origins(manifest.digest).await?.is_empty(), "an absent manifest has an origin")?;
    manifest.write(&*store, &pin, &[]).await?;
    let source = Some(Repository { registry: "10.0.0.1:5000".into(), path: "team/app".into() });
    store.add_metadata(manifest.digest, &BlobMetadata { source, children: Vec::new() }).await?;
    let found = leases.origins(manifest.digest).await?;
    ensure(found == [Origin::new("10.0.0.1", "team/app")], format!("{found:?}"))
}
