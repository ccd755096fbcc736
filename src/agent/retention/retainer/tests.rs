use std::sync::Arc;

use tokio::time::timeout;
use tokio_util::sync::DropGuard;

use super::*;
use crate::decide::fill::{FetchFrom, RATE};
use crate::decide::policy::Policy;
use crate::decide::retain::{RetainBytes, RetainLayers};
use crate::model::{ContainerKind, ContainerView, PodEvent, PodRef, PodView, PullPolicy};
use crate::oci::{Descriptor, Reference};
use crate::ports::{BlobMetadata, Blobs, Child, ChildKind, ImageRecord, ImageRecords, Pins};
use crate::testing::image::write_blob;
use crate::testing::image::{MadeImage, put_image};
use crate::testing::{MemoryCluster, MemoryStore};

/// Deadline of every wait. The clock is paused, so the deadline passes at once when no task is
/// ready any more.
const DEADLINE: Duration = Duration::from_secs(3600);

/// A node whose runtime discards layers.
pub(in crate::agent) struct RetainTestNode {
    pub(in crate::agent) store: MemoryStore,
    used: watch::Sender<Arc<UsedImages>>,
    /// Registries that are healthy; none at first.
    pub(in crate::agent) healthy: watch::Sender<Arc<BTreeSet<String>>>,
    pub(in crate::agent) options: RetainOptions,
    metrics: Metrics,
}

pub(in crate::agent) struct RunningRetainer {
    status: watch::Receiver<Option<RetentionStatus>>,
    _stop: DropGuard,
}

impl RetainTestNode {
    pub(in crate::agent) fn new(layers: RetainLayers, bytes: u64) -> Self {
        let (bytes, fetch) = (RetainBytes::Bytes(bytes), FetchFrom::default());
        Self {
            store: MemoryStore::new(),
            used: watch::Sender::default(),
            healthy: watch::Sender::default(),
            options: RetainOptions { layers, bytes, fetch, fetch_rate: RATE },
            metrics: Metrics::new(),
        }
    }

    /// Sets the images that pods of opted-in namespaces name.
    pub(in crate::agent) fn set_used_images(&self, names: &[&str]) {
        let opted_in = names.iter().map(|name| name.parse().unwrap()).collect();
        self.used.send_replace(Arc::new(UsedImages { opted_in, ..UsedImages::default() }));
    }

    /// Sets one image of an opted-in namespace, and the pod's pull secret.
    pub(in crate::agent) fn set_used_image_with_secret(&self, name: &str, (namespace, secret): (&str, &str)) {
        let image: Reference = name.parse().unwrap();
        let secrets = [(namespace.to_owned(), secret.to_owned())].into();
        let pull_secrets = [(image.clone(), secrets)].into();
        let used = UsedImages { opted_in: [image].into(), pull_secrets, ..UsedImages::default() };
        self.used.send_replace(Arc::new(used));
    }

    /// Starts the retainer and waits for the first list.
    async fn start(&self) -> RunningRetainer {
        self.start_with(None).await
    }

    /// Starts the retainer with a recoverer that fetches from peers.
    pub(in crate::agent) async fn start_with(&self, recoverer: Option<Arc<Recoverer>>) -> RunningRetainer {
        let (status_in, mut status) = watch::channel(None);
        let stop = CancellationToken::new();
        let leases = Arc::new(self.store.clone());
        let used = self.used.subscribe();
        let retainer =
            Retainer::new(Arc::new(self.store.clone()), leases, self.options, used, self.metrics.clone(), status_in);
        let retainer = match recoverer {
            Some(recoverer) => retainer.with_filler(recoverer, self.healthy.subscribe()),
            None => retainer,
        };
        tokio::spawn(retainer.run(stop.clone()));
        timeout(DEADLINE, status.wait_for(Option::is_some)).await.unwrap().unwrap();
        RunningRetainer { status, _stop: stop.drop_guard() }
    }

