//! Dead members are dropped, and no other members.

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

/// Waits until no other node has these nodes in its inventory.
fn wait_dropped(mesh: &mut Mesh, dropped: &[NodeNumber]) -> Duration {
    let mut waiting: Vec<_> = (0..mesh.nodes.len()).filter(|node| !dropped.contains(node)).collect();
    let time = mesh.run_until(Duration::from_secs(60), |mesh| {
        waiting.retain(|observer| dropped.iter().any(|other| mesh.considers_alive(*observer, *other)));
        waiting.is_empty()
    });
    time.unwrap_or_else(|| panic!("{} nodes have not dropped {dropped:?}", waiting.len()))
}

/// Asserts that no node outside `troubled` dropped a node outside `troubled` since the observation
/// with number `since`.
fn assert_no_other_is_lost(mesh: &Mesh, since: usize, excluded: &[NodeNumber]) {
    let is_other = |node: NodeNumber| !excluded.contains(&node);
    let lost = mesh.observations[since..].iter().filter(|one| matches!(one.change, ObservedChange::Down(_)));
    let lost: Vec<_> = lost.filter(|one| is_other(one.observer) && is_other(one.subject)).collect();
    assert!(lost.is_empty(), "{} members were dropped without a reason, such as {:?}", lost.len(), lost.first());
}

fn pick(mesh: &mut Mesh, count: usize) -> Vec<NodeNumber> {
    index::sample(&mut mesh.rng, mesh.nodes.len(), count).into_vec()
}

/// Starts the agents of these nodes again, and waits for exact inventories.
fn restart(mesh: &mut Mesh, stopped: &[NodeNumber]) {
    for node in stopped {
        let seed = (*node + 1) % mesh.nodes.len();
        mesh.start(*node, &[seed]);
    }
    let time = wait_converged(mesh, "restarted");
    println!("  {} restarted: {:.2} s", stopped.len(), time.as_secs_f64());
}

pub(super) fn a_node_is_killed(mesh: &mut Mesh) {
    const TIMES: usize = 3;
    let mut times = Vec::new();
    for node in pick(mesh, TIMES) {
        let (observed, published_before) = (mesh.observations.len(), mesh.published_by_kind);
        mesh.kill(node);
        times.push(wait_dropped(mesh, &[node]).as_secs_f64());
        mesh.run_for(Duration::from_secs(15));
        assert_no_other_is_lost(mesh, observed, &[node]);
        let suspicions = mesh.published_by_kind[2] - published_before[2];
        assert!(suspicions <= 40, "{suspicions} suspicions of a single dead member");
        restart(mesh, &[node]);
    }
    times.sort_by(f64::total_cmp);
    let context = format!(
        "from SIGKILL until the last inventory drops the node, median of {TIMES}; worst {:.2}",
        times[TIMES - 1]
    );
    figure(mesh, "sim_dead_peer_forgotten_s", times[TIMES / 2], &context);
}

pub(super) fn many_nodes_are_killed(mesh: &mut Mesh) {
    let count = mesh.nodes.len() / 20;
    let killed = pick(mesh, count);
    let (observed, published_before) = (mesh.observations.len(), mesh.published_by_kind);
    killed.iter().for_each(|node| mesh.kill(*node));
    let time = wait_dropped(mesh, &killed);
    mesh.run_for(Duration::from_secs(15));
    assert_no_other_is_lost(mesh, observed, &killed);
    let context = format!("{count} killed at once; {} suspicions", mesh.published_by_kind[2] - published_before[2]);
    figure(mesh, "sim_dead_peers_forgotten_s", time.as_secs_f64(), &context);
    // All nodes but three lose their content too. Each node's content costs a snapshot for every
    // other node, and simulation time.
    killed.iter().skip(3).for_each(|node| mesh.nodes[*node].items.clear());
    restart(mesh, &killed);
}

pub(super) fn a_link_goes_down(mesh: &mut Mesh) {
    let mut times = Vec::new();
    for node in pick(mesh, 3) {
        let observed = mesh.observations.len();
        mesh.nodes[node].is_link_down = true;
        times.push(wait_dropped(mesh, &[node]).as_secs_f64());
        mesh.run_for(Duration::from_secs(15));
        assert_no_other_is_lost(mesh, observed, &[node]);
        mesh.nodes[node].is_link_down = false;
        mesh.resend();
        let back = wait_converged(mesh, "the link is up again");
        println!("  the link is up again: {:.2} s", back.as_secs_f64());
        // Lets the node's earlier connection attempts end.
        mesh.run_for(Duration::from_secs(10));
    }
    times.sort_by(f64::total_cmp);
    let context = format!("from link down until the last inventory drops the node, median of 3; worst {:.2}", times[2]);
    figure(mesh, "sim_dead_peer_forgotten_link_s", times[1], &context);
}

pub(super) fn a_node_is_starved(mesh: &mut Mesh) {
    for seconds in [1, 3, 6] {
        let node = mesh.rng.random_range(0..mesh.nodes.len());
        let (observed, published_before, before) =
            (mesh.observations.len(), mesh.published_by_kind, mesh.nodes[node].traffic);
        let time = Duration::from_secs(seconds);
        mesh.nodes[node].starved_until = mesh.now + super::mesh::micros(time);
        mesh.run_for(time);
        let back = wait_converged(mesh, "a starved node");
        mesh.run_for(Duration::from_secs(15));
        assert_no_other_is_lost(mesh, observed, &[node]);
        let lost = mesh.observations[observed..]
            .iter()
            .filter(|one| one.subject == node && matches!(one.change, ObservedChange::Down(_)));
        let published: [usize; 5] = std::array::from_fn(|kind| mesh.published_by_kind[kind] - published_before[kind]);
        println!(
            "  starved for {seconds} s: dropped by {}, in all inventories {:.2} s later; published {published:?}; received {} KiB",
            lost.count(),
            back.as_secs_f64(),
            mesh.nodes[node].traffic.since(&before).total() / 1024,
        );
        assert!(published[2] <= 40 && published[3] <= 12, "a starved node causes no storm of messages: {published:?}");
    }
}

/// Upper bound of restarted nodes: each restart costs a snapshot for every other node, and
/// simulation time.
const MAX_RESTARTED: usize = 20;

/// Restarts a tenth of the nodes in five groups. Each node is down for two seconds.
pub(super) fn a_rolling_restart(mesh: &mut Mesh) {
    let count = (mesh.nodes.len() / 10).min(MAX_RESTARTED);
    let restarted = pick(mesh, count);
    let (observed, published_before) = (mesh.observations.len(), mesh.published_by_kind);
    for batch in restarted.chunks(count.div_ceil(5)) {
        batch.iter().for_each(|node| mesh.leave(*node));
        mesh.run_for(Duration::from_secs(2));
        for node in batch {
            mesh.start(*node, &[(*node + 1) % mesh.nodes.len()]);
        }
        mesh.run_for(Duration::from_secs(1));
    }
    let time = wait_converged(mesh, "a rolling restart");
    assert_no_other_is_lost(mesh, observed, &restarted);
    let published: [usize; 5] = std::array::from_fn(|kind| mesh.published_by_kind[kind] - published_before[kind]);
    println!("  {count} restarted: all agree {:.2} s after the last; published {published:?}", time.as_secs_f64());
}
