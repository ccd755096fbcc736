//! Meshes of different MAJORs. The newer agent is of an imaginary next release whose messages are
//! today's.

use super::*;

const NEXT: Versions = Versions::GOSSIP.after_next_major();

async fn agent_of(versions: Versions, doors: &Doors) -> Node {
    Node::start_as(Setting { versions, doors: doors.clone(), ..Setting::default() }).await
}

#[tokio::test]
async fn agents_of_neighbouring_majors_learn_what_the_other_announces() {
    let doors = Doors::default();
    let (today, next) = (agent_of(Versions::GOSSIP, &doors).await, agent_of(NEXT, &doors).await);
    today.announce(blob("older, before")).await;
    next.announce(blob("newer, before")).await;
    doors.greet(today.id(), next.id()).await;
    today.until_holds(next.id(), blob("newer, before")).await;
    next.until_holds(today.id(), blob("older, before")).await;
    today.announce(blob("older, after")).await;
    next.announce(blob("newer, after")).await;
    today.until_holds(next.id(), blob("newer, after")).await;
    next.until_holds(today.id(), blob("older, after")).await;
    for (node, what) in [(&today, "the older"), (&next, "the newer")] {
        assert!(!node.has_refused("other_version") && !node.has_blamed("malformed"), "{what}");
    }
}

#[tokio::test]
async fn what_a_newer_agent_announces_reaches_an_older_one_that_it_never_meets() {
    let doors = Doors::default();
    let (today, between, far) =
        (agent_of(Versions::GOSSIP, &doors).await, agent_of(NEXT, &doors).await, agent_of(NEXT, &doors).await);
    doors.part(today.id(), far.id());
    doors.greet(today.id(), between.id()).await;
    doors.greet(between.id(), far.id()).await;
    today.until_up(far.id()).await;
    far.until_up(today.id()).await;
    far.announce(blob("newer")).await;
    today.announce(blob("older")).await;
    // A relay passes on the older agent's entry as it is. The older agent does not read the topic
    // of the newer entry, and asks for the entry when it compares its state with its neighbour's.
    far.until_holds(today.id(), blob("older")).await;
    today.until_holds(far.id(), blob("newer")).await;
}

#[tokio::test]
async fn agents_two_majors_apart_refuse_each_others_gossip_and_blame_nobody() {
    let doors = Doors::default();
    let far = NEXT.after_next_major();
    let (today, later) = (agent_of(Versions::GOSSIP, &doors).await, agent_of(far, &doors).await);
    doors.greet(today.id(), later.id()).await;
    today.until_counted("the other version", |node| node.has_refused("other_version")).await;
    later.until_counted("the other version", |node| node.has_refused("other_version")).await;
    for node in [&today, &later] {
        assert!(!node.has_blamed("malformed") && !node.has_blamed("other_version"));
    }
}