    /// A pull with `discard_unpacked_layers`, in containerd's order: manifest, configuration,
    /// layers, record, end of the pull's lease.
    pub(in crate::agent) async fn pull(&self, name: &str, layers: &[u64], seed: u64) -> MadeImage {
        let registry = MemoryStore::new();
        let image = put_image(&registry, &["r.test/x:1".into()], layers, seed).await.unwrap();
        let pin = self.store.pin(DEADLINE).await.unwrap();
        let reference: Reference = name.parse().unwrap();
        let source = Some(reference.repository().clone());
        let config = image.blobs[0].digest;
        let children = vec![Child { digest: config, kind: ChildKind::Config }];
        self.copy(&registry, &image.target, &pin, BlobMetadata { source: source.clone(), children }).await;
        for blob in &image.blobs {
            self.copy(&registry, blob, &pin, BlobMetadata { source: source.clone(), children: Vec::new() }).await;
        }
        self.store.put_image(&ImageRecord { name: reference.to_string(), target: image.target.clone() }).await.unwrap();
        self.store.release(pin).await.unwrap();
        self.store.collect();
        image
    }

    async fn copy(&self, from: &MemoryStore, blob: &Descriptor, pin: &Pin, metadata: BlobMetadata) {
        let mut reader = from.open(blob.digest).await.unwrap();
        let bytes = reader.read_at(0, 64 << 20).await.unwrap();
        write_blob(&self.store, bytes, &metadata, pin).await.unwrap();
        // The paused clock advances only after the retainer has handled the event.
        tokio::time::sleep(Duration::from_millis(1)).await;
    }

    /// The layers of the image that remain after a collection.
    pub(in crate::agent) async fn layers_after_collection(&self, image: &MadeImage) -> usize {
        self.store.collect();
        let mut present = 0;
        for layer in &image.layers {
            present += usize::from(self.store.blob(layer.blob.digest).await.unwrap().is_some());
        }
        present
    }

    pub(in crate::agent) fn has_metric(&self, line: &str) -> bool {
        String::from_utf8(self.metrics.render()).unwrap().lines().any(|have| have == line)
    }
}

impl RunningRetainer {
    pub(in crate::agent) async fn wait_for_status(&mut self, is_expected: impl FnMut(&RetentionStatus) -> bool) {
        let mut is_expected = is_expected;
        let seen = self.status.wait_for(|status| status.as_ref().is_some_and(&mut is_expected));
        timeout(DEADLINE, seen).await.expect("the status never has these values").unwrap();
    }
}

const IMAGE: &str = "r.test:5000/shop/web:1";

#[tokio::test(start_paused = true)]
async fn layers_of_an_image_that_a_pod_waits_for_survive_its_pull() {
    let node = RetainTestNode::new(RetainLayers::OptedIn, 1 << 20);
    node.set_used_images(&[IMAGE]);
    let mut agent = node.start().await;
    let image = node.pull(IMAGE, &[3000, 200, 10], 1).await;
    assert_eq!(node.layers_after_collection(&image).await, 3);
    agent.wait_for_status(|status| (status.images, status.wanted, status.lacking) == (1, 1, 0)).await;
    assert_eq!(node.layers_after_collection(&image).await, 3);
    assert!(node.has_metric("lighterman_retained_images 1"));
    assert!(node.has_metric("lighterman_images_lacking_layers 0"));
}

#[tokio::test(start_paused = true)]
async fn layers_are_discarded_without_an_agent() {
    let node = RetainTestNode::new(RetainLayers::OptedIn, 1 << 20);
    let image = node.pull(IMAGE, &[3000, 200], 1).await;
    assert_eq!(node.layers_after_collection(&image).await, 0);
    node.set_used_images(&[IMAGE]);
    let mut agent = node.start().await;
    agent.wait_for_status(|status| (status.images, status.wanted, status.lacking) == (0, 1, 1)).await;
    assert!(node.has_metric("lighterman_images_lacking_layers 1"));
}

