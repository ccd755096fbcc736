//! Fetches of layers that a node discarded before the agent ran, from peers and from registries.

use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::pods::registry_health::RegistryHealth;
use crate::agent::recovery::progress::Progress;
use crate::agent::retention::retainer::tests::RetainTestNode;
use crate::decide::byte_bucket::MIN_RATE;
use crate::decide::fill::FetchFrom;
use crate::decide::outage::RegistryOutages;
use crate::decide::retain::RetainLayers;
use crate::model::{Outage, OutageKind};
use crate::ports::{Blobs, ImageRecords, PullSecret, RegistryError};

const LAYERS: [u64; 3] = [3000, 200, 10];

const HOUR: Duration = Duration::from_secs(3600);

/// A node that pulled the image before the agent ran, and a [`TestNode`] with the same store.
async fn node_after_a_pull(budget: u64) -> (RetainTestNode, TestNode, MadeImage) {
    let (node, mut test_node) = (RetainTestNode::new(RetainLayers::OptedIn, budget), TestNode::new());
    let image = node.pull(IMAGE, &LAYERS, 7).await;
    node.set_used_images(&[IMAGE]);
    test_node.store = Arc::new(node.store.clone());
    assert_eq!(node.layers_after_collection(&image).await, 0);
    (node, test_node, image)
}

/// Puts these layers into the image's registry, and marks the registry as healthy.
async fn registry_with(layers: &[u64], node: &RetainTestNode, test_node: &TestNode) {
    let content = MemoryStore::new();
    let image = put_image(&content, &[IMAGE.into()], layers, 7).await.unwrap();
    for layer in image.layers {
        let bytes = content.open(layer.blob.digest).await.unwrap().read_at(0, 64 << 20).await.unwrap();
        test_node.registry.put_blob("r.test", bytes);
    }
    node.healthy.send_replace(Arc::new(["r.test".to_owned()].into()));
}

#[tokio::test(start_paused = true)]
async fn layers_discarded_before_the_agent_ran_come_from_a_peer() {
    let (node, test_node, image) = node_after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &test_node).await;
    test_node.add_provider_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    let mut agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    agent.wait_for_status(|status| (status.images, status.wanted, status.lacking) == (1, 1, 0)).await;
    assert_eq!(node.layers_after_collection(&image).await, 3);
    assert_eq!(test_node.registry.blob_requests("r.test"), 0, "peers have precedence");
    node.store.remove_image(IMAGE, image.target.digest).await.unwrap();
    agent.wait_for_status(|status| status.images == 0).await;
    assert_eq!(node.layers_after_collection(&image).await, 0, "the agent drops the layers of a removed image");
}

#[tokio::test(start_paused = true)]
async fn no_layer_is_fetched_over_the_budget_or_from_another_repository() {
    for (budget, name) in [(1000, IMAGE), (1 << 20, "r.test/bank/checkout:v1")] {
        let (node, test_node, image) = node_after_a_pull(budget).await;
        test_node.add_provider_with_layers(1, name, &LAYERS, Behaviour::Honest).await;
        let _agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
        tokio::time::sleep(HOUR).await;
        assert_eq!(node.layers_after_collection(&image).await, 0, "{budget} {name}");
        assert_eq!(node.store.pins(), 0);
    }
}

#[tokio::test(start_paused = true)]
async fn the_zone_lease_of_missing_layers_is_released_at_the_end_of_the_fetch_and_of_the_agent() {
    let (node, mut test_node, _image) = node_after_a_pull(1 << 20).await;
    test_node.zone = Some("a".parse().unwrap());
    let peers_store = Arc::new(MemoryStore::new());
    put_image(&*peers_store, &[IMAGE.into()], &LAYERS, 7).await.unwrap();
    let announce =
        || test_node.announce_store_in_zone(Some("b".parse().unwrap()), 1, Arc::clone(&peers_store), Behaviour::Hangs);
    announce().await;
    let agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    let second = std::time::Duration::from_secs(1);
    for ends_by_itself in [true, false] {
        let mut seconds = 0;
        while test_node.cluster.leases().1.is_empty() {
            tokio::time::sleep(second).await;
            seconds += 1;
            assert!(seconds < 7200, "no Lease");
        }
        if ends_by_itself {
            test_node.inventory.apply(MeshEvent::Down(peer(1)));
            tokio::time::sleep(60 * second).await;
            assert_eq!(test_node.cluster.leases().1.len(), 0);
            announce().await;
        }
    }
    drop(agent);
    tokio::time::sleep(second).await;
    assert_eq!(test_node.cluster.leases().1.len(), 0);
}

