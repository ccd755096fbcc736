//! Meshes of different MAJORs. The newer agent has an imaginary next release with the current
//! messages.

use super::*;

const NEXT: Versions = Versions::GOSSIP.after_next_major();

async fn agent_of(versions: Versions, network: &TestNetwork) -> MeshTestNode {
    MeshTestNode::start_with(NodeOptions { versions, network: network.clone(), ..NodeOptions::default() }).await
}

#[tokio::test]
async fn agents_of_neighboring_majors_receive_each_others_announcements() {
    let network = TestNetwork::default();
    let (current, next) = (agent_of(Versions::GOSSIP, &network).await, agent_of(NEXT, &network).await);
    current.announce(blob("older, before")).await;
    next.announce(blob("newer, before")).await;
    network.connect(current.id(), next.id()).await;
    current.until_provides(next.id(), blob("newer, before")).await;
    next.until_provides(current.id(), blob("older, before")).await;
    current.announce(blob("older, after")).await;
    next.announce(blob("newer, after")).await;
    current.until_provides(next.id(), blob("newer, after")).await;
    next.until_provides(current.id(), blob("older, after")).await;
    for (node, what) in [(&current, "the older"), (&next, "the newer")] {
        assert!(!node.has_counted_rejection("other_version") && !node.has_counted_fault("malformed"), "{what}");
    }
}

#[tokio::test]
async fn a_newer_agents_announcement_reaches_an_older_agent_without_a_connection() {
    let network = TestNetwork::default();
    let (current, between, far) =
        (agent_of(Versions::GOSSIP, &network).await, agent_of(NEXT, &network).await, agent_of(NEXT, &network).await);
    network.block(current.id(), far.id());
    network.connect(current.id(), between.id()).await;
    network.connect(between.id(), far.id()).await;
    current.until_up(far.id()).await;
    far.until_up(current.id()).await;
    far.announce(blob("newer")).await;
    current.announce(blob("older")).await;
    // A relay passes on the older agent's entry as it is. The older agent does not subscribe to the
    // newer topic, and requests the newer entry after a comparison with its neighbor.
    far.until_provides(current.id(), blob("older")).await;
    current.until_provides(far.id(), blob("newer")).await;
}

#[tokio::test]
async fn agents_two_majors_apart_reject_each_others_gossip_without_a_fault() {
    let network = TestNetwork::default();
    let far = NEXT.after_next_major();
    let (current, later) = (agent_of(Versions::GOSSIP, &network).await, agent_of(far, &network).await);
    network.connect(current.id(), later.id()).await;
    current.until_counted("the other version", |node| node.has_counted_rejection("other_version")).await;
    later.until_counted("the other version", |node| node.has_counted_rejection("other_version")).await;
    for node in [&current, &later] {
        assert!(!node.has_counted_fault("malformed") && !node.has_counted_fault("other_version"));
    }
}
