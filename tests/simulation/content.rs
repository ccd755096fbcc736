//! Changes on a node reach every inventory, quickly and with few bytes.

use std::time::Duration;

use rand::Rng;
use rand::seq::IndexedRandom;

use super::mesh::{ItemNumber, Mesh, NodeNumber, Traffic, shares};
use super::setup::{figure, kbit_s, mib, small};

/// Deadline far above the expected time. The figures show whether convergence is fast enough.
pub(super) const WAIT_DEADLINE: Duration = Duration::from_secs(120);

#[test]
fn an_image_of_one_node_reaches_every_inventory() {
    an_image_on_one_node(&mut small(1));
}

#[test]
fn an_image_of_all_nodes_reaches_every_inventory() {
    an_image_on_every_node(&mut small(2));
}

#[test]
fn changes_in_a_quiet_cluster_reach_every_inventory() {
    a_quiet_time(&mut small(3), Duration::from_secs(60));
}

/// Asserts that all running nodes' inventories become exact. Returns the time until then.
pub(super) fn wait_converged(mesh: &mut Mesh, what: &str) -> Duration {
    let observers = mesh.running();
    let time = mesh.wait_converged(WAIT_DEADLINE, &observers);
    let time = time.unwrap_or_else(|| panic!("{what}: {}", mesh.first_difference()));
    let observers = sample(mesh);
    mesh.assert_inventories_exact(&observers);
    time
}

/// All nodes of a small cluster, and some of a large one: comparing every item takes time.
fn sample(mesh: &mut Mesh) -> Vec<NodeNumber> {
    let nodes = mesh.running();
    if nodes.len() <= 100 { nodes } else { nodes.choose_multiple(&mut mesh.rng, 8).copied().collect() }
}

/// The traffic since `before`.
pub(super) fn received_since(mesh: &Mesh, before: &[Traffic]) -> Vec<Traffic> {
    mesh.traffic().iter().zip(before).map(|(now, before)| now.since(before)).collect()
}

pub(super) fn mean(traffic: &[Traffic]) -> u64 {
    traffic.iter().map(Traffic::total).sum::<u64>() / traffic.len() as u64
}

pub(super) fn an_image_on_one_node(mesh: &mut Mesh) -> Duration {
    let image = mesh.catalogue.new_image();
    let items = mesh.catalogue.image_items(image).to_vec();
    let node = mesh.rng.random_range(0..mesh.nodes.len());
    mesh.change(node, &items, &[]);
    let time = wait_converged(mesh, "an image on one node");
    println!("  an image on one node: {:.2} s until all inventories agree", time.as_secs_f64());
    time
}

/// Length of a rollout. Each node gets the image at a random moment within this time.
const ROLLOUT: Duration = Duration::from_secs(30);

pub(super) fn an_image_on_every_node(mesh: &mut Mesh) -> Duration {
    let image = mesh.catalogue.new_image();
    let items = mesh.catalogue.image_items(image).to_vec();
    let (before, published_before, began) = (mesh.traffic(), mesh.published_by_kind, mesh.now);
    let received_before = mesh.nodes.iter().map(|node| node.messages_received).sum::<u64>();
    let mut moments: Vec<_> = (0..mesh.nodes.len()).map(|node| (mesh.rng.random_range(0.0..1.0), node)).collect();
    moments.sort_by(|one, other| f64::total_cmp(&one.0, &other.0));
    for (moment, node) in moments {
        let at = began + (ROLLOUT.mul_f64(moment).as_micros() as u64);
        mesh.run_for(Duration::from_micros(at.saturating_sub(mesh.now)));
        mesh.change(node, &items, &[]);
    }
    let time = wait_converged(mesh, "an image on every node");
    let received = received_since(mesh, &before);
    let took = Duration::from_micros(mesh.now - began);
    let messages_received = mesh.nodes.iter().map(|node| node.messages_received).sum::<u64>() - received_before;
    let context = format!(
        "received by a node on average, from a rollout of 30 s to the last inventory; {}; {} entries, {messages_received} received",
        shares(&received),
        mesh.published_by_kind[0] - published_before[0],
    );
    figure(mesh, "mesh_burst_kbit_s_1000", kbit_s(mean(&received), took), &context);
    println!("  an image on all nodes: {:.2} s after the last node", time.as_secs_f64());
    time
}

/// Interval between two changes of a node. A change has ten items, so a node changes a hundred
/// items an hour.
const CHANGE_INTERVAL: Duration = Duration::from_secs(360);

pub(super) fn a_quiet_time(mesh: &mut Mesh, time: Duration) {
    let candidates: Vec<ItemNumber> = (0..40)
        .flat_map(|_| {
            let image = mesh.catalogue.new_image();
            // Blobs only, without the index: an announced name counts only together with the index.
            mesh.catalogue.image_items(image)[1..10].to_vec()
        })
        .collect();
    let (before, published_before, began) = (mesh.traffic(), mesh.published_by_kind, mesh.now);
    let changes = (mesh.nodes.len() as f64 * time.as_secs_f64() / CHANGE_INTERVAL.as_secs_f64()) as u32;
    for _ in 0..changes {
        mesh.run_for(time / changes);
        let node = mesh.rng.random_range(0..mesh.nodes.len());
        let ten: Vec<_> = candidates.choose_multiple(&mut mesh.rng, 10).copied().collect();
        let (removed, added): (Vec<_>, Vec<_>) =
            ten.into_iter().partition(|item| mesh.nodes[node].items.contains(item));
        mesh.change(node, &added, &removed);
    }
    let received = received_since(mesh, &before);
    let took = Duration::from_micros(mesh.now - began);
    let rates: Vec<_> = received.iter().map(|traffic| kbit_s(traffic.total(), took)).collect();
    let worst = rates.iter().copied().fold(0.0, f64::max);
    let average = kbit_s(mean(&received), took);
    let neighbors = mesh.nodes.iter().filter_map(|node| node.agent.as_ref()).map(|agent| agent.neighbors.len());
    let context = format!(
        "received by a node on average, worst {worst:.1}; {:.1} neighbors; {}; published {:?}",
        neighbors.sum::<usize>() as f64 / mesh.nodes.len() as f64,
        shares(&received),
        std::array::from_fn::<_, 5, _>(|kind| mesh.published_by_kind[kind] - published_before[kind]),
    );
    figure(mesh, "mesh_idle_kbit_s_1000", average, &context);
    wait_converged(mesh, "a quiet time");
}

pub(super) fn an_inventory_is_small(mesh: &Mesh) {
    let Some(agent) = &mesh.nodes[0].agent else { panic!("node 0 runs") };
    let bytes = agent.inventory.bytes();
    let items: usize = mesh.nodes.iter().map(|node| node.items.len()).sum();
    let context = format!("{} items of {} nodes, {} different ones", items, mesh.nodes.len(), agent.inventory.items());
    figure(mesh, "inventory_mib_1000", mib(bytes), &context);
}
