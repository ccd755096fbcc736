//! Liveness: suspicion, death, refutation, and return.

use super::*;

#[test]
fn an_unreachable_node_is_down_everywhere_within_three_seconds() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.node(7).is_cut_off = true;
    cluster.advance(Duration::from_millis(2750));
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(!cluster.up(number).contains(&7), "according to {number}");
        assert_eq!(cluster.providers(number, 7), NO_PEERS, "according to {number}");
        assert_eq!(cluster.up(number).len(), 18, "according to {number} the other members stay up");
    }
}

#[test]
fn a_killed_process_is_down_everywhere_at_once() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.kill(7);
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(!cluster.up(number).contains(&7), "according to {number}");
    }
}

#[test]
fn a_member_that_was_cut_off_returns_by_its_own_refutation_without_a_snapshot_request() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.node(7).is_cut_off = true;
    cluster.advance(seconds(20));
    assert!(!cluster.up(1).contains(&7));
    cluster.node(7).is_cut_off = false;
    cluster.nodes.values_mut().for_each(|member| member.requests.clear());
    cluster.advance(seconds(60));
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(cluster.up(number).contains(&7), "according to {number}");
        assert_eq!(cluster.providers(number, 7), [id(7)], "according to {number}");
        let sent = &cluster.node(number).requests;
        assert!(!sent.iter().any(|request| matches!(request, SyncRequest::Snapshot(_))), "{sent:?}");
    }
    assert_eq!(cluster.up(7).len(), 19, "7 has all members again");
}

fn suspicion(suspect: u8, witness: u8) -> Gossip {
    let mut suspicion =
        Suspicion { suspect: id(suspect), epoch: 1, incarnation: 0, witness: id(witness), signature: [0; 64].into() };
    suspicion.signature = test_signature(id(witness), &suspicion.signed_bytes());
    Gossip::Suspicion(suspicion)
}

#[test]
fn two_false_suspicions_of_a_living_member_are_refuted_within_two_seconds() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.publish_from(2, suspicion(7, 2));
    cluster.publish_from(3, suspicion(7, 3));
    cluster.advance(seconds(2));
    for number in (1..=20).filter(|number| *number != 7) {
        assert!(cluster.up(number).contains(&7), "according to {number}");
    }
}

#[test]
fn the_suspicion_of_a_single_witness_is_not_enough() {
    let mut cluster = GossipCluster::converged(1..=6);
    cluster.node(5).is_cut_off = true;
    cluster.publish_from(2, suspicion(5, 2));
    let down = (1..=6).filter(|number| *number != 5 && !cluster.up(*number).contains(&5));
    assert_eq!(down.count(), 0);
}

#[test]
fn a_member_whose_only_neighbor_suspects_its_death_is_probed_by_others() {
    let mut cluster = GossipCluster::converged(1..=20);
    let others: Vec<_> = (1..=20).filter(|number| *number != 7).collect();
    // Only 2 stays connected with 7.
    for number in others.into_iter().filter(|number| *number != 2) {
        cluster.disconnect(7, number);
    }
    cluster.node(7).is_cut_off = true;
    cluster.advance(seconds(5));
    let alive = (1..=20).filter(|number| *number != 7 && cluster.up(*number).contains(&7));
    assert_eq!(alive.count(), 0);
}

#[test]
fn a_suspected_peer_is_confirmed_dead_when_the_pending_dial_fails() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.disconnect(1, 7);
    let now = cluster.now + seconds(60);
    let member = cluster.node(1);
    assert!(member.protocol.dial_if_allowed(id(7), now));
    member.protocol.probe_suspect(id(7), now);
    member.protocol.dial_failed(id(7), &mut member.inventory, now);
    assert_eq!(cluster.providers(1, 7), NO_PEERS);
}

#[test]
fn a_peer_that_cannot_be_fetched_from_is_no_provider_until_its_next_ping_answer() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.disconnect(1, 7);
    let now = cluster.now;
    let member = cluster.node(1);
    member.protocol.suspect_provider(id(7), &mut member.inventory, now);
    assert_eq!(cluster.providers(1, 7), NO_PEERS);
    cluster.advance(seconds(60));
    assert_eq!(cluster.providers(1, 7), [id(7)]);
}

