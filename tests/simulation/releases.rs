//! Two releases side by side.

use std::time::Duration;

use super::content::settled;
use super::mesh::Mesh;
use super::size::small;

#[test]
fn a_kind_of_message_that_half_of_the_nodes_do_not_know_harms_nobody() {
    half_know_no_farewells(&mut small(16));
}

/// To the older half a farewell is a message of an unknown kind, which it drops and does not pass on.
pub(super) fn half_know_no_farewells(mesh: &mut Mesh) {
    let nodes = mesh.nodes.len();
    (0..nodes).step_by(2).for_each(|node| mesh.nodes[node].knows_farewells = false);
    mesh.leave(1);
    mesh.leave(2);
    let image = mesh.catalogue.new_image();
    let parts = mesh.catalogue.parts(image).to_vec();
    mesh.change(0, &parts, &[]);
    let time = settled(mesh, "two releases");
    println!("  two of two releases leave: {:.2} s", time.as_secs_f64());
    for node in [1, 2] {
        mesh.start(node, &[0, 3]);
    }
    mesh.run_for(Duration::from_secs(1));
    settled(mesh, "two releases, back again");
}
