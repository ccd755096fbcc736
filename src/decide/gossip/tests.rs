//! The protocol among a few agents.

mod faults;
mod gossip_cluster;
mod liveness;

use std::time::Duration;

use super::*;
use crate::model::{
    InventoryChange, InventoryItem, InventorySnapshot, LeaveNotice, LogEntry, LogHead, Profile, Refutation, Suspicion,
    SyncReply, SyncRequest, changes_digest, state_digest,
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
fn the_log_ends_at_the_largest_number_that_a_publisher_can_sign() {
    let mut log = follower::LogFollower::default();
    let now = Instant::now();
    let entry = entry_of(2, u64::MAX - 1, &[blob(1)]);
    assert_eq!(log.receive(entry, id(3), now), follower::EntryReceipt::Buffered);
    let last = entry_of(2, u64::MAX, &[blob(1)]);
    assert!(log.replace(last.head.clone(), false).is_empty(), "no entry follows the largest number");
    assert_eq!(log.receive(last, id(3), now), follower::EntryReceipt::Duplicate);
}

#[test]
fn agents_that_know_a_single_member_learn_all_members_and_their_inventories() {
    let cluster = GossipCluster::converged(1..=20);
    for number in 1..=20 {
        let others: Vec<_> = (1..=20).filter(|other| *other != number).collect();
        assert_eq!(cluster.up(number), others, "according to {number}");
        for other in others {
            assert_eq!(cluster.providers(number, other), [id(other)], "{other}'s, according to {number}");
        }
    }
    assert!(cluster.nodes.values().all(|member| member.faults.is_empty() && member.rejections.is_empty()));
}

#[test]
fn an_admitted_peer_without_an_introduction_is_not_up() {
    let mut cluster = GossipCluster::unconnected([1]);
    let now = cluster.now;
    let member = cluster.node(1);
    member.protocol.admit(peer(2), seconds(60), &mut member.inventory, now);
    assert!(matches!(cluster.node(1).protocol.next(), Some(Output::Allow(_))));
    assert!(matches!(cluster.node(1).protocol.next(), Some(Output::Dial(_))));
    assert_eq!(cluster.node(1).protocol.next(), None);
    assert!(cluster.up(1).is_empty());
}

#[test]
fn a_newcomer_gets_everything_from_a_single_snapshot_request() {
    let mut cluster = GossipCluster::converged(1..=6);
    for number in 1..=6 {
        for round in 0..4 {
            cluster.announce(number, [blob(100 + 10 * number + round)]);
            cluster.advance(seconds(1));
        }
    }
    cluster.start_node(9, 1, "good 86400");
    cluster.connect(1, 9);
    cluster.advance(seconds(15));
    assert_eq!(cluster.providers(9, 163), [id(6)]);
    let snapshots = cluster.node(9).requests.iter().filter(|request| matches!(request, SyncRequest::Snapshot(_)));
    assert_eq!(snapshots.count(), 1);
}

#[test]
fn missed_entries_are_requested_from_the_log() {
    let mut cluster = GossipCluster::converged(1..=3);
    cluster.node(3).is_cut_off = true;
    cluster.announce(1, [blob(101)]);
    cluster.advance(Duration::from_millis(1000));
    cluster.node(3).is_cut_off = false;
    cluster.node(3).requests.clear();
    assert_eq!(cluster.providers(3, 101), NO_PEERS);
    cluster.announce(1, [blob(102)]);
    cluster.advance(seconds(5));
    assert_eq!((cluster.providers(3, 101), cluster.providers(3, 102)), (vec![id(1)], vec![id(1)]));
    let sent = &cluster.node(3).requests;
    assert!(sent.iter().any(|request| matches!(request, SyncRequest::Entries { after: 1, .. })), "{sent:?}");
    assert!(!sent.iter().any(|request| matches!(request, SyncRequest::Snapshot(_))), "{sent:?}");
}

#[test]
fn a_lost_entry_without_a_gap_is_found_by_comparing_summaries() {
    let mut cluster = GossipCluster::converged(1..=3);
    cluster.node(3).is_cut_off = true;
    cluster.announce(1, [blob(101)]);
    cluster.advance(Duration::from_millis(1000));
    cluster.node(3).is_cut_off = false;
    cluster.advance(seconds(15));
    assert_eq!(cluster.providers(3, 101), [id(1)]);
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
    let mut state = std::collections::BTreeSet::new();
    let entries = log.take_entries(|message| test_signature(id(1), message));
    assert_eq!(entries.len(), 3);
    for LogEntry { head, changes } in entries {
        state.extend(changes.into_iter().map(|change| change.item().clone()));
        assert_eq!(head.state, state_digest(&state));
    }
}

#[test]
fn a_process_whose_clock_went_back_restarts_its_log_and_is_accepted() {
    let mut cluster = GossipCluster::unconnected([1, 2, 3]);
    cluster.start_node(3, 1_000, "good 86400");
    cluster.connect(1, 2);
    cluster.connect(1, 3);
    cluster.announce(3, [blob(3)]);
    cluster.advance(seconds(15));
    cluster.kill(3);
    cluster.start_node(3, 7, "good 86400");
    cluster.connect(1, 3);
    cluster.announce(3, [blob(103)]);
    cluster.advance(seconds(30));
    assert_eq!((cluster.providers(2, 103), cluster.providers(2, 3)), (vec![id(3)], vec![]));
    assert!(cluster.node(3).protocol.log.epoch() > 1_000);
}

#[test]
fn a_member_whose_credential_expired_without_renewal_is_dropped() {
    let mut cluster = GossipCluster::unconnected([1, 2]);
    cluster.start_node(3, 1, "good 60");
    cluster.connect(1, 2);
    cluster.connect(1, 3);
    cluster.advance(seconds(15));
    assert_eq!(cluster.up(2), [1, 3]);
    cluster.advance(seconds(60));
    assert_eq!(cluster.up(2), [1]);
    let (address, now) = (peer(3).transfer, cluster.now);
    cluster.node(3).protocol.introduce(Credential::new("good 600".into()), address, address, None, now);
    cluster.advance(seconds(30));
    assert_eq!(cluster.up(2), [1, 3], "renewed");
}

#[test]
fn a_member_without_a_valid_credential_is_rejected_by_every_agent() {
    let mut cluster = GossipCluster::converged(1..=4);
    cluster.start_node(9, 1, "stolen");
    cluster.connect(1, 9);
    cluster.announce(9, [blob(109)]);
    cluster.advance(seconds(30));
    for number in 1..=4 {
        assert!(!cluster.up(number).contains(&9));
        assert_eq!(cluster.providers(number, 109), NO_PEERS);
    }
}

#[test]
fn a_request_to_a_removed_peer_is_sent_to_another_peer() {
    let mut cluster = GossipCluster::converged(1..=4);
    let now = cluster.now;
    let member = cluster.node(4);
    member.protocol.receive_gossip(id(2), Gossip::Entry(entry_of(1, 3, &[blob(1)])), &mut member.inventory, now);
    let later = now + seconds(3);
    member.protocol.request_missing(later);
    let Some(Output::Request(_, first, SyncRequest::Entries { .. })) = member.protocol.next() else {
        panic!("no request")
    };
    member.protocol.remove_peer(first, &mut member.inventory, later);
    member.protocol.request_missing(later + seconds(3));
    let again = std::iter::from_fn(|| member.protocol.next());
    let others: Vec<_> =
        again.filter_map(|output| if let Output::Request(_, peer, _) = output { Some(peer) } else { None }).collect();
    assert!(!others.is_empty() && !others.contains(&first), "{others:?}");
}

#[test]
fn two_keys_of_a_pod_are_accepted() {
    let mut cluster = GossipCluster::converged(1..=3);
    for number in 11..=15 {
        cluster.start_node(number, number.into(), "good 86400 a-pod");
        cluster.connect(1, number);
        cluster.advance(seconds(3));
    }
    cluster.advance(seconds(15));
    assert_eq!(cluster.up(2), [1, 3, 14, 15]);
}

#[test]
fn a_member_that_moves_with_an_expired_credential_is_no_provider() {
    let mut cluster = GossipCluster::converged(1..=3);
    let (now, moved) = (cluster.now, ([10, 0, 9, 9], 4701).into());
    let late = format!("good {}", cluster.elapsed().as_secs());
    cluster.node(3).protocol.introduce(Credential::new(late), moved, moved, None, now);
    cluster.deliver_all();
    assert_eq!((cluster.providers(1, 3), cluster.up(1)), (vec![], vec![2]));
}

#[test]
fn an_agent_with_a_full_membership_table_counts_rejected_members_and_records_no_fault() {
    let mut cluster = GossipCluster::unconnected(1..=5);
    cluster.node(1).protocol.membership.limit = 2;
    for number in 2..=5 {
        cluster.connect(1, number);
    }
    cluster.advance(seconds(30));
    assert_eq!(cluster.up(1).len(), 2);
    let (now, member) = (cluster.now, cluster.node(1));
    assert!(member.protocol.status(&member.inventory, now).over_limit > 0);
    assert!(member.faults.is_empty());
}

#[test]
fn a_member_that_moves_is_announced_again() {
    let mut cluster = GossipCluster::converged(1..=4);
    let (now, moved) = (cluster.now, ([10, 0, 9, 9], 4701).into());
    cluster.node(4).protocol.introduce(Credential::new("good 86400".into()), moved, moved, None, now);
    cluster.advance(seconds(1));
    let known = cluster.nodes[&2].protocol.membership.get(id(4)).unwrap().introduction.clone().unwrap();
    let Profile { transfer, version, .. } = known.profile;
    assert_eq!((transfer, cluster.nodes[&2].inventory.peers().len()), (moved, 3));
    assert!(version > 1);
    assert_eq!(cluster.providers(2, 4), [id(4)]);
}

#[test]
fn an_agent_with_too_many_neighbors_keeps_the_chosen_and_closes_the_rest() {
    let mut cluster = GossipCluster::unconnected(1..=60);
    (2..=60).for_each(|number| cluster.connect(1, number));
    cluster.advance(seconds(90));
    assert_eq!(cluster.up(1).len(), 59);
    let now = cluster.now;
    let neighbors = cluster.nodes[&1].protocol.status(&cluster.nodes[&1].inventory, now).neighbors;
    assert!(neighbors <= neighbor_choice::MAX_NEIGHBORS, "{neighbors} neighbors");
    assert!((1..=60).all(|number| cluster.up(number).len() == 59));
}