#[test]
fn two_keys_of_the_same_pod_count_as_a_single_witness() {
    let mut cluster = GossipCluster::unconnected(1..=4);
    for number in [5, 6] {
        cluster.start_node(number, 1, "good 86400 a-pod");
    }
    (2..=6).for_each(|number| cluster.connect(1, number));
    cluster.advance(seconds(30));
    cluster.node(4).is_cut_off = true;
    // 7 has not answered lately, and is not suspected yet.
    cluster.advance(Duration::from_millis(1250));
    cluster.publish_from(5, suspicion(4, 5));
    cluster.publish_from(6, suspicion(4, 6));
    assert!((1..=3).all(|number| cluster.up(number).contains(&4)));
    cluster.publish_from(3, suspicion(4, 3));
    assert!((1..=2).all(|number| !cluster.up(number).contains(&4)));
}

#[test]
fn endless_suspicions_are_refuted_at_a_bounded_rate_and_mark_no_member_down() {
    let mut cluster = GossipCluster::converged(1..=6);
    let refutations = |cluster: &mut GossipCluster| cluster.node(5).protocol.incarnation;
    for incarnation in 0..100 {
        let mut suspicion =
            Suspicion { suspect: id(5), epoch: 1, incarnation, witness: id(2), signature: [0; 64].into() };
        suspicion.signature = test_signature(id(2), &suspicion.signed_bytes());
        cluster.publish_from(2, Gossip::Suspicion(suspicion));
    }
    assert_eq!(refutations(&mut cluster), 1, "suspicions of other incarnations are ignored");
    let mut high =
        Suspicion { suspect: id(5), epoch: 1, incarnation: u64::MAX - 1, witness: id(2), signature: [0; 64].into() };
    high.signature = test_signature(id(2), &high.signed_bytes());
    cluster.publish_from(2, Gossip::Suspicion(high));
    cluster.advance(seconds(5));
    assert!(refutations(&mut cluster) < 10);
    assert!((1..=6).filter(|number| *number != 5).all(|number| cluster.up(number).contains(&5)));
}

#[test]
fn a_peer_that_rejects_our_dial_is_not_suspected() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.disconnect(1, 7);
    let now = cluster.now;
    let member = cluster.node(1);
    member.protocol.probe_suspect(id(7), now);
    member.protocol.rejected_by_peer(id(7), now);
    cluster.advance(seconds(5));
    assert!(cluster.up(1).contains(&7));
    assert!(cluster.nodes[&7].protocol.incarnation == 0, "7 had nothing to refute");
}

#[test]
fn a_single_witness_is_enough_in_a_cluster_of_two() {
    let mut cluster = GossipCluster::converged(1..=2);
    cluster.kill(2);
    cluster.advance(seconds(1));
    assert!(cluster.up(1).is_empty());
}

#[test]
fn a_member_that_leaves_is_down_and_its_next_process_is_accepted() {
    let mut cluster = GossipCluster::converged(1..=5);
    cluster.node(5).protocol.leave();
    cluster.advance(Duration::from_millis(250));
    assert!((1..=4).all(|number| !cluster.up(number).contains(&5)));
    cluster.kill(5);
    cluster.start_node(5, 2, "good 86400");
    cluster.connect(1, 5);
    cluster.announce(5, [blob(105)]);
    cluster.advance(seconds(15));
    for number in 1..=4 {
        assert_eq!(cluster.providers(number, 105), [id(5)]);
        assert_eq!(cluster.providers(number, 5), NO_PEERS, "items of the earlier process are void");
    }
}

#[test]
fn a_neighbor_with_an_unanswered_second_connection_is_down_when_both_break() {
    let mut cluster = GossipCluster::converged(1..=20);
    cluster.connect_twice(1, 7);
    cluster.kill(7);
    assert!((1..=20).filter(|number| *number != 7).all(|number| !cluster.up(number).contains(&7)));
}

#[test]
fn messages_of_an_earlier_epoch_are_ignored() {
    let mut cluster = GossipCluster::converged(1..=3);
    let mut notice = LeaveNotice { peer: id(2), epoch: 0, signature: [0; 64].into() };
    notice.signature = test_signature(id(2), &notice.signed_bytes());
    cluster.publish_from(1, Gossip::Leave(notice));
    let mut refutation = Refutation { peer: id(2), epoch: 0, incarnation: 9, signature: [0; 64].into() };
    refutation.signature = test_signature(id(2), &refutation.signed_bytes());
    cluster.publish_from(1, Gossip::Refutation(refutation));
    assert_eq!(cluster.up(3), [1, 2]);
    assert!(cluster.node(3).faults.is_empty());
}
