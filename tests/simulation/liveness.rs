//! Who is dead is forgotten, and nobody else.

use std::time::Duration;

use rand::Rng;
use rand::seq::index;

use super::content::settled;
use super::mesh::{Judged, Mesh, NodeNumber};
use super::size::{figure, small};

#[test]
fn one_that_is_killed_is_forgotten_and_nobody_else() {
    one_is_killed(&mut small(7));
}

#[test]
fn many_that_are_killed_at_once_are_forgotten_and_nobody_else() {
    many_are_killed(&mut small(8));
}

#[test]
fn one_whose_link_is_down_is_forgotten_and_comes_back() {
    a_link_goes_down(&mut small(9));
}

#[test]
fn one_that_does_not_get_the_processor_comes_back_by_its_own_word() {
    one_is_starved(&mut small(10));
}

#[test]
fn a_rolling_restart_loses_nobody() {
    a_rolling_restart(&mut small(11));
}

/// How long until nobody has these any more.
fn forgotten(mesh: &mut Mesh, gone: &[NodeNumber]) -> Duration {
    let mut waiting: Vec<_> = (0..mesh.nodes.len()).filter(|node| !gone.contains(node)).collect();
    let time = mesh.run_until(Duration::from_secs(60), |mesh| {
        waiting.retain(|observer| gone.iter().any(|other| mesh.holds_for_alive(*observer, *other)));
        waiting.is_empty()
    });
    time.unwrap_or_else(|| panic!("{} nodes have not forgotten {gone:?}", waiting.len()))
}

/// Nothing happened to the others, and those who are not in trouble themselves never lost them.
fn assert_nobody_else_is_lost(mesh: &Mesh, since: usize, troubled: &[NodeNumber]) {
    let fine = |node: NodeNumber| !troubled.contains(&node);
    let lost = mesh.judgements[since..].iter().filter(|one| matches!(one.verdict, Judged::Down(_)));
    let lost: Vec<_> = lost.filter(|one| fine(one.by) && fine(one.of)).collect();
    assert!(lost.is_empty(), "{} lost without a reason, as {:?}", lost.len(), lost.first());
}

fn some(mesh: &mut Mesh, count: usize) -> Vec<NodeNumber> {
    index::sample(&mut mesh.rng, mesh.nodes.len(), count).into_vec()
}

/// Brings back who was killed, and waits until all is well.
fn revive(mesh: &mut Mesh, gone: &[NodeNumber]) {
    for node in gone {
        let seed = (*node + 1) % mesh.nodes.len();
        mesh.start(*node, &[seed]);
    }
    let time = settled(mesh, "back again");
    println!("  {} back again: {:.2} s", gone.len(), time.as_secs_f64());
}

pub(super) fn one_is_killed(mesh: &mut Mesh) {
    const TIMES: usize = 3;
    let mut times = Vec::new();
    for node in some(mesh, TIMES) {
        let (judged, told) = (mesh.judgements.len(), mesh.told);
        mesh.kill(node);
        times.push(forgotten(mesh, &[node]).as_secs_f64());
        mesh.run_for(Duration::from_secs(15));
        assert_nobody_else_is_lost(mesh, judged, &[node]);
        let suspicions = mesh.told[2] - told[2];
        assert!(suspicions <= 40, "{suspicions} suspicions of one death");
        revive(mesh, &[node]);
    }
    times.sort_by(f64::total_cmp);
    let context = format!("SIGKILL to the last inventory without it, median of {TIMES}; worst {:.2}", times[TIMES - 1]);
    figure(mesh, "sim_dead_peer_forgotten_s", times[TIMES / 2], &context);
}

pub(super) fn many_are_killed(mesh: &mut Mesh) {
    let count = mesh.nodes.len() / 20;
    let gone = some(mesh, count);
    let (judged, told) = (mesh.judgements.len(), mesh.told);
    gone.iter().for_each(|node| mesh.kill(*node));
    let time = forgotten(mesh, &gone);
    mesh.run_for(Duration::from_secs(15));
    assert_nobody_else_is_lost(mesh, judged, &gone);
    let context = format!("{count} killed at once; {} suspicions", mesh.told[2] - told[2]);
    figure(mesh, "sim_dead_peers_forgotten_s", time.as_secs_f64(), &context);
    // Of most the disks are gone, too: to tell what one holds costs a snapshot for each of the others, and the simulation's time.
    gone.iter().skip(3).for_each(|node| mesh.nodes[*node].held.clear());
    revive(mesh, &gone);
}

pub(super) fn a_link_goes_down(mesh: &mut Mesh) {
    let mut times = Vec::new();
    for node in some(mesh, 3) {
        let judged = mesh.judgements.len();
        mesh.nodes[node].silent = true;
        times.push(forgotten(mesh, &[node]).as_secs_f64());
        mesh.run_for(Duration::from_secs(15));
        assert_nobody_else_is_lost(mesh, judged, &[node]);
        mesh.nodes[node].silent = false;
        mesh.resend();
        let back = settled(mesh, "its link is up again");
        println!("  its link is up again: {:.2} s", back.as_secs_f64());
        // What it tried before comes to an end.
        mesh.run_for(Duration::from_secs(10));
    }
    times.sort_by(f64::total_cmp);
    let context = format!("link down to the last inventory without it, median of 3; worst {:.2}", times[2]);
    figure(mesh, "sim_dead_peer_forgotten_link_s", times[1], &context);
}

pub(super) fn one_is_starved(mesh: &mut Mesh) {
    for seconds in [1, 3, 6] {
        let node = mesh.rng.random_range(0..mesh.nodes.len());
        let (judged, told, before) = (mesh.judgements.len(), mesh.told, mesh.nodes[node].traffic);
        let time = Duration::from_secs(seconds);
        mesh.nodes[node].awake_at = mesh.now + super::mesh::micros(time);
        mesh.run_for(time);
        let back = settled(mesh, "one that was starved");
        mesh.run_for(Duration::from_secs(15));
        assert_nobody_else_is_lost(mesh, judged, &[node]);
        let lost =
            mesh.judgements[judged..].iter().filter(|one| one.of == node && matches!(one.verdict, Judged::Down(_)));
        let told: [usize; 5] = std::array::from_fn(|kind| mesh.told[kind] - told[kind]);
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
    let restarted = some(mesh, count);
    let (judged, told) = (mesh.judgements.len(), mesh.told);
    for some in restarted.chunks(count.div_ceil(5)) {
        some.iter().for_each(|node| mesh.leave(*node));
        mesh.run_for(Duration::from_secs(2));
        for node in some {
            mesh.start(*node, &[(*node + 1) % mesh.nodes.len()]);
        }
        mesh.run_for(Duration::from_secs(1));
    }
    let time = settled(mesh, "a rolling restart");
    assert_nobody_else_is_lost(mesh, judged, &restarted);
    let told: [usize; 5] = std::array::from_fn(|kind| mesh.told[kind] - told[kind]);
    println!("  {count} restarted: all agree {:.2} s after the last; told {told:?}", time.as_secs_f64());
}
