//! Who is dead is forgotten, and nobody else.

use std::time::Duration;

use rand::Rng;
use rand::seq::index;

use super::content::wait_converged;
use super::mesh::{Mesh, NodeNumber, ObservedChange};
use super::setup::{figure, small};

#[test]
fn a_killed_node_is_dropped_and_no_other() {
    a_node_is_killed(&mut small(7));
}

#[test]
fn nodes_killed_at_once_are_dropped_and_no_others() {
    many_nodes_are_killed(&mut small(8));
}

#[test]
fn a_node_whose_link_is_down_is_dropped_and_returns() {
    a_link_goes_down(&mut small(9));
}

#[test]
fn a_starved_node_returns_by_its_own_refutation() {
    a_node_is_starved(&mut small(10));
}

#[test]
fn a_rolling_restart_loses_no_other_node() {
    a_rolling_restart(&mut small(11));
}

/// How long until nobody has these any more.
fn wait_dropped(mesh: &mut Mesh, gone: &[NodeNumber]) -> Duration {
    let mut waiting: Vec<_> = (0..mesh.nodes.len()).filter(|node| !gone.contains(node)).collect();
    let time = mesh.run_until(Duration::from_secs(60), |mesh| {
        waiting.retain(|observer| gone.iter().any(|other| mesh.considers_alive(*observer, *other)));
        waiting.is_empty()
    });
    time.unwrap_or_else(|| panic!("{} nodes have not forgotten {gone:?}", waiting.len()))
}

/// Nothing happened to the others, and those who are not in trouble themselves never lost them.
fn assert_no_other_is_lost(mesh: &Mesh, since: usize, troubled: &[NodeNumber]) {
    let fine = |node: NodeNumber| !troubled.contains(&node);
    let lost = mesh.observations[since..].iter().filter(|one| matches!(one.change, ObservedChange::Down(_)));
    let lost: Vec<_> = lost.filter(|one| fine(one.observer) && fine(one.subject)).collect();
    assert!(lost.is_empty(), "{} lost without a reason, as {:?}", lost.len(), lost.first());
}

fn pick(mesh: &mut Mesh, count: usize) -> Vec<NodeNumber> {
    index::sample(&mut mesh.rng, mesh.nodes.len(), count).into_vec()
}

/// Brings back who was killed, and waits until all is well.
fn restart(mesh: &mut Mesh, gone: &[NodeNumber]) {
    for node in gone {
        let seed = (*node + 1) % mesh.nodes.len();
        mesh.start(*node, &[seed]);
    }
    let time = wait_converged(mesh, "back again");
    println!("  {} back again: {:.2} s", gone.len(), time.as_secs_f64());
}

pub(super) fn a_node_is_killed(mesh: &mut Mesh) {
    const TIMES: usize = 3;
    let mut times = Vec::new();
    for node in pick(mesh, TIMES) {
        let (judged, told) = (mesh.observations.len(), mesh.published_by_kind);
        mesh.kill(node);
        times.push(wait_dropped(mesh, &[node]).as_secs_f64());
        mesh.run_for(Duration::from_secs(15));
        assert_no_other_is_lost(mesh, judged, &[node]);
        let suspicions = mesh.published_by_kind[2] - told[2];
        assert!(suspicions <= 40, "{suspicions} suspicions of one death");
        restart(mesh, &[node]);
    }
    times.sort_by(f64::total_cmp);
    let context = format!("SIGKILL to the last inventory without it, median of {TIMES}; worst {:.2}", times[TIMES - 1]);
    figure(mesh, "sim_dead_peer_forgotten_s", times[TIMES / 2], &context);
}

