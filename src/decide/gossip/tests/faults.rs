//! Faults of members, and their consequences.

use super::*;

#[test]
fn a_forged_entry_is_rejected_and_the_third_bans_its_forger() {
    let mut cluster = GossipCluster::converged(1..=3);
    for number in 0..3 {
        let mut forged = entry_of(1, 2 + number, &[blob(99)]);
        forged.head.signature = test_signature(id(2), &forged.head.signed_bytes());
        cluster.publish_from(2, Gossip::Entry(forged));
    }
    assert_eq!(cluster.providers(3, 99), NO_PEERS);
    assert_eq!(cluster.node(3).faults.last(), Some(&(id(2), GossipFault::Forged, true)));
    cluster.advance(seconds(1));
    assert_eq!(cluster.up(3), [1], "the banned member is down");
    cluster.advance(seconds(700));
    assert_eq!(cluster.up(3), [1, 2], "the member is up after the ban");
}

#[test]
fn a_ban_outlives_the_withdrawal_of_the_members_admission() {
    let mut cluster = GossipCluster::converged(1..=3);
    for number in 0..3 {
        let mut forged = entry_of(1, 2 + number, &[blob(99)]);
        forged.head.signature = test_signature(id(2), &forged.head.signed_bytes());
        cluster.publish_from(2, Gossip::Entry(forged));
    }
    let now = cluster.now;
    let member = cluster.node(3);
    member.protocol.remove_peer(id(2), &mut member.inventory, now);
    cluster.connect(2, 3);
    cluster.advance(seconds(60));
    assert_eq!(cluster.up(3), [1], "the member stays down until the ban ends");
}

#[test]
fn changes_that_differ_from_the_signed_digest_are_rejected() {
    let mut cluster = GossipCluster::converged(1..=3);
    let mut changed = entry_of(2, 2, &[blob(2), blob(102)]);
    changed.changes = vec![InventoryChange::Added(blob(99))];
    cluster.publish_from(1, Gossip::Entry(changed));
    assert_eq!(cluster.providers(3, 99), NO_PEERS);
    assert_eq!(cluster.node(3).faults, [(id(1), GossipFault::Malformed, false)]);
}

#[test]
fn a_publisher_that_signs_two_entries_with_the_same_number_is_banned() {
    let mut cluster = GossipCluster::converged(1..=3);
    cluster.publish_from(1, Gossip::Entry(entry_of(2, 2, &[blob(2), blob(102)])));
    assert!(cluster.node(3).faults.is_empty(), "the entry counts by the signature of 2, not by the relay");
    cluster.publish_from(1, Gossip::Entry(entry_of(2, 2, &[blob(2), blob(202)])));
    assert_eq!(cluster.node(3).faults, [(id(2), GossipFault::Contradiction, true)], "the relaying member has no fault");
}

#[test]
fn a_snapshot_that_differs_from_the_signed_state_is_rejected() {
    let mut cluster = GossipCluster::converged(1..=4);
    for round in 0..4 {
        cluster.announce(2, [blob(120 + round)]);
        cluster.advance(seconds(1));
    }
    cluster.tamper_reply = Some(|sender, reply| match reply {
        SyncReply::Snapshot(InventorySnapshot { heads, mut items }) if sender == 1 => {
            items.retain(|(item, _)| *item != blob(121));
            SyncReply::Snapshot(InventorySnapshot { heads, items })
        }
        reply => reply,
    });
    cluster.start_node(9, 1, "good 86400");
    cluster.connect(1, 9);
    cluster.advance(seconds(60));
    assert_eq!(cluster.providers(9, 121), [id(2)], "another member sent the true snapshot");
    assert!(cluster.node(9).faults.is_empty(), "the publisher may have signed a wrong state");
}

#[test]
fn a_publisher_above_the_entry_rate_is_limited() {
    let mut cluster = GossipCluster::converged(1..=3);
    for sequence in 2..100 {
        cluster.publish_from(1, Gossip::Entry(entry_of(2, sequence, &[blob(2)])));
    }
    let known = cluster.nodes[&3].protocol.membership.get(id(2)).unwrap().log.sequence();
    assert!((60..70).contains(&known), "{known} entries passed the limit");
}

#[test]
fn replayed_entries_do_no_harm() {
    let mut cluster = GossipCluster::converged(1..=3);
    for _ in 0..200 {
        let now = cluster.now;
        let member = cluster.node(3);
        member.protocol.receive_gossip(id(1), Gossip::Entry(entry_of(2, 1, &[blob(2)])), &mut member.inventory, now);
    }
    cluster.announce(2, [blob(102)]);
    cluster.advance(seconds(2));
    assert_eq!(cluster.providers(3, 102), [id(2)]);
    assert!(cluster.node(3).faults.is_empty());
}

#[test]
fn an_entry_without_a_provider_is_not_requested_without_end() {
    let mut cluster = GossipCluster::converged(1..=3);
    cluster.tamper_reply = Some(|sender, reply| match reply {
        SyncReply::Summaries(_) if sender == 1 => {
            let summary =
                |peer| MemberSummary { peer, epoch: 1, version: 1, incarnation: 0, sequence: u64::MAX, is_dead: false };
            SyncReply::Summaries(vec![summary(id(2))])
        }
        reply => reply,
    });
    cluster.advance(seconds(60));
    cluster.tamper_reply = None;
    cluster.advance(seconds(20));
    let log = &cluster.nodes[&3].protocol.membership.get(id(2)).unwrap().log;
    assert_eq!((log.sequence(), log.behind()), (1, 0));
}

#[test]
fn members_that_a_neighbor_reports_dead_are_probed_a_few_at_a_time() {
    let mut cluster = GossipCluster::converged(1..=60);
    let summary =
        |number| MemberSummary { peer: id(number), epoch: 1, version: 2, incarnation: 0, sequence: 1, is_dead: true };
    let summaries = SyncReply::Summaries((2..=60).map(summary).collect());
    let now = cluster.now;
    let member = cluster.node(1);
    member.protocol.compare_with(id(2));
    let Some(Output::Request(request_id, ..)) = member.protocol.next() else { panic!("no request") };
    member.protocol.receive_reply(request_id, summaries, &mut member.inventory, now);
    let outputs: Vec<_> = std::iter::from_fn(|| member.protocol.next()).collect();
    let dials = outputs.iter().filter(|output| matches!(output, Output::Handshake(_) | Output::Dial(_))).count();
    assert!((1..=16).contains(&dials), "{dials} dials at once");
}