#[tokio::test(start_paused = true)]
async fn layers_without_a_provider_are_fetched_from_the_healthy_registry() {
    let (node, test_node, image) = node_after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &test_node).await;
    let healthy = node.healthy.send_replace(Arc::default());
    let mut agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    tokio::time::sleep(HOUR).await;
    assert_eq!(test_node.registry.blob_requests("r.test"), 0);
    assert!(node.has_metric("lighterman_images_lacking_layers_by_reason{reason=\"pending\"} 1"));
    node.healthy.send_replace(healthy);
    agent.wait_for_status(|status| (status.images, status.wanted, status.lacking) == (1, 1, 0)).await;
    assert_eq!((node.layers_after_collection(&image).await, test_node.registry.blob_requests("r.test")), (3, 3));
    assert!(node.has_metric("lighterman_layer_fetches_from_registries_total{outcome=\"fetched\"} 1"));
    assert!(node.has_metric("lighterman_images_lacking_layers_by_reason{reason=\"pending\"} 0"));
}

#[tokio::test(start_paused = true)]
async fn no_layer_is_fetched_from_a_registry_if_the_options_exclude_registries() {
    let (mut node, test_node, image) = node_after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &test_node).await;
    node.options.fetch = FetchFrom::Peers;
    let _agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    tokio::time::sleep(HOUR).await;
    assert_eq!((node.layers_after_collection(&image).await, test_node.registry.blob_requests("r.test")), (0, 0));
}

#[tokio::test(start_paused = true)]
async fn an_image_that_the_registry_denies_is_counted_and_comes_from_a_peer() {
    let (node, test_node, image) = node_after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &test_node).await;
    test_node.registry.make_blobs_private("r.test", PullSecret(b"ours".to_vec()));
    let mut agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    let reason = "only the kubelet's credential plugin can pull them";
    agent.wait_for_status(|status| status.lacking_reasons == [(reason.to_owned(), 1)].into()).await;
    assert!(node.has_metric("lighterman_images_lacking_layers_by_reason{reason=\"kubelet_credentials\"} 1"));
    tokio::time::sleep(HOUR).await;
    assert_eq!(test_node.registry.blob_requests("r.test"), 1, "no further request reaches the registry");
    test_node.add_provider_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    agent.wait_for_status(|status| status.lacking == 0).await;
    assert_eq!(node.layers_after_collection(&image).await, 3);
}

#[tokio::test(start_paused = true)]
async fn a_private_image_is_fetched_with_a_readable_pull_secret_of_a_pod() {
    for readable in [true, false] {
        let (node, mut test_node, image) = node_after_a_pull(1 << 20).await;
        registry_with(&LAYERS, &node, &test_node).await;
        let secret = PullSecret(b"ours".to_vec());
        test_node.registry.make_blobs_private("r.test", secret.clone());
        test_node.cluster.put_pull_secret("shop", "key", secret);
        test_node.resolve.pull_secret_namespaces = if readable { vec!["shop".into()] } else { Vec::new() };
        node.set_used_image_with_secret(IMAGE, ("shop", "key"));
        let mut agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
        match readable {
            true => agent.wait_for_status(|status| status.lacking == 0).await,
            false => {
                agent.wait_for_status(|status| status.lacking_reasons.contains_key("pull secret not readable")).await
            }
        }
        assert_eq!(node.layers_after_collection(&image).await, if readable { 3 } else { 0 });
    }
}

#[tokio::test(start_paused = true)]
async fn a_failing_registry_is_retried_with_back_off() {
    let (node, test_node, image) = node_after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &test_node).await;
    let down = RegistryError::Down { registry: "r.test".into(), kind: OutageKind::TimedOut };
    test_node.registry.set_failure("r.test", Some(down));
    let mut agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    tokio::time::sleep(6 * HOUR).await;
    let requests = test_node.registry.blob_requests("r.test");
    assert!((8..=12).contains(&requests), "{requests} requests in six hours");
    assert!(node.has_metric(&format!("lighterman_layer_fetches_from_registries_total{{outcome=\"down\"}} {requests}")));
    test_node.registry.set_failure("r.test", None);
    agent.wait_for_status(|status| status.lacking == 0).await;
    assert_eq!(node.layers_after_collection(&image).await, 3);
}

