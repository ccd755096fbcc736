//! A cluster converges after a partition.

use std::time::Duration;

use rand::Rng;

use super::content::{mean, received_since, wait_converged};
use super::mesh::{Mesh, shares};
use super::setup::{figure, mib, small};

#[test]
fn two_halves_converge_after_a_partition() {
    two_halves(&mut small(4));
}

pub(super) fn two_halves(mesh: &mut Mesh) {
    let nodes = mesh.nodes.len();
    for node in 0..nodes {
        mesh.nodes[node].partition = u8::from(mesh.rng.random::<bool>());
    }
    mesh.run_for(Duration::from_secs(20));
    for _ in 0..nodes.div_ceil(20) {
        let image = mesh.catalogue.new_image();
        let items = mesh.catalogue.image_items(image).to_vec();
        let node = mesh.rng.random_range(0..nodes);
        mesh.change(node, &items, &[]);
    }
    mesh.run_for(Duration::from_secs(40));
    let mut lingering = 0;
    for observer in 0..nodes {
        for other in (0..nodes).filter(|other| *other != observer) {
            if mesh.nodes[observer].partition == mesh.nodes[other].partition {
                assert!(mesh.considers_alive(observer, other), "node {observer} of node {other}");
            } else {
                lingering += usize::from(mesh.considers_alive(observer, other));
            }
        }
    }
    // A peer without a connection across the partition is not suspected there before a node dials
    // the peer.
    assert!(lingering * 20 < nodes * nodes, "{lingering} members of the other side still count as alive");
    mesh.nodes.iter_mut().for_each(|node| node.partition = 0);
    let (before, published_before) = (mesh.traffic(), mesh.published_by_kind);
    mesh.resend();
    let time = wait_converged(mesh, "two halves");
    let received = received_since(mesh, &before);
    let context = format!(
        "after 60 s apart ({lingering} wrongly alive), until all agree; {:.1} MiB received by a node on average: {}; published {:?}",
        mib(mean(&received) as usize),
        shares(&received),
        std::array::from_fn::<_, 5, _>(|kind| mesh.published_by_kind[kind] - published_before[kind]),
    );
    figure(mesh, "mesh_heal_s_1000", time.as_secs_f64(), &context);
}
