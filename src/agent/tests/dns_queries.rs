//! DNS queries of the join task, counted by a fake resolver under a paused clock.

use std::time::Duration;

use super::joining::{JoiningNode, POD_RESOLV_CONF, address, seed};
use crate::ports::MeshCommands;

/// An agent resolves often after its start. Ten minutes later the agent has converged.
const CONVERGED: Duration = Duration::from_secs(600);
/// The first look-up is due at once.
const START: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);

/// The queries of a name: A and AAAA. A name without a final dot is also queried below each search
/// domain.
fn queries_of(name: &str) -> usize {
    let host = name.split(':').next().unwrap_or_default();
    let search_domains = POD_RESOLV_CONF.lines().find_map(|line| line.strip_prefix("search")).unwrap_or_default();
    let below = if host.ends_with('.') { 0 } else { search_domains.split_whitespace().count() };
    2 * (below + 1)
}

/// Runs the join task, and returns the number of DNS queries in the hour after convergence. DNS
/// lists `listed` peers, and `up` of these peers are members of the mesh. No address answers.
async fn queries_of_an_hour(listed: u8, up: u8) -> usize {
    let node = JoiningNode::new();
    node.resolver.set_answer(Some((0..listed).map(address).collect()));
    let running = node.start();
    // Enough peers before the first look-up would postpone that look-up.
    tokio::time::sleep(START).await;
    for number in 0..up {
        running.mesh.admit(seed(number), HOUR).await;
    }
    tokio::time::sleep(CONVERGED).await;
    assert!(!node.resolver.take_names().is_empty(), "the agent resolves at its start");
    tokio::time::sleep(HOUR).await;
    running.stop().await;
    node.resolver.take_names().iter().map(|name| queries_of(name)).sum()
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_knows_its_peers_sends_at_most_twelve_queries_an_hour() {
    let queries = queries_of_an_hour(20, 20).await;
    println!("figure dns_queries_per_agent_hour {queries} (the join task, an hour after convergence, paused clock)");
    assert!((1..=12).contains(&queries), "{queries}");
}

#[tokio::test(start_paused = true)]
async fn an_agent_with_an_unreachable_peer_sends_at_most_twelve_queries_an_hour() {
    let queries = queries_of_an_hour(3, 2).await;
    println!("figure dns_queries_per_agent_hour_one_away {queries} (one of three listed peers is down)");
    assert!((1..=12).contains(&queries), "{queries}");
}