#[tokio::test(start_paused = true)]
async fn layers_of_an_image_whose_pod_is_unknown_wait_for_the_pod() {
    let node = RetainTestNode::new(RetainLayers::OptedIn, 1 << 20);
    let mut agent = node.start().await;
    let image = node.pull(IMAGE, &[3000], 1).await;
    agent.wait_for_status(|status| (status.images, status.wanted) == (1, 0)).await;
    assert_eq!(node.layers_after_collection(&image).await, 1);
}

#[tokio::test(start_paused = true)]
async fn an_image_needs_no_pod_where_all_images_are_retained() {
    let node = RetainTestNode::new(RetainLayers::All, 1 << 20);
    let mut agent = node.start().await;
    let image = node.pull(IMAGE, &[3000], 1).await;
    agent.wait_for_status(|status| (status.images, status.wanted) == (1, 1)).await;
    assert_eq!(node.layers_after_collection(&image).await, 1);
}

#[tokio::test(start_paused = true)]
async fn layers_are_released_with_the_image() {
    let node = RetainTestNode::new(RetainLayers::OptedIn, 1 << 20);
    node.set_used_images(&[IMAGE]);
    let mut agent = node.start().await;
    let image = node.pull(IMAGE, &[3000, 200], 1).await;
    agent.wait_for_status(|status| status.images == 1).await;
    node.store.remove_image(IMAGE, image.target.digest).await.unwrap();
    agent.wait_for_status(|status| status.images == 0).await;
    assert_eq!(node.layers_after_collection(&image).await, 0);
    assert_eq!(node.store.pins(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_new_image_displaces_an_image_that_is_no_longer_used() {
    let node = RetainTestNode::new(RetainLayers::OptedIn, 10_000);
    let (old, new) = ("r.test/shop/old:1", "r.test/shop/new:1");
    node.set_used_images(&[old]);
    let mut agent = node.start().await;
    let first = node.pull(old, &[4000], 1).await;
    agent.wait_for_status(|status| status.images == 1).await;
    node.set_used_images(&[new]);
    agent.wait_for_status(|status| status.wanted == 0).await;
    assert_eq!(node.layers_after_collection(&first).await, 1, "no other image needs the bytes");
    let second = node.pull(new, &[7000], 2).await;
    assert_eq!((node.layers_after_collection(&first).await, node.layers_after_collection(&second).await), (0, 1));
    agent.wait_for_status(|status| status.images == 1 && status.bytes <= status.budget).await;
}

#[tokio::test(start_paused = true)]
async fn an_image_over_the_budget_is_not_retained() {
    let node = RetainTestNode::new(RetainLayers::All, 5000);
    let _agent = node.start().await;
    let image = node.pull(IMAGE, &[4000, 4000], 1).await;
    assert_eq!(node.layers_after_collection(&image).await, 0);
}

#[tokio::test(start_paused = true)]
async fn the_next_agent_finds_the_leases_of_the_previous_agent() {
    let node = RetainTestNode::new(RetainLayers::OptedIn, 1 << 20);
    node.set_used_images(&[IMAGE]);
    let mut agent = node.start().await;
    let image = node.pull(IMAGE, &[3000, 200], 1).await;
    agent.wait_for_status(|status| status.images == 1).await;
    agent.wait_for_status(|status| status.wanted == 1).await;
    let lease = node.store.layer_leases().await.unwrap();
    assert!(lease[0].last_use.is_some(), "without a last use, the next agent would release the image");
    drop(agent);
    // During the API server's outage no pod is known. The image was used, so its layers stay.
    node.set_used_images(&[]);
    let mut next = node.start().await;
    next.wait_for_status(|status| status.images == 1).await;
    tokio::time::sleep(Duration::from_secs(60)).await;
    assert_eq!((node.layers_after_collection(&image).await, node.store.pins()), (2, 1));
}

#[tokio::test(start_paused = true)]
async fn an_image_whose_labels_keep_its_layers_needs_no_lease() {
    let node = RetainTestNode::new(RetainLayers::All, 1 << 20);
    let mut agent = node.start().await;
    let image = put_image(&node.store, &[IMAGE.into()], &[3000, 200], 1).await.unwrap();
    agent.wait_for_status(|status| (status.wanted, status.lacking, status.images) == (1, 0, 0)).await;
    assert_eq!(node.layers_after_collection(&image).await, 2);
    assert_eq!(node.store.pins(), 0);
}

fn pod(namespace: &str, name: &str, image: &str) -> PodView {
    PodView {
        pod: PodRef { k8s_namespace: namespace.into(), name: name.into(), uid: format!("uid of {name}") },
        annotations: BTreeMap::new(),
        containers: vec![ContainerView {
            name: "main".into(),
            kind: ContainerKind::Ordinary,
            image: image.into(),
            pull_policy: PullPolicy::IfNotPresent,
            waiting: None,
        }],
        image_volumes: Vec::new(),
        owner: None,
        is_static: false,
        priority: 0,
        pull_secrets: Vec::new(),
        is_ending: false,
    }
}

#[tokio::test(start_paused = true)]
async fn images_of_opted_in_namespaces_are_published_and_events_are_forwarded() {
    let cluster = MemoryCluster::default();
    cluster.put_namespace("shop", &[("lighterman.dev/allow", "true")]);
    cluster.put_namespace("bank", &[]);
    let (used_in, mut used) = watch::channel(Arc::<UsedImages>::default());
    let policy = watch::channel(Arc::new(Policy::default())).1;
    let (events, from) = tokio::sync::mpsc::channel(1);
    let (to, mut forwarded) = tokio::sync::mpsc::channel(1);
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    tokio::spawn(PodImages::new(Arc::new(cluster), policy, used_in).run(from, to, stop));
    let (mut shop, bank) = (pod("shop", "web", "nginx"), pod("bank", "vault", "secret:1"));
    shop.pull_secrets = vec!["key".into()];
    for event in [PodEvent::Applied(Box::new(bank)), PodEvent::Applied(Box::new(shop.clone()))] {
        events.send(event.clone()).await.unwrap();
        assert_eq!(timeout(DEADLINE, forwarded.recv()).await.unwrap(), Some(event));
    }
    let nginx: BTreeSet<Reference> = ["nginx".parse().unwrap()].into();
    let only_nginx = |used: &Arc<UsedImages>| used.opted_in == nginx && used.undecided.is_empty();
    let published = timeout(DEADLINE, used.wait_for(only_nginx)).await.unwrap().unwrap().pull_secrets.clone();
    let key = BTreeSet::from([("shop".to_owned(), "key".to_owned())]);
    assert_eq!(published, [("nginx".parse().unwrap(), key)].into());
    events.send(PodEvent::Deleted(shop.pod)).await.unwrap();
    timeout(DEADLINE, used.wait_for(|used| used.opted_in.is_empty())).await.unwrap().unwrap();
}

#[tokio::test(start_paused = true)]
async fn images_of_the_agents_own_daemonset_count_without_an_opt_in() {
    let (used_in, mut used) = watch::channel(Arc::<UsedImages>::default());
    let policy = watch::channel(Arc::new(Policy::default())).1;
    let own = watch::Sender::<Arc<BTreeSet<Reference>>>::default();
    let ((_events, from), (to, _passed)) = (tokio::sync::mpsc::channel(1), tokio::sync::mpsc::channel(1));
    let stop = CancellationToken::new();
    let _stopped = stop.clone().drop_guard();
    let images = PodImages::new(Arc::new(MemoryCluster::default()), policy, used_in).with_own_images(own.subscribe());
    tokio::spawn(images.run(from, to, stop));
    let image: Reference = "r.test/lighterman:v2".parse().unwrap();
    own.send_replace(Arc::new([image.clone()].into()));
    let counted = used.wait_for(|used| used.opted_in.contains(&image) && used.undecided.is_empty());
    timeout(DEADLINE, counted).await.expect("the own image does not count as used").unwrap();
}
