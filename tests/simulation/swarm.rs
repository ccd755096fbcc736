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
use node::NodeBehaviour;
use simulation::{Setting, SwarmSimulation};

/// The result of a run, in units of the time in which a link carries the blob once.
struct Outcome {
    worst: f64,
    median: f64,
    world: SwarmSimulation,
}

fn run_to_end(mut world: SwarmSimulation) -> Outcome {
    let began = std::time::Instant::now();
    let all = world.run_until(300.0, SwarmSimulation::is_done);
    let unit = world.unit();
    let nodes = world.nodes.iter().skip(1).filter(|node| node.is_alive && node.behaviour != NodeBehaviour::Liar);
    let mut times: Vec<_> =
        nodes.clone().map(|node| node.done_at.map_or(f64::INFINITY, |at| at as f64 / unit)).collect();
    times.sort_by(f64::total_cmp);
    assert!(
        all,
        "{} of {} nodes have not finished",
        times.iter().filter(|time| time.is_infinite()).count(),
        times.len()
    );
    let wasted: u64 = world.nodes.iter().map(|node| node.wasted).sum();
    let course = world.useful_bytes.iter().map(|bytes| {
        let most = world.setting.bandwidth as f64 / 2.0 * times.len() as f64;
        format!("{:.0}", *bytes as f64 / most * 100.0)
    });
    println!(
        "  {} nodes: worst {:.3}, median {:.3}, first {:.3}; the seed sent {:.2} copies, {:.1} % was wasted; percent of all links, each half second: {} [{:.0} s]",
        world.nodes.len(),
        times[times.len() - 1],
        times[times.len() / 2],
        times[0],
        world.nodes[0].bytes_sent as f64 / world.setting.size as f64,
        wasted as f64 / world.setting.size as f64 / times.len() as f64 * 100.0,
        course.collect::<Vec<_>>().join(" "),
        began.elapsed().as_secs_f64(),
    );
    Outcome { worst: times[times.len() - 1], median: times[times.len() / 2], world }
}

#[test]
fn eight_nodes_finish_in_little_more_than_one_blob_time() {
    let of = run_to_end(SwarmSimulation::new(Setting::usual(9, seed())));
    println!("figure swarm8_model_worst_sb {:.3} (median {:.3}; 8 nodes fetch 256 MiB from one)", of.worst, of.median);
    assert!(of.worst <= 1.12, "{}", of.worst);
}

#[test]
fn fifty_nodes_take_little_longer_than_eight() {
    let of = run_to_end(SwarmSimulation::new(Setting::usual(51, seed())));
    assert!(of.worst <= 1.25, "{}", of.worst);
}

#[test]
fn all_nodes_finish_after_the_seed_dies_with_every_piece_in_the_swarm() {
    let mut world = SwarmSimulation::new(Setting::usual(21, seed() + 1));
    let is_there = |world: &SwarmSimulation| {
        let pieces = world.cut.piece_count();
        (0..pieces).all(|piece| world.nodes[1..].iter().any(|node| node.pieces.get(piece)))
    };
    assert!(world.run_until(60.0, is_there));
    world.kill(0);
    run_to_end(world);
}

#[test]
fn a_slow_node_and_a_lying_node_stall_no_download() {
    let mut world = SwarmSimulation::new(Setting::usual(21, seed() + 2));
    world.nodes[1].behaviour = NodeBehaviour::Drips;
    world.nodes[2].behaviour = NodeBehaviour::Liar;
    run_to_end(world);
}

/// Copies of the blob that crossed into each zone without a provider.
fn cross_zone_copies(world: &SwarmSimulation) -> f64 {
    world.cross_zone_bytes as f64 / (world.setting.size * (world.setting.zones as u64 - 1)) as f64
}

#[test]
fn three_zones_transfer_few_copies_and_write_few_leases() {
    let world = run_to_end(SwarmSimulation::new(Setting { zones: 3, ..Setting::usual(31, seed() + 3) })).world;
    println!(
        "  {:.2} copies crossed into each zone without a provider; {} Lease writes",
        cross_zone_copies(&world),
        world.server.writes
    );
    assert!(cross_zone_copies(&world) < 1.2, "{}", cross_zone_copies(&world));
    assert!(world.server.writes < 20, "{}", world.server.writes);
}

#[test]
fn the_remaining_nodes_finish_although_one_in_twenty_dies() {
    let mut world = SwarmSimulation::new(Setting::usual(101, seed() + 4));
    world.run_until(5.0, SwarmSimulation::is_done);
    (1..=5).for_each(|node| world.kill(20 * node));
    let of = run_to_end(world);
    assert!(of.worst <= 1.3, "{}", of.worst);
}

/// Number of nodes of the large simulations.
fn large() -> usize {
    std::env::var("LIGHTERMAN_SIM_NODES").map_or(1000, |text| text.parse().expect("a number of nodes"))
}

/// Prefix of a figure's line. `make figures` ignores the prefix of a smaller simulation.
fn figure(name: &str) -> String {
    if large() >= 1000 { format!("figure {name}") } else { format!("  smaller: {name}") }
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes in a release build")]
fn a_thousand_nodes_take_little_longer_than_one() {
    let of = run_to_end(SwarmSimulation::new(Setting::usual(large() + 1, seed())));
    let copies = of.world.nodes[0].bytes_sent as f64 / of.world.setting.size as f64;
    println!(
        "{} {:.3} ({} nodes fetch 256 MiB from one over 200 Mbit/s; partial providers are visible after 0.5-1.5 s)",
        figure("swarm1000_worst_sb"),
        of.worst,
        large()
    );
    println!("{} {:.3}", figure("swarm1000_median_sb"), of.median);
    println!("{} {copies:.2} (copies that the seed sent)", figure("swarm1000_seed_copies"));
    assert!(of.worst <= 1.3, "{}", of.worst);
}

#[test]
#[cfg_attr(debug_assertions, ignore = "takes minutes in a release build")]
fn a_thousand_nodes_transfer_few_copies_across_zones_and_write_few_leases() {
    let world = run_to_end(SwarmSimulation::new(Setting { zones: 3, ..Setting::usual(large() + 1, seed()) })).world;
    let (copies, writes) = (cross_zone_copies(&world), world.server.writes);
    println!("{} {copies:.2} (into each of two zones without a provider)", figure("swarm1000_cross_zone_copies"));
    println!("{} {writes}", figure("lease_writes_per_image_1000"));
    assert!(writes < 40, "{writes}");
}