pub(super) fn many_nodes_are_killed(mesh: &mut Mesh) {
    let count = mesh.nodes.len() / 20;
    let gone = pick(mesh, count);
    let (judged, told) = (mesh.observations.len(), mesh.published_by_kind);
    gone.iter().for_each(|node| mesh.kill(*node));
    let time = wait_dropped(mesh, &gone);
    mesh.run_for(Duration::from_secs(15));
    assert_no_other_is_lost(mesh, judged, &gone);
    let context = format!("{count} killed at once; {} suspicions", mesh.published_by_kind[2] - told[2]);
    figure(mesh, "sim_dead_peers_forgotten_s", time.as_secs_f64(), &context);
    // Of most the disks are gone, too: to tell what one holds costs a snapshot for each of the others, and the simulation's time.
    gone.iter().skip(3).for_each(|node| mesh.nodes[*node].items.clear());
    restart(mesh, &gone);
}

pub(super) fn a_link_goes_down(mesh: &mut Mesh) {
    let mut times = Vec::new();
    for node in pick(mesh, 3) {
        let judged = mesh.observations.len();
        mesh.nodes[node].is_link_down = true;
        times.push(wait_dropped(mesh, &[node]).as_secs_f64());
        mesh.run_for(Duration::from_secs(15));
        assert_no_other_is_lost(mesh, judged, &[node]);
        mesh.nodes[node].is_link_down = false;
        mesh.resend();
        let back = wait_converged(mesh, "its link is up again");
        println!("  its link is up again: {:.2} s", back.as_secs_f64());
        // What it tried before comes to an end.
        mesh.run_for(Duration::from_secs(10));
    }
    times.sort_by(f64::total_cmp);
    let context = format!("link down to the last inventory without it, median of 3; worst {:.2}", times[2]);
    figure(mesh, "sim_dead_peer_forgotten_link_s", times[1], &context);
}

pub(super) fn a_node_is_starved(mesh: &mut Mesh) {
    for seconds in [1, 3, 6] {
        let node = mesh.rng.random_range(0..mesh.nodes.len());
        let (judged, told, before) = (mesh.observations.len(), mesh.published_by_kind, mesh.nodes[node].traffic);
        let time = Duration::from_secs(seconds);
        mesh.nodes[node].starved_until = mesh.now + super::mesh::micros(time);
        mesh.run_for(time);
        let back = wait_converged(mesh, "one that was starved");
        mesh.run_for(Duration::from_secs(15));
        assert_no_other_is_lost(mesh, judged, &[node]);
        let lost = mesh.observations[judged..]
            .iter()
            .filter(|one| one.subject == node && matches!(one.change, ObservedChange::Down(_)));
        let told: [usize; 5] = std::array::from_fn(|kind| mesh.published_by_kind[kind] - told[kind]);
        println!(
            "  starved for {seconds} s: {} lost it, all have it back {:.2} s later; told {told:?}; it received {} KiB",
            lost.count(),
            back.as_secs_f64(),
            mesh.nodes[node].traffic.since(&before).total() / 1024,
        );
        assert!(told[2] <= 40 && told[3] <= 12, "no storm: {told:?}");
    }
}

/// Most nodes that are restarted: each costs a snapshot for each of the others, and so the simulation's time.
const MOST_RESTARTED: usize = 20;

/// A tenth of the nodes, some at a time, each down for two seconds.
pub(super) fn a_rolling_restart(mesh: &mut Mesh) {
    let count = (mesh.nodes.len() / 10).min(MOST_RESTARTED);
    let restarted = pick(mesh, count);
    let (judged, told) = (mesh.observations.len(), mesh.published_by_kind);
    for some in restarted.chunks(count.div_ceil(5)) {
        some.iter().for_each(|node| mesh.leave(*node));
        mesh.run_for(Duration::from_secs(2));
        for node in some {
            mesh.start(*node, &[(*node + 1) % mesh.nodes.len()]);
        }
        mesh.run_for(Duration::from_secs(1));
    }
    let time = wait_converged(mesh, "a rolling restart");
    assert_no_other_is_lost(mesh, judged, &restarted);
    let told: [usize; 5] = std::array::from_fn(|kind| mesh.published_by_kind[kind] - told[kind]);
    println!("  {count} restarted: all agree {:.2} s after the last; told {told:?}", time.as_secs_f64());
}
