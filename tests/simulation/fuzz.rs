//! Random events at random times, then a quiet period.

use std::time::Duration;

use rand::Rng;

use super::content::wait_converged;
use super::mesh::Mesh;
use super::setup::seed;

/// In a cluster of a dozen, all nodes are neighbors. In a cluster of thirty, few nodes are.
const SIZES: [usize; 4] = [12, 12, 12, 30];

/// Number of runs. Unoptimized runs take most of the tests' time.
const RUNS: u64 = if cfg!(debug_assertions) { 4 } else { 20 };

#[test]
fn inventories_converge_after_random_events_and_hold_nothing_unannounced() {
    let seed = seed();
    for run in 0..RUNS {
        let seed = seed + 1000 + run;
        println!("run {run}: LIGHTERMAN_SIM_SEED={seed}");
        let nodes = SIZES[run as usize % SIZES.len()];
        let mut mesh = Mesh::converged(nodes, 20, 4, seed);
        // The headless Service lists every node.
        mesh.nodes.iter_mut().for_each(|node| node.seeds = (0..nodes).collect());
        for _ in 0..60 {
            random_event(&mut mesh);
            mesh.assert_nothing_invented();
        }
        mesh.nodes.iter_mut().for_each(|node| (node.partition, node.is_link_down) = (0, false));
        mesh.resend();
        wait_converged(&mut mesh, "after the last event");
    }
}

fn random_event(mesh: &mut Mesh) {
    let nodes = mesh.nodes.len();
    let node = mesh.rng.random_range(0..nodes);
    let seconds = mesh.rng.random_range(0.0..4.0);
    match mesh.rng.random_range(0..12) {
        0 => mesh.kill(node),
        1 if mesh.nodes[node].agent.is_some() => mesh.leave(node),
        2..=4 if mesh.nodes[node].agent.is_none() => mesh.start(node, &Vec::from_iter(0..nodes)),
        5 => mesh.nodes[node].is_link_down = !mesh.nodes[node].is_link_down,
        6 => mesh.nodes[node].partition ^= 1,
        7 => mesh.nodes[node].starved_until = mesh.now + (seconds * 1e6) as u64,
        8 => {
            mesh.nodes.iter_mut().for_each(|node| (node.partition, node.is_link_down) = (0, false));
            mesh.resend();
        }
        _ => add_or_remove_image(mesh, node),
    }
    mesh.run_for(Duration::from_secs_f64(seconds));
}

/// Adds a whole image to a node, or removes the image if the node has it.
fn add_or_remove_image(mesh: &mut Mesh, node: usize) {
    let image = mesh.rng.random_range(0..20);
    let items = mesh.catalogue.image_items(image).to_vec();
    let is_present = items.iter().all(|item| mesh.nodes[node].items.contains(item));
    // Base layers are shared with other images and stay.
    let own: Vec<_> =
        items.iter().enumerate().filter(|(index, _)| !(10..12).contains(index)).map(|(_, item)| *item).collect();
    if is_present { mesh.change(node, &[], &own) } else { mesh.change(node, &items, &[]) }
}
