//! Layers that a node discarded before the agent ran, fetched from peers and from registries.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::progress::Progress;
use crate::agent::registries::{Answer, Registries};
use crate::agent::retain::tests::Node;
use crate::decide::bucket::MIN_RATE;
use crate::decide::fill::FetchFrom;
use crate::decide::retain::RetainLayers;
use crate::model::{Outage, OutageKind};
use crate::ports::{PullSecret, RegistryError};

const LAYERS: [u64; 3] = [3000, 200, 10];

const HOUR: Duration = Duration::from_secs(3600);

/// A node that pulled the image before the agent ran, and a harbour with the node's store.
async fn after_a_pull(budget: u64) -> (Node, Harbour, MadeImage) {
    let (node, mut harbour) = (Node::new(RetainLayers::OptedIn, budget), Harbour::new());
    let image = node.pull(IMAGE, &LAYERS, 7).await;
    node.uses(&[IMAGE]);
    harbour.store = Arc::new(node.store.clone());
    assert_eq!(node.layers_here(&image).await, 0);
    (node, harbour, image)
}

/// The registry of the image has these layers, and is healthy.
async fn registry_with(layers: &[u64], node: &Node, harbour: &Harbour) {
    let content = MemoryStore::new();
    let image = put_image(&content, &[IMAGE.into()], layers, 7).await.unwrap();
    for layer in image.layers {
        let bytes = content.open(layer.blob.digest).await.unwrap().read_at(0, 64 << 20).await.unwrap();
        harbour.registry.put_blob("r.test", bytes);
    }
    node.healthy.send_replace(Arc::new(["r.test".to_owned()].into()));
}

#[tokio::test(start_paused = true)]
async fn layers_discarded_before_the_agent_ran_come_from_a_peer() {
    let (node, harbour, image) = after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &harbour).await;
    harbour.peer_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    agent.shows(|status| (status.images, status.wanted, status.lacking) == (1, 1, 0)).await;
    assert_eq!(node.layers_here(&image).await, 3);
    assert_eq!(harbour.registry.blob_requests("r.test"), 0, "peers have precedence");
    node.store.remove_image(IMAGE, image.root.digest).await.unwrap();
    agent.shows(|status| status.images == 0).await;
    assert_eq!(node.layers_here(&image).await, 0, "they go with the image");
}

