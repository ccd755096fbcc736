//! A swarm in simulated time: real piece pickers, upload slots and zone leaders on a modelled
//! network. The figures are for one blob of 256 MiB that one node has, over links of 200 Mbit/s.
//!
//! Assumptions: each direction of a node's link carries its bandwidth, and no other traffic. Chunks
//! of 64 KiB take turns at the sender and queue at the receiver, and a stream has three chunks in
//! flight. One-way latency is half a millisecond within a zone and two between zones. All nodes
//! start at once with the seed as provider, and see each other as partial providers after 0.5 to
//! 1.5 s. Piece announcements are batched for 50 ms.
//!
//! Disks, hashing, packet loss and links of different bandwidth are left out: the model ranks
//! policies and does not predict times.

mod events;
mod lease_server;
mod network;
mod node;
mod simulation;

use super::setup::seed;
use node::NodeBehavior;
use simulation::{Setting, SwarmSimulation};

/// The result of a run, in units of the time in which a link carries the blob once.
struct Outcome {
    worst: f64,
    median: f64,
    swarm: SwarmSimulation,
}

fn run_to_end(mut swarm: SwarmSimulation) -> Outcome {
    let began = std::time::Instant::now();
    let all_done = swarm.run_until(300.0, SwarmSimulation::is_done);
    let unit = swarm.unit();
    let nodes = swarm.nodes.iter().skip(1).filter(|node| node.is_alive && node.behavior != NodeBehavior::Liar);
    let mut times: Vec<_> =
        nodes.clone().map(|node| node.done_at.map_or(f64::INFINITY, |at| at as f64 / unit)).collect();
    times.sort_by(f64::total_cmp);
    assert!(
        all_done,
        "{} of {} nodes have not finished",
        times.iter().filter(|time| time.is_infinite()).count(),
        times.len()
    );
    let wasted: u64 = swarm.nodes.iter().map(|node| node.wasted).sum();
    let utilization = swarm.useful_bytes.iter().map(|bytes| {
        let capacity = swarm.setting.bandwidth as f64 / 2.0 * times.len() as f64;
        format!("{:.0}", *bytes as f64 / capacity * 100.0)
    });
    println!(
        "  {} nodes: worst {:.3}, median {:.3}, first {:.3}; the seed sent {:.2} copies, {:.1} % was wasted; percent of all links, each half second: {} [{:.0} s]",
        swarm.nodes.len(),
        times[times.len() - 1],
        times[times.len() / 2],
        times[0],
        swarm.nodes[0].bytes_sent as f64 / swarm.setting.size as f64,
        wasted as f64 / swarm.setting.size as f64 / times.len() as f64 * 100.0,
        utilization.collect::<Vec<_>>().join(" "),
        began.elapsed().as_secs_f64(),
    );
    Outcome { worst: times[times.len() - 1], median: times[times.len() / 2], swarm }
}

#[test]
fn eight_nodes_finish_in_little_more_than_one_blob_time() {
    let outcome = run_to_end(SwarmSimulation::new(Setting::usual(9, seed())));
    println!(
        "figure swarm8_model_worst_sb {:.3} (median {:.3}; 8 nodes fetch 256 MiB from one)",
        outcome.worst, outcome.median
    );
    assert!(outcome.worst <= 1.12, "{}", outcome.worst);
}

#[test]
fn fifty_nodes_take_little_longer_than_eight() {
    let outcome = run_to_end(SwarmSimulation::new(Setting::usual(51, seed())));
    assert!(outcome.worst <= 1.25, "{}", outcome.worst);
}

#[test]
fn all_nodes_finish_after_the_seed_dies_with_every_piece_in_the_swarm() {
    let mut swarm = SwarmSimulation::new(Setting::usual(21, seed() + 1));
    let has_every_piece = |swarm: &SwarmSimulation| {
        let pieces = swarm.layout.piece_count();
        (0..pieces).all(|piece| swarm.nodes[1..].iter().any(|node| node.pieces.get(piece)))
    };
    assert!(swarm.run_until(60.0, has_every_piece));
    swarm.kill(0);
    run_to_end(swarm);
}

#[test]
fn a_slow_node_and_a_lying_node_stall_no_download() {
    let mut swarm = SwarmSimulation::new(Setting::usual(21, seed() + 2));
    swarm.nodes[1].behavior = NodeBehavior::Drips;
    swarm.nodes[2].behavior = NodeBehavior::Liar;
    run_to_end(swarm);
}

/// Copies of the blob that crossed into each zone without a provider.
fn cross_zone_copies(swarm: &SwarmSimulation) -> f64 {
    swarm.cross_zone_bytes as f64 / (swarm.setting.size * (swarm.setting.zones as u64 - 1)) as f64
}

#[test]
fn three_zones_transfer_few_copies_and_write_few_leases() {
    let swarm = run_to_end(SwarmSimulation::new(Setting { zones: 3, ..Setting::usual(31, seed() + 3) })).swarm;
    println!(
        "  {:.2} copies crossed into each zone without a provider; {} Lease writes",
        cross_zone_copies(&swarm),
        swarm.server.writes
    );
    assert!(cross_zone_copies(&swarm) < 1.2, "{}", cross_zone_copies(&swarm));
    assert!(swarm.server.writes < 20, "{}", swarm.server.writes);
}

#[test]
fn the_remaining_nodes_finish_although_one_in_twenty_dies() {
    let mut swarm = SwarmSimulation::new(Setting::usual(101, seed() + 4));
    swarm.run_until(5.0, SwarmSimulation::is_done);
    (1..=5).for_each(|node| swarm.kill(20 * node));
    let outcome = run_to_end(swarm);
    assert!(outcome.worst <= 1.3, "{}", outcome.worst);
}

/// Number of nodes of the large simulations: in a debug build as many as take seconds.
fn large() -> usize {
    let default = if cfg!(debug_assertions) { 60 } else { 1000 };
    std::env::var("LIGHTERMAN_SIM_NODES").map_or(default, |text| text.parse().expect("a number of nodes"))
}

/// Prefix of a figure's line. `make figures` ignores the prefix of a smaller simulation.
fn figure(name: &str) -> String {
    if large() >= 1000 { format!("figure {name}") } else { format!("  smaller: {name}") }
}

#[test]
fn many_nodes_take_little_longer_than_one() {
    let outcome = run_to_end(SwarmSimulation::new(Setting::usual(large() + 1, seed())));
    let copies = outcome.swarm.nodes[0].bytes_sent as f64 / outcome.swarm.setting.size as f64;
    println!(
        "{} {:.3} ({} nodes fetch 256 MiB from one over 200 Mbit/s; partial providers are visible after 0.5-1.5 s)",
        figure("swarm1000_worst_sb"),
        outcome.worst,
        large()
    );
    println!("{} {:.3}", figure("swarm1000_median_sb"), outcome.median);
    println!("{} {copies:.2} (copies that the seed sent)", figure("swarm1000_seed_copies"));
    assert!(outcome.worst <= 1.3, "{}", outcome.worst);
}

#[test]
fn many_nodes_transfer_few_copies_across_zones_and_write_few_leases() {
    let swarm = run_to_end(SwarmSimulation::new(Setting { zones: 3, ..Setting::usual(large() + 1, seed()) })).swarm;
    let (copies, writes) = (cross_zone_copies(&swarm), swarm.server.writes);
    println!("{} {copies:.2} (into each of two zones without a provider)", figure("swarm1000_cross_zone_copies"));
    println!("{} {writes}", figure("lease_writes_per_image_1000"));
    assert!(writes < 40, "{writes}");
}
