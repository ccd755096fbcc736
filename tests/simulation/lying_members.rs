//! Members that lie: honest nodes' inventories of each other stay exact, and the liar is found.

use std::time::Duration;

use lighterman::decide::gossip::CredentialVerifier;
use lighterman::model::{
    Gossip, Introduction, InventoryChange, InventoryItem, LeaveNotice, LogEntry, LogHead, Profile, Refutation,
    Suspicion, changes_digest, state_digest,
};
use lighterman::oci::Digest;
use rand::seq::index;

use super::mesh::{Mesh, NodeNumber, Observation, ObservedChange, credential};
use super::setup::small;

#[test]
fn a_forger_is_banned_by_its_neighbors_and_changes_no_inventory() {
    a_forger(&mut small(12));
}

#[test]
fn a_member_that_contradicts_itself_is_banned_by_all_others() {
    a_contradiction(&mut small(13));
}

#[test]
fn a_falsely_suspected_member_returns_with_its_refutation() {
    false_suspicions(&mut small(14));
}

#[test]
fn false_replies_change_no_inventory() {
    false_replies(&mut small(15));
}

/// Time for which honest nodes are observed.
const OBSERVATION_TIME: Duration = Duration::from_secs(30);

fn invented_item() -> InventoryItem {
    InventoryItem::Blob(Digest::of(b"nobody has this"))
}

/// An entry of `author` with this sequence number, signed by `signer`.
fn entry(mesh: &Mesh, publisher: NodeNumber, signer: NodeNumber, sequence: u64, item: InventoryItem) -> LogEntry {
    let changes = vec![InventoryChange::Added(item.clone())];
    let status = mesh.status(publisher);
    let mut head = LogHead {
        publisher: mesh.nodes[publisher].peer.id,
        epoch: status.epoch,
        sequence,
        changes: changes_digest(&changes),
        state: state_digest([&item]),
        signature: [0; 64].into(),
    };
    head.signature = mesh.key(signer).sign(&head.signed_bytes());
    LogEntry { head, changes }
}

/// Messages of the liar that only the victim may sign, and an entry of the liar with unsigned
/// changes.
fn forgeries(mesh: &Mesh, liar: NodeNumber, victim: NodeNumber) -> Vec<Gossip> {
    let status = mesh.status(victim);
    let (peer, epoch, forger) = (mesh.nodes[victim].peer.clone(), status.epoch, mesh.key(liar));
    let next = status.sequence + 1;
    let forged = entry(mesh, victim, liar, next, invented_item());
    // The liar's own entry, with more changes than the signature covers.
    let mut changed = entry(mesh, liar, liar, mesh.status(liar).sequence + 1, invented_item());
    changed.changes.push(InventoryChange::Added(InventoryItem::Blob(Digest::of(b"nor this"))));
    let mut notice = LeaveNotice { peer: peer.id, epoch, signature: [0; 64].into() };
    notice.signature = forger.sign(&notice.signed_bytes());
    let mut refutation = Refutation { peer: peer.id, epoch, incarnation: 1000, signature: [0; 64].into() };
    refutation.signature = forger.sign(&refutation.signed_bytes());
    let profile = Profile {
        peer: peer.id,
        epoch: epoch + 1,
        version: 1,
        node: peer.node,
        zone: peer.zone,
        release: "0.1.0".parse().expect("a release"),
        transfer: mesh.nodes[liar].peer.transfer,
        gossip: mesh.nodes[liar].peer.gossip,
    };
    let mut introduction = Introduction { profile, credential: credential(peer.id, 0), signature: [0; 64].into() };
    introduction.signature = forger.sign(&introduction.signed_bytes());
    vec![
        Gossip::Entry(forged),
        Gossip::Entry(changed),
        Gossip::Leave(notice),
        Gossip::Refutation(refutation),
        Gossip::Introduction(introduction),
    ]
}

fn pick_two(mesh: &mut Mesh) -> (NodeNumber, NodeNumber) {
    let two = index::sample(&mut mesh.rng, mesh.nodes.len(), 2);
    (two.index(0), two.index(1))
}

/// Asserts that no honest node accepted an invented item, and that honest inventories of each other
/// are exact.
fn assert_honest_inventories_exact(mesh: &Mesh, liars: &[NodeNumber]) {
    let honest: Vec<_> = (0..mesh.nodes.len()).filter(|node| !liars.contains(node)).collect();
    mesh.assert_nothing_invented_about(&honest);
    for observer in &honest {
        for other in honest.iter().filter(|other| *other != observer) {
            let known = mesh.known_items(*observer, *other);
            assert_eq!(known, mesh.nodes[*other].items.len(), "node {observer} of node {other}");
        }
    }
}

/// Number of nodes that banned the liar.
fn banning_nodes(mesh: &Mesh, liar: NodeNumber) -> usize {
    let bans = mesh
        .observations
        .iter()
        .filter(|one| one.subject == liar && matches!(one.change, ObservedChange::Faulted(_, true)));
    let mut observers: Vec<_> = bans.map(|one| one.observer).collect();
    observers.sort_unstable();
    observers.dedup();
    observers.len()
}

