//! The model's bytes, for comparison with real bytes: the same announcements are measured with
//! thirty real agents in `tests/components/mesh.rs`.

use std::time::Duration;

use super::content::{mean, received_since};
use super::mesh::{Mesh, shares};
use super::setup::seed;

const AGENTS: usize = 30;
const PUBLISHERS: usize = 10;
const ROUNDS: usize = 12;

/// Time between rounds. Agents batch changes for one second.
const APART: Duration = Duration::from_millis(1500);

/// Bytes that an agent receives for one gossip message, without the idle traffic: copies, framing,
/// and gossipsub's control messages.
pub(super) fn bytes_per_message() -> f64 {
    let mut mesh = Mesh::converged(AGENTS, 30, 2, seed() + 30);
    let (before, watched) = (mesh.traffic(), APART * (ROUNDS as u32 + 1));
    mesh.run_for(watched);
    let idle = mean(&received_since(&mesh, &before));

    let received = |mesh: &Mesh| mesh.nodes.iter().map(|node| node.messages_received).sum::<u64>();
    let (before, received_before) = (mesh.traffic(), received(&mesh));
    for round in 0..ROUNDS {
        for publisher in 0..PUBLISHERS {
            let blob = mesh.catalogue.new_blob(&format!("round {round} {publisher}"));
            mesh.change(publisher, &[blob], &[]);
            // A real containerd takes some milliseconds to write a blob.
            mesh.run_for(Duration::from_millis(10));
        }
        mesh.run_for(APART - Duration::from_millis(10) * PUBLISHERS as u32);
    }
    mesh.run_for(APART);
    let traffic = received_since(&mesh, &before);
    let messages = (received(&mesh) - received_before) as f64 / AGENTS as f64;
    let bytes = mean(&traffic).saturating_sub(idle) as f64 / messages;
    let context = format!("received by an agent above idle traffic, / {messages:.0} messages; {}", shares(&traffic));
    println!("figure mesh_bytes_per_message_model {bytes:.0} ({context})");
    bytes
}

#[test]
fn a_message_costs_the_bytes_of_its_copies() {
    // A log head and one blob are 270 bytes, or 400 with all headers. Each agent has four to a
    // dozen connections. A message crosses each connection at most once, and IHAVE names the
    // message on some connections in seven heartbeats.
    let bytes = bytes_per_message();
    assert!((400.0..12.0 * 400.0).contains(&bytes), "{bytes}");
}
