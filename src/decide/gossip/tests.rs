//! The protocol among a few agents.

mod faults;
mod gossip_cluster;
mod liveness;

use std::time::Duration;

use super::*;
use crate::model::{
    InventoryChange, InventoryItem, InventorySnapshot, LeaveNotice, LogEntry, LogHead, Profile, Refutation, Suspicion,
    SyncReply, changes_digest, state_digest,
};
use gossip_cluster::{GossipCluster, blob, id, peer, test_signature};

const NO_PEERS: [PeerId; 0] = [];

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

fn entry_of(publisher: u8, sequence: u64, items: &[InventoryItem]) -> LogEntry {
    let changes: Vec<_> = items.iter().cloned().map(InventoryChange::Added).collect();
    let mut head = LogHead {
        publisher: id(publisher),
        epoch: 1,
        sequence,
        changes: changes_digest(&changes),
        state: state_digest(items),
        signature: [0; 64].into(),
    };
    head.signature = test_signature(id(publisher), &head.signed_bytes());
    LogEntry { head, changes }
}

#[test]
fn agents_that_know_a_single_member_learn_all_members_and_their_inventories() {
    let village = GossipCluster::converged(1..=20);
    for number in 1..=20 {
        let others: Vec<_> = (1..=20).filter(|other| *other != number).collect();
        assert_eq!(village.up(number), others, "according to {number}");
        for other in others {
            assert_eq!(village.providers(number, other), [id(other)], "{other}'s, according to {number}");
        }
    }
    assert!(village.nodes.values().all(|house| house.faults.is_empty() && house.rejections.is_empty()));
}

#[test]
fn an_admitted_peer_without_an_introduction_is_not_up() {
    let mut village = GossipCluster::unconnected([1]);
    let now = village.now;
    let house = village.node(1);
    house.protocol.admit(peer(2), seconds(60), &mut house.inventory, now);
    assert!(matches!(village.node(1).protocol.next(), Some(Output::Allow(_))));
    assert!(matches!(village.node(1).protocol.next(), Some(Output::Dial(_))));
    assert_eq!(village.node(1).protocol.next(), None);
    assert!(village.up(1).is_empty());
}

#[test]
fn a_newcomer_gets_everything_from_a_single_snapshot_request() {
    let mut village = GossipCluster::converged(1..=6);
    for number in 1..=6 {
        for round in 0..4 {
            village.announce(number, [blob(100 + 10 * number + round)]);
            village.advance(seconds(1));
        }
    }
    village.start_node(9, 1, "good 86400");
    village.connect(1, 9);
    village.advance(seconds(15));
    assert_eq!(village.providers(9, 163), [id(6)]);
    let snapshots = village.node(9).requests.iter().filter(|question| matches!(question, SyncRequest::Snapshot(_)));
    assert_eq!(snapshots.count(), 1);
}

#[test]
fn missed_entries_are_requested_from_the_log() {
    let mut village = GossipCluster::converged(1..=3);
    village.node(3).is_cut_off = true;
    village.announce(1, [blob(101)]);
    village.advance(Duration::from_millis(1000));
    village.node(3).is_cut_off = false;
    village.node(3).requests.clear();
    assert_eq!(village.providers(3, 101), NO_PEERS);
    village.announce(1, [blob(102)]);
    village.advance(seconds(5));
    assert_eq!((village.providers(3, 101), village.providers(3, 102)), (vec![id(1)], vec![id(1)]));
    let asked = &village.node(3).requests;
    assert!(asked.iter().any(|question| matches!(question, SyncRequest::Entries { after: 1, .. })), "{asked:?}");
    assert!(!asked.iter().any(|question| matches!(question, SyncRequest::Snapshot(_))), "{asked:?}");
}

#[test]
fn a_lost_entry_without_a_gap_is_found_by_comparing_marks() {
    let mut village = GossipCluster::converged(1..=3);
    village.node(3).is_cut_off = true;
    village.announce(1, [blob(101)]);
    village.advance(Duration::from_millis(1000));
    village.node(3).is_cut_off = false;
    village.advance(seconds(15));
    assert_eq!(village.providers(3, 101), [id(1)]);
}

#[test]
fn an_item_added_and_removed_between_two_entries_is_not_announced() {
    let mut log = LocalLog::new(id(1), 1);
    log.record(vec![InventoryChange::Added(blob(1)), InventoryChange::Added(blob(2))]);
    log.record(vec![InventoryChange::Removed(blob(1))]);
    let entries = log.take_entries(|message| test_signature(id(1), message));
    assert_eq!(entries[0].changes, [InventoryChange::Added(blob(2))]);
    assert_eq!(entries[0].head.state, state_digest(&[blob(2)]));
}

#[test]
fn each_entry_of_a_long_batch_is_signed_with_the_state_after_the_entry() {
    let mut log = LocalLog::new(id(1), 1);
    let items: Vec<_> = (0..300u32).map(|n| InventoryItem::Blob(crate::oci::Digest::of(&n.to_be_bytes()))).collect();
    log.record(items.into_iter().map(InventoryChange::Added).collect());
    let mut held = std::collections::BTreeSet::new();
    let entries = log.take_entries(|message| test_signature(id(1), message));
    assert_eq!(entries.len(), 3);
    for LogEntry { head, changes } in entries {
        held.extend(changes.into_iter().map(|change| change.item().clone()));
        assert_eq!(head.state, state_digest(&held));
    }
}

