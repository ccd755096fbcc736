//! Agents that start, alone and all at once.

use std::time::Duration;

use rand::Rng;

use super::content::{WAIT_DEADLINE, mean, received_since, wait_converged};
use super::mesh::{Mesh, shares};
use super::setup::{SMALL, figure, mib, seed, small};

#[test]
fn a_new_node_with_one_seed_address_gets_the_whole_inventory() {
    a_new_node(&mut small(5));
}

#[test]
fn nodes_started_at_once_find_each_other() {
    nodes_start_at_once(&mut Mesh::new(SMALL, 60, 6, seed() + 6));
}

pub(super) fn a_new_node(mesh: &mut Mesh) {
    let (seed, before) = (mesh.rng.random_range(0..mesh.nodes.len()), mesh.traffic());
    let node = mesh.add_node(mesh.nodes[0].items.len() / 14);
    mesh.start(node, &[seed]);
    let time = mesh.wait_converged(WAIT_DEADLINE, &[node]);
    let time = time.unwrap_or_else(|| panic!("a new node: {}", mesh.first_difference()));
    let traffic = mesh.nodes[node].traffic;
    let context = format!("from the start with one address to a complete inventory; {}", shares(&[traffic]));
    figure(mesh, "mesh_newcomer_s_1000", time.as_secs_f64(), &context);
    figure(mesh, "mesh_newcomer_mib_1000", mib(traffic.total() as usize), "received until then");
    let more = wait_converged(mesh, "a new node");
    let received = received_since(mesh, &before);
    println!(
        "  the new node is in all inventories {:.2} s later; each node received {:.1} KiB",
        more.as_secs_f64(),
        mean(&received) as f64 / 1024.0
    );
}

/// Each node starts with the same three addresses.
pub(super) fn nodes_start_at_once(mesh: &mut Mesh) {
    let before = mesh.traffic();
    for node in 0..mesh.nodes.len() {
        // Processes of a DaemonSet start within a second of each other.
        mesh.run_for(Duration::from_secs(1) / mesh.nodes.len() as u32);
        mesh.start(node, &[0, 1, 2].map(|seed| if seed == node { 3 } else { seed }));
    }
    let time = wait_converged(mesh, "all at once");
    let received = received_since(mesh, &before);
    let context = format!(
        "all start within a second with three addresses, until all agree; {:.1} MiB received by a node on average, {:.1} by the worst; {}; published {:?}",
        mib(mean(&received) as usize),
        mib(received.iter().map(|one| one.total()).max().unwrap_or(0) as usize),
        shares(&received),
        mesh.published_by_kind,
    );
    figure(mesh, "mesh_start_s_1000", time.as_secs_f64(), &context);
}
