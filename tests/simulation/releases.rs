//! Two releases side by side.

use std::time::Duration;

use super::content::wait_converged;
use super::mesh::Mesh;
use super::setup::small;

#[test]
fn a_message_kind_unknown_to_half_of_the_nodes_harms_no_node() {
    half_the_nodes_lack_a_message_kind(&mut small(16));
}

/// For the older half, a leave notice has an unknown message kind. A node drops such a message and
/// does not forward it.
pub(super) fn half_the_nodes_lack_a_message_kind(mesh: &mut Mesh) {
    let nodes = mesh.nodes.len();
    (0..nodes).step_by(2).for_each(|node| mesh.nodes[node].supports_leave = false);
    mesh.leave(1);
    mesh.leave(2);
    let image = mesh.catalogue.new_image();
    let items = mesh.catalogue.image_items(image).to_vec();
    mesh.change(0, &items, &[]);
    let time = wait_converged(mesh, "two releases");
    println!("  two members of two releases leave: {:.2} s", time.as_secs_f64());
    for node in [1, 2] {
        mesh.start(node, &[0, 3]);
    }
    mesh.run_for(Duration::from_secs(1));
    wait_converged(mesh, "two releases after restarts");
}