#[test]
fn a_process_whose_clock_went_back_restarts_its_log_and_is_accepted() {
    let mut village = GossipCluster::unconnected([1, 2, 3]);
    village.start_node(3, 1_000, "good 86400");
    village.connect(1, 2);
    village.connect(1, 3);
    village.announce(3, [blob(3)]);
    village.advance(seconds(15));
    village.kill(3);
    village.start_node(3, 7, "good 86400");
    village.connect(1, 3);
    village.announce(3, [blob(103)]);
    village.advance(seconds(30));
    assert_eq!((village.providers(2, 103), village.providers(2, 3)), (vec![id(3)], vec![]));
    assert!(village.node(3).protocol.log.epoch() > 1_000);
}

#[test]
fn a_member_whose_credential_expired_without_renewal_is_dropped() {
    let mut village = GossipCluster::unconnected([1, 2]);
    village.start_node(3, 1, "good 60");
    village.connect(1, 2);
    village.connect(1, 3);
    village.advance(seconds(15));
    assert_eq!(village.up(2), [1, 3]);
    village.advance(seconds(60));
    assert_eq!(village.up(2), [1]);
    let (address, now) = (peer(3).transfer, village.now);
    village.node(3).protocol.introduce(Credential::new("good 600".into()), address, address, None, now);
    village.advance(seconds(30));
    assert_eq!(village.up(2), [1, 3], "renewed");
}

#[test]
fn a_member_without_a_valid_credential_is_rejected_by_every_agent() {
    let mut village = GossipCluster::converged(1..=4);
    village.start_node(9, 1, "stolen");
    village.connect(1, 9);
    village.announce(9, [blob(109)]);
    village.advance(seconds(30));
    for number in 1..=4 {
        assert!(!village.up(number).contains(&9));
        assert_eq!(village.providers(number, 109), NO_PEERS);
    }
}

#[test]
fn a_request_to_a_removed_peer_is_sent_to_another_peer() {
    let mut village = GossipCluster::converged(1..=4);
    let now = village.now;
    let house = village.node(4);
    house.protocol.receive_gossip(id(2), Gossip::Entry(entry_of(1, 3, &[blob(1)])), &mut house.inventory, now);
    let later = now + seconds(3);
    house.protocol.request_missing(later);
    let Some(Output::Request(_, asked, SyncRequest::Entries { .. })) = house.protocol.next() else {
        panic!("no request")
    };
    house.protocol.remove_peer(asked, &mut house.inventory, later);
    house.protocol.request_missing(later + seconds(3));
    let again = std::iter::from_fn(|| house.protocol.next());
    let others: Vec<_> =
        again.filter_map(|output| if let Output::Request(_, peer, _) = output { Some(peer) } else { None }).collect();
    assert!(!others.is_empty() && !others.contains(&asked), "{others:?}");
}

#[test]
fn two_keys_of_a_pod_are_accepted() {
    let mut village = GossipCluster::converged(1..=3);
    for number in 11..=15 {
        village.start_node(number, number.into(), "good 86400 a-pod");
        village.connect(1, number);
        village.advance(seconds(3));
    }
    village.advance(seconds(15));
    assert_eq!(village.up(2), [1, 3, 14, 15]);
}

#[test]
fn a_member_that_moves_with_an_expired_credential_is_no_provider() {
    let mut village = GossipCluster::converged(1..=3);
    let (now, moved) = (village.now, ([10, 0, 9, 9], 4701).into());
    let late = format!("good {}", village.elapsed().as_secs());
    village.node(3).protocol.introduce(Credential::new(late), moved, moved, None, now);
    village.deliver_all();
    assert_eq!((village.providers(1, 3), village.up(1)), (vec![], vec![2]));
}

#[test]
fn an_agent_with_a_full_membership_table_counts_rejected_members_and_records_no_fault() {
    let mut village = GossipCluster::unconnected(1..=5);
    village.node(1).protocol.roster.limit = 2;
    for number in 2..=5 {
        village.connect(1, number);
    }
    village.advance(seconds(30));
    assert_eq!(village.up(1).len(), 2);
    let (now, house) = (village.now, village.node(1));
    assert!(house.protocol.status(&house.inventory, now).over_limit > 0);
    assert!(house.faults.is_empty());
}

#[test]
fn a_member_that_moves_is_announced_again() {
    let mut village = GossipCluster::converged(1..=4);
    let (now, moved) = (village.now, ([10, 0, 9, 9], 4701).into());
    village.node(4).protocol.introduce(Credential::new("good 86400".into()), moved, moved, None, now);
    village.advance(seconds(1));
    let known = village.nodes[&2].protocol.roster.get(id(4)).unwrap().introduction.clone().unwrap();
    let Profile { transfer, version, .. } = known.profile;
    assert_eq!((transfer, village.nodes[&2].inventory.peers().len()), (moved, 3));
    assert!(version > 1);
    assert_eq!(village.providers(2, 4), [id(4)]);
}

#[test]
fn an_agent_with_too_many_neighbours_keeps_the_chosen_and_closes_the_rest() {
    let mut village = GossipCluster::unconnected(1..=60);
    (2..=60).for_each(|number| village.connect(1, number));
    village.advance(seconds(90));
    assert_eq!(village.up(1).len(), 59);
    let now = village.now;
    let linked = village.nodes[&1].protocol.status(&village.nodes[&1].inventory, now).neighbours;
    assert!(linked <= neighbour_choice::MAX_NEIGHBOURS, "{linked} neighbors");
    assert!((1..=60).all(|number| village.up(number).len() == 59));
}