pub(super) fn a_forger(mesh: &mut Mesh) {
    let (liar, victim) = pick_two(mesh);
    let neighbors = mesh.neighbors(liar);
    for message in forgeries(mesh, liar, victim) {
        mesh.publish(liar, message);
        mesh.run_for(Duration::from_secs(1));
    }
    mesh.run_for(OBSERVATION_TIME);
    assert_honest_inventories_exact(mesh, &[liar]);
    let banned = banning_nodes(mesh, liar);
    println!(
        "  a forger with {neighbors} neighbors is banned by {banned}; {} honest nodes are blamed",
        faults_of_honest_nodes(mesh, &[liar])
    );
    assert!(banned > 0, "a node bans the forger");
    assert_eq!(faults_of_honest_nodes(mesh, &[liar]), 0, "no fault of an honest node is recorded");
}

/// Number of faults that honest nodes recorded for honest nodes.
fn faults_of_honest_nodes(mesh: &Mesh, liars: &[NodeNumber]) -> usize {
    let faults = mesh.observations.iter().filter(|one| matches!(one.change, ObservedChange::Faulted(..)));
    faults.filter(|one| !liars.contains(&one.subject) && !liars.contains(&one.observer)).count()
}

pub(super) fn a_contradiction(mesh: &mut Mesh) {
    let (liar, _) = pick_two(mesh);
    let sequence = mesh.status(liar).sequence + 1;
    for name in ["one thing", "another"] {
        let signed_entry = entry(mesh, liar, liar, sequence, InventoryItem::Blob(Digest::of(name.as_bytes())));
        mesh.publish(liar, Gossip::Entry(signed_entry));
        mesh.run_for(Duration::from_secs(1));
    }
    mesh.run_for(OBSERVATION_TIME);
    assert_honest_inventories_exact(mesh, &[liar]);
    let banned = banning_nodes(mesh, liar);
    assert_eq!(banned, mesh.nodes.len() - 1, "the second entry is a proof that every node receives");
    assert_eq!(faults_of_honest_nodes(mesh, &[liar]), 0, "no fault of an honest node is recorded");
}

/// A single liar, then three liars together.
pub(super) fn false_suspicions(mesh: &mut Mesh) {
    for count in [1, 3] {
        let chosen = index::sample(&mut mesh.rng, mesh.nodes.len(), count + 1).into_vec();
        let (victim, liars) = (chosen[0], &chosen[1..]);
        let observed = mesh.observations.len();
        for liar in liars {
            let (suspect, witness, epoch) =
                (mesh.nodes[victim].peer.id, mesh.nodes[*liar].peer.id, mesh.status(victim).epoch);
            let mut suspicion = Suspicion { suspect, epoch, incarnation: 0, witness, signature: [0; 64].into() };
            suspicion.signature = mesh.key(*liar).sign(&suspicion.signed_bytes());
            mesh.publish(*liar, Gossip::Suspicion(suspicion));
        }
        mesh.run_for(OBSERVATION_TIME);
        assert_honest_inventories_exact(mesh, liars);
        let of_victim = mesh.observations[observed..].iter().filter(|one| one.subject == victim);
        let (lost, back): (Vec<&Observation>, Vec<&Observation>) =
            of_victim.partition(|one| matches!(one.change, ObservedChange::Down(_)));
        let last = back.iter().filter(|one| one.change == ObservedChange::Up).map(|one| one.at).max();
        let first = lost.iter().map(|one| one.at).min();
        let away = first.zip(last).map_or(0, |(first, last)| last.saturating_sub(first));
        println!("  {count} members suspect a live one: dropped by {}, for {} ms at most", lost.len(), away / 1000);
        assert!(count > 1 || lost.is_empty(), "a single witness confirms no death");
        let others = mesh.observations[observed..]
            .iter()
            .filter(|one| one.subject != victim && matches!(one.change, ObservedChange::Down(_)));
        assert_eq!(others.filter(|one| !liars.contains(&one.subject)).count(), 0, "no other honest member is dropped");
    }
}

/// A new node sends requests to a liar first.
pub(super) fn false_replies(mesh: &mut Mesh) {
    let (liar, honest) = pick_two(mesh);
    mesh.nodes[liar].is_liar = true;
    let images = mesh.nodes[0].items.len() / 14;
    let newcomer = mesh.add_node(images);
    // The liar's replies are all false, so the new node also gets the address of an honest node.
    mesh.start(newcomer, &[liar, honest]);
    mesh.run_for(Duration::from_secs(90));
    assert_honest_inventories_exact(mesh, &[liar]);
    println!("  a liar that answers a new node is banned by {}", banning_nodes(mesh, liar));
    assert_eq!(faults_of_honest_nodes(mesh, &[liar]), 0, "no fault of an honest node is recorded");
}
