//! The model's bytes beside the real ones: the same announcements that thirty real agents are measured with (`tests/components/mesh.rs`).

use std::time::Duration;

use super::content::{mean, received_since};
use super::mesh::{Mesh, shares};
use super::setup::seed;

const AGENTS: usize = 30;
const PUBLISHERS: usize = 10;
const ROUNDS: usize = 12;

/// Changes are gathered for a second.
const APART: Duration = Duration::from_millis(1500);

/// What an agent receives beyond its idling for one message of gossip: copies, framing, and what is told about it.
pub(super) fn bytes_per_message() -> f64 {
    let mut mesh = Mesh::converged(AGENTS, 30, 2, seed() + 30);
    let (before, watched) = (mesh.traffic(), APART * (ROUNDS as u32 + 1));
    mesh.run_for(watched);
    let idle = mean(&received_since(&mesh, &before));

    let heard = |mesh: &Mesh| mesh.nodes.iter().map(|node| node.messages_received).sum::<u64>();
    let (before, heard_before) = (mesh.traffic(), heard(&mesh));
    for round in 0..ROUNDS {
        for publisher in 0..PUBLISHERS {
            let blob = mesh.catalogue.new_blob(&format!("round {round} {publisher}"));
            mesh.change(publisher, &[blob], &[]);
            // Writing it takes a real containerd some milliseconds.
            mesh.run_for(Duration::from_millis(10));
        }
        mesh.run_for(APART - Duration::from_millis(10) * PUBLISHERS as u32);
    }
    mesh.run_for(APART);
    let traffic = received_since(&mesh, &before);
    let messages = (heard(&mesh) - heard_before) as f64 / AGENTS as f64;
    let bytes = mean(&traffic).saturating_sub(idle) as f64 / messages;
    let context =
        format!("received beyond idling, by an agent, / {messages:.0} messages that came; {}", shares(&traffic));
    println!("figure mesh_bytes_per_message_model {bytes:.0} ({context})");
    bytes
}

#[test]
fn a_message_costs_the_bytes_of_its_copies() {
    // A head and one blob are 270 bytes, 400 with all headers. Each agent has four to a dozen connections, a message comes over each of them
    // once at most, and its name, in seven heartbeats, over some.
    let bytes = bytes_per_message();
    assert!((400.0..12.0 * 400.0).contains(&bytes), "{bytes}");
}
