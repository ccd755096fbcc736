//! A thousand nodes: all events on one cluster, one after the other, and the figures.

use std::time::Duration;

use super::mesh::Mesh;
use super::setup::{figure, seed};
use super::{content, joining, liveness, lying_members, partition};

/// Number of images. Each has 12 blobs, ten of them unique, so there are 20 000 different blobs.
const IMAGES: usize = 2000;
/// Images on each node: some 3000 blobs.
const IMAGES_EACH: usize = 300;

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes in a release build")]
fn a_thousand_nodes_converge_after_every_kind_of_event() {
    let nodes = std::env::var("LIGHTERMAN_SIM_NODES").map_or(1000, |text| text.parse().expect("a number of nodes"));
    let began = std::time::Instant::now();
    let done = |what: &str| println!("  [{:.0} s: {what}]", began.elapsed().as_secs_f64());
    let mut mesh = Mesh::converged(nodes, IMAGES, IMAGES_EACH, seed());
    done("converged");
    content::an_inventory_is_small(&mesh);
    content::a_quiet_time(&mut mesh, Duration::from_secs(120));
    done("quiet");
    let one = content::an_image_on_one_node(&mut mesh);
    let all = content::an_image_on_every_node(&mut mesh);
    done("burst");
    let context =
        "from the last change to the last inventory; one node gets an image or all do within 30 s, the larger";
    figure(&mesh, "mesh_converge_s_1000", one.max(all).as_secs_f64(), context);
    liveness::a_node_is_killed(&mut mesh);
    done("kills");
    liveness::many_nodes_are_killed(&mut mesh);
    done("many killed");
    liveness::a_link_goes_down(&mut mesh);
    done("links");
    liveness::a_node_is_starved(&mut mesh);
    done("starved");
    joining::a_new_node(&mut mesh);
    done("newcomer");
    partition::two_halves(&mut mesh);
    done("partition");
    liveness::a_rolling_restart(&mut mesh);
    done("restarts");
    lying_members::false_suspicions(&mut mesh);
    lying_members::a_forger(&mut mesh);
    done("liars");
    drop(mesh);
    // Nodes have few images here: with 300 images each, a snapshot of every node for every other
    // node takes an hour to simulate.
    let mut mesh = Mesh::new(nodes, IMAGES, 10, seed());
    joining::nodes_start_at_once(&mut mesh);
    done("started");
}
