//! Layers that a node discarded before the agent ran, fetched from peers.

use std::sync::Arc;

use super::*;
use crate::agent::retain::tests::Node;
use crate::decide::retain::RetainLayers;

const LAYERS: [u64; 3] = [3000, 200, 10];

/// A node that pulled the image before the agent ran, and a harbour with the node's store.
async fn after_a_pull(budget: u64) -> (Node, Harbour, MadeImage) {
    let (node, mut harbour) = (Node::new(RetainLayers::OptedIn, budget), Harbour::new());
    let image = node.pull(IMAGE, &LAYERS, 7).await;
    node.uses(&[IMAGE]);
    harbour.store = Arc::new(node.store.clone());
    assert_eq!(node.layers_here(&image).await, 0);
    (node, harbour, image)
}

#[tokio::test(start_paused = true)]
async fn layers_discarded_before_the_agent_ran_come_from_a_peer() {
    let (node, harbour, image) = after_a_pull(1 << 20).await;
    harbour.peer_with_layers(1, IMAGE, &LAYERS, Behaviour::Honest).await;
    let mut agent = node.start_with(Some(Arc::new(harbour.recoverer()))).await;
    agent.shows(|status| (status.images, status.wanted, status.lacking) == (1, 1, 0)).await;
    assert_eq!(node.layers_here(&image).await, 3);
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
        tokio::time::sleep(std::time::Duration::from_secs(3600)).await;
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
        while harbour.cluster.leases().1.len() == 0 {
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