#[tokio::test(start_paused = true)]
async fn no_layer_is_fetched_over_the_budget_or_from_another_repository() {
    for (budget, name) in [(1000, IMAGE), (1 << 20, "r.test/bank/checkout:v1")] {
        let (node, harbour, image) = after_a_pull(budget).await;
        harbour.peer_with_layers(1, name, &LAYERS, Behaviour::Honest).await;
        let _agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
        tokio::time::sleep(HOUR).await;
        assert_eq!(node.layers_here(&image).await, 0, "{budget} {name}");
        assert_eq!(node.store.pins(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn the_zones_lease_of_missing_layers_is_released_when_they_come_to_an_end_or_the_agent_does() {
    let (node, mut harbour, _image) = after_a_pull(1 << 20).await;
    harbour.zone = Some("a".parse().unwrap());
    let peers_store = Arc::new(MemoryStore::new());
    put_image(&*peers_store, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    let announce = || harbour.announce_in(Some("b".parse().unwrap()), 1, Arc::clone(&peers_store), Behaviour::Hangs);
    announce().await;
    let agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    let second = std::time::Duration::from_secs(1);
    for ends_by_itself in [true, false] {
        let mut seconds = 0;
        while harbour.cluster.leases().1.is_empty() {
            tokio::time::sleep(second).await;
            seconds += 1;
            assert!(seconds < 7200, "no Lease");
        }
        if ends_by_itself {
            harbour.holders.apply(MeshEvent::Down(peer(1)));
            tokio::time::sleep(60 * second).await;
            assert_eq!(harbour.cluster.leases().1.len(), 0);
            announce().await;
        }
    }
    drop(agent);
    tokio::time::sleep(second).await;
    assert_eq!(harbour.cluster.leases().1.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn layers_that_no_peer_has_come_from_the_registry_once_it_is_healthy() {
    let (node, harbour, image) = after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &harbour).await;
    let healthy = node.healthy.send_replace(Arc::default());
    let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    tokio::time::sleep(HOUR).await;
    assert_eq!(harbour.registry.blob_requests("r.test"), 0);
    assert!(node.counted("lighterman_images_lacking_layers_by_reason{reason=\"pending\"} 1"));
    node.healthy.send_replace(healthy);
    agent.shows(|status| (status.images, status.wanted, status.lacking) == (1, 1, 0)).await;
    assert_eq!((node.layers_here(&image).await, harbour.registry.blob_requests("r.test")), (3, 3));
    assert!(node.counted("lighterman_layer_fetches_from_registries_total{outcome=\"fetched\"} 1"));
    assert!(node.counted("lighterman_images_lacking_layers_by_reason{reason=\"pending\"} 0"));
}

#[tokio::test(start_paused = true)]
async fn by_the_setting_no_layer_comes_from_a_registry() {
    let (mut node, harbour, image) = after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &harbour).await;
    node.options.fetch = FetchFrom::Peers;
    let _agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    tokio::time::sleep(HOUR).await;
    assert_eq!((node.layers_here(&image).await, harbour.registry.blob_requests("r.test")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_image_that_the_registry_denies_is_counted_and_comes_from_a_peer() {
    let (node, harbour, image) = after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &harbour).await;
    harbour.registry.make_blobs_private("r.test", PullSecret(b"ours".to_vec()));
    let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    let plugin = "only the kubelet's credential plugin can pull them";
    agent.shows(|status| status.lacking_reasons == [(plugin.to_owned(), 1)].into()).await;
    assert!(node.counted("lighterman_images_lacking_layers_by_reason{reason=\"kubelet_credentials\"} 1"));
    tokio::time::sleep(HOUR).await;
    assert_eq!(harbour.registry.blob_requests("r.test"), 1, "the registry is left alone");
    harbour.peer_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    agent.shows(|status| status.lacking == 0).await;
    assert_eq!(node.layers_here(&image).await, 3);
}

#[tokio::test(start_paused = true)]
async fn a_private_image_comes_with_the_pull_secret_of_a_pod_where_the_agent_may_read_it() {
    for readable in [true, false] {
        let (node, mut harbour, image) = after_a_pull(1 << 20).await;
        registry_with(&LAYERS, &node, &harbour).await;
        let ours = PullSecret(b"ours".to_vec());
        harbour.registry.make_blobs_private("r.test", ours.clone());
        harbour.cluster.put_pull_secret("shop", "key", ours);
        harbour.resolve.pull_secret_namespaces = if readable { vec!["shop".into()] } else { Vec::new() };
        node.uses_with_secret(IMAGE, ("shop", "key"));
        let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
        match readable {
            true => agent.shows(|status| status.lacking == 0).await,
            false => agent.shows(|status| status.lacking_reasons.contains_key("pull secret not readable")).await,
        }
        assert_eq!(node.layers_here(&image).await, if readable { 3 } else { 0 });
    }
}

#[tokio::test(start_paused = true)]
async fn a_registry_that_fails_is_asked_again_ever_less_often() {
    let (node, harbour, image) = after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &harbour).await;
    let down = RegistryError::Down { registry: "r.test".into(), kind: OutageKind::TimedOut };
    harbour.registry.set_failure("r.test", Some(down));
    let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    tokio::time::sleep(6 * HOUR).await;
    let requests = harbour.registry.blob_requests("r.test");
    assert!((8..=12).contains(&requests), "{requests} requests in six hours");
    assert!(node.counted(&format!("lighterman_layer_fetches_from_registries_total{{outcome=\"down\"}} {requests}")));
    harbour.registry.set_failure("r.test", None);
    agent.shows(|status| status.lacking == 0).await;
    assert_eq!(node.layers_here(&image).await, 3);
}

#[tokio::test(start_paused = true)]
async fn a_layer_with_wrong_bytes_is_not_kept() {
    let (node, harbour, image) = after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &harbour).await;
    for layer in &image.layers {
        harbour.registry.corrupt_blob("r.test", layer.blob.digest);
    }
    let _agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    tokio::time::sleep(HOUR / 2).await;
    assert_eq!((node.layers_here(&image).await, harbour.registry.blob_requests("r.test")), (0, 1));
    assert!(node.counted("lighterman_layer_fetches_from_registries_total{outcome=\"wrong_bytes\"} 1"));
}

#[tokio::test(start_paused = true)]
async fn layers_come_from_a_registry_at_the_rate_of_the_setting() {
    let layers = [10 * MIN_RATE];
    let (mut node, mut harbour) = (Node::new(RetainLayers::OptedIn, 1 << 30), Harbour::new());
    let image = node.pull(IMAGE, &layers, 7).await;
    node.uses(&[IMAGE]);
    harbour.store = Arc::new(node.store.clone());
    registry_with(&layers, &node, &harbour).await;
    node.options.fetch_rate = MIN_RATE;
    let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    agent.shows(|status| status.lacking_reasons.contains_key("being fetched")).await;
    let began = tokio::time::Instant::now();
    agent.shows(|status| status.lacking == 0).await;
    assert_eq!(node.layers_here(&image).await, 1);
    assert!(began.elapsed() >= Duration::from_secs(9), "ten seconds but for the full bucket: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_does_not_wait_for_a_layer_that_comes_slowly_in_the_background() {
    let layers = [10 * MIN_RATE, 200];
    let (mut node, mut harbour) = (Node::new(RetainLayers::OptedIn, 1 << 30), Harbour::new());
    node.pull(IMAGE, &layers[..1], 7).await;
    node.uses(&[IMAGE]);
    harbour.store = Arc::new(node.store.clone());
    registry_with(&layers[..1], &node, &harbour).await;
    node.options.fetch_rate = MIN_RATE;
    let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    agent.shows(|status| status.lacking_reasons.contains_key("being fetched")).await;
    // Another image with the same first layer.
    let other = "r.test/shop/other:v1";
    harbour.peer_with_layers(1, other, &layers, Behaviour::Honest).await;
    let wanted = other.parse::<Reference>().unwrap().into();
    let began = tokio::time::Instant::now();
    let recovered = harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await;
    assert_eq!(recovered.unwrap().fetched, 4);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    agent.shows(|status| status.lacking == 0).await;
    assert!(node.counted("lighterman_layer_fetches_from_registries_total{outcome=\"yielded\"} 1"));
}

#[tokio::test(start_paused = true)]
async fn the_outage_that_one_peer_announces_makes_a_registry_unhealthy() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let (holders, registry) = (harbour.holders.clone(), Arc::clone(&harbour.registry) as _);
    let first_hand = watch::channel(Vec::new()).0;
    let mut registries = Registries::new(holders, registry, true, first_hand, harbour.metrics.clone());
    let (healthy, now) = (registries.healthy(), std::time::Instant::now());
    registries.publish(now);
    assert!(healthy.borrow().is_empty(), "a registry that never answered");
    registries.answered(Answer { registry: "r.test".into(), answer: Ok(()) }, now);
    assert!(healthy.borrow().contains("r.test"));
    let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: 1 };
    harbour.holders.apply(MeshEvent::Changed(peer(1), vec![ContentChange::Added(Item::Outage(outage))]));
    registries.publish(now);
    assert!(healthy.borrow().is_empty());
    assert!(!registries.is_down("r.test", now), "for pods one peer is not enough");
}