#[tokio::test(start_paused = true)]
async fn a_layer_with_wrong_bytes_is_not_stored() {
    let (node, test_node, image) = node_after_a_pull(1 << 20).await;
    registry_with(&LAYERS, &node, &test_node).await;
    for layer in &image.layers {
        test_node.registry.corrupt_blob("r.test", layer.blob.digest);
    }
    let _agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    tokio::time::sleep(HOUR / 2).await;
    assert_eq!((node.layers_after_collection(&image).await, test_node.registry.blob_requests("r.test")), (0, 1));
    assert!(node.has_metric("lighterman_layer_fetches_from_registries_total{outcome=\"wrong_bytes\"} 1"));
}

#[tokio::test(start_paused = true)]
async fn layers_are_fetched_from_a_registry_at_the_configured_rate() {
    let layers = [10 * MIN_RATE];
    let (mut node, mut test_node) = (RetainTestNode::new(RetainLayers::OptedIn, 1 << 30), TestNode::new());
    let image = node.pull(IMAGE, &layers, 7).await;
    node.set_used_images(&[IMAGE]);
    test_node.store = Arc::new(node.store.clone());
    registry_with(&layers, &node, &test_node).await;
    node.options.fetch_rate = MIN_RATE;
    let mut agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    agent.wait_for_status(|status| status.lacking_reasons.contains_key("being fetched")).await;
    let began = tokio::time::Instant::now();
    agent.wait_for_status(|status| status.lacking == 0).await;
    assert_eq!(node.layers_after_collection(&image).await, 1);
    assert!(began.elapsed() >= Duration::from_secs(9), "ten seconds minus the full bucket: {:?}", began.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_does_not_wait_for_a_slow_background_fetch() {
    let layers = [10 * MIN_RATE, 200];
    let (mut node, mut test_node) = (RetainTestNode::new(RetainLayers::OptedIn, 1 << 30), TestNode::new());
    node.pull(IMAGE, &layers[..1], 7).await;
    node.set_used_images(&[IMAGE]);
    test_node.store = Arc::new(node.store.clone());
    registry_with(&layers[..1], &node, &test_node).await;
    node.options.fetch_rate = MIN_RATE;
    let mut agent = node.start_with(Some(Arc::new(test_node.recoverer()))).await;
    agent.wait_for_status(|status| status.lacking_reasons.contains_key("being fetched")).await;
    // Another image with the same first layer.
    let other = "r.test/shop/other:v1";
    test_node.add_provider_with_layers(1, other, &layers, Behaviour::Honest).await;
    let request = other.parse::<Reference>().unwrap().into();
    let began = tokio::time::Instant::now();
    let recovered = test_node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await;
    assert_eq!(recovered.unwrap().fetched, 4);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    agent.wait_for_status(|status| status.lacking == 0).await;
    assert!(node.has_metric("lighterman_layer_fetches_from_registries_total{outcome=\"yielded\"} 1"));
}

#[tokio::test(start_paused = true)]
async fn an_outage_announced_by_a_single_peer_makes_a_registry_unhealthy() {
    let test_node = TestNode::new();
    test_node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let (inventory, registry) = (test_node.inventory.clone(), Arc::clone(&test_node.registry) as _);
    let observed_outages = watch::channel(Vec::new()).0;
    let registries = RegistryHealth::new(inventory, registry, true, observed_outages, test_node.metrics.clone());
    let (healthy, now, clock) = (registries.healthy(), std::time::Instant::now(), std::time::SystemTime::now());
    let mut outages = RegistryOutages::default();
    registries.publish(&outages, now);
    assert!(healthy.borrow().is_empty(), "a registry that never answered");
    outages.record_probe("r.test", Ok(()), now, clock);
    registries.publish(&outages, now);
    assert!(healthy.borrow().contains("r.test"));
    let outage = Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: 1 };
    test_node.inventory.apply(MeshEvent::Changed(peer(1), vec![InventoryChange::Added(InventoryItem::Outage(outage))]));
    registries.publish(&outages, now);
    assert!(healthy.borrow().is_empty());
    let reports = test_node.inventory.count_outage_reports("r.test");
    assert!(reports == 1 && !outages.counts_as_down("r.test", reports, now), "one peer is not enough for pods");
}
