//! Meshes of different MAJORs. The newer agent has an imaginary next release with the current
//! messages.

use super::*;

const NEXT: Versions = Versions::GOSSIP.after_next_major();

async fn agent_of(versions: Versions, network: &TestNetwork) -> MeshTestNode {
    MeshTestNode::start_with(NodeOptions { versions, network: network.clone(), ..NodeOptions::default() }).await
}

#[tokio::test]
async fn agents_of_neighboring_majors_learn_what_the_other_announces() {
    let network = TestNetwork::default();
    let (today, next) = (agent_of(Versions::GOSSIP, &network).await, agent_of(NEXT, &network).await);
    today.announce(blob("older, before")).await;
    next.announce(blob("newer, before")).await;
    network.connect(today.id(), next.id()).await;
    today.until_provides(next.id(), blob("newer, before")).await;
    next.until_provides(today.id(), blob("older, before")).await;
    today.announce(blob("older, after")).await;
    next.announce(blob("newer, after")).await;
    today.until_provides(next.id(), blob("newer, after")).await;
    next.until_provides(today.id(), blob("older, after")).await;
    for (node, what) in [(&today, "the older"), (&next, "the newer")] {
        assert!(!node.has_counted_rejection("other_version") && !node.has_counted_fault("malformed"), "{what}");
    }
}

#[tokio::test]
async fn a_newer_agents_announcement_reaches_an_older_agent_without_a_connection() {
    let network = TestNetwork::default();
    let (today, between, far) =
        (agent_of(Versions::GOSSIP, &network).await, agent_of(NEXT, &network).await, agent_of(NEXT, &network).await);
    network.block(today.id(), far.id());
    network.connect(today.id(), between.id()).await;
    network.connect(between.id(), far.id()).await;
    today.until_up(far.id()).await;
    far.until_up(today.id()).await;
    far.announce(blob("newer")).await;
    today.announce(blob("older")).await;
    // A relay passes on the older agent's entry as it is. The older agent does not subscribe to the
    // newer topic, and requests the newer entry after a comparison with its neighbor.
    far.until_provides(today.id(), blob("older")).await;
    today.until_provides(far.id(), blob("newer")).await;
}

#[tokio::test]
async fn agents_two_majors_apart_reject_each_others_gossip_without_a_fault() {
    let network = TestNetwork::default();
    let far = NEXT.after_next_major();
    let (today, later) = (agent_of(Versions::GOSSIP, &network).await, agent_of(far, &network).await);
    network.connect(today.id(), later.id()).await;
    today.until_counted("the other version", |node| node.has_counted_rejection("other_version")).await;
    later.until_counted("the other version", |node| node.has_counted_rejection("other_version")).await;
    for node in [&today, &later] {
        assert!(!node.has_counted_fault("malformed") && !node.has_counted_fault("other_version"));
    }
}
