//! Thirty agents, one process each, on real links with a real containerd and a real API server. The
//! agents find each other and drop dead peers. Times and costs are printed as figures for
//! `make figures`, one a line, and not asserted.

mod fleet;
mod mesh_view;
mod usage;

use std::thread;
use std::time::{Duration, Instant};

use lighterman::ports::{BlobMetadata, Pins};
use lighterman::testing::image::put_image;
use tokio::runtime::Builder;
use tokio::time::sleep;

use crate::containerd::{content, write};
use crate::fleet::agent::Agent;
use crate::fleet::network::{self, AgentNetwork, LinkBytes};
use fleet::Fleet;
use usage::{processor_time, resident_mib};

const AGENTS: usize = 30;

/// The effects of a change are over after this time: two intervals of the comparison between
/// neighbors, which runs every 10 s.
const SETTLE: Duration = Duration::from_secs(20);

/// Measuring time of the idle cost.
const IDLE: Duration = Duration::from_secs(30);

/// Deadline of the whole test, which takes three minutes.
const DEADLINE: Duration = Duration::from_secs(1200);

#[test]
fn thirty_agents_find_each_other_and_drop_dead_peers() {
    let agent_network = AgentNetwork::new(AGENTS);
    let test_thread = thread::spawn(move || {
        agent_network.enter_switch();
        let runtime = Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            tokio::time::timeout(DEADLINE, run_all(agent_network)).await.expect("the test ends in time")
        });
    });
    test_thread.join().unwrap();
}

async fn run_all(agent_network: AgentNetwork) {
    let mut fleet = Fleet::new(agent_network, AGENTS).await;
    println!();
    agents_started_at_once_find_each_other(&mut fleet).await;
    sleep(SETTLE).await;
    let idle = idle_agents_cost_little(&fleet).await;
    an_image_of_one_node_reaches_every_inventory(&fleet).await;
    announcements_reach_every_agent(&fleet, idle).await;
    a_killed_agent_is_dropped_and_returns(&mut fleet).await;
    five_killed_agents_are_dropped_and_return(&mut fleet).await;
    an_agent_whose_link_is_down_is_dropped_and_returns(&fleet).await;
}

async fn agents_started_at_once_find_each_other(fleet: &mut Fleet) {
    let began = Instant::now();
    fleet.start(0..AGENTS);
    fleet.wait_converged().await;
    let context = format!("{AGENTS} processes started at once, until all inventories are complete");
    println!("figure mesh_start_s_30 {:.2} ({context})", began.elapsed().as_secs_f64());
}

/// Returns the bytes per second on an agent's link, both directions together, as the mean of all
/// agents.
async fn idle_agents_cost_little(fleet: &Fleet) -> f64 {
    let ids: Vec<_> = fleet.running().filter_map(Agent::id).collect();
    let times = || ids.iter().map(|id| processor_time(*id)).collect::<Vec<_>>();
    let (times_before, carried_before, began) = (times(), fleet.network.link_bytes(), Instant::now());
    sleep(IDLE).await;
    let (times_after, carried_after, seconds) = (times(), fleet.network.link_bytes(), began.elapsed().as_secs_f64());

    let resident = sorted(ids.iter().map(|id| resident_mib(*id)));
    println!(
        "figure agent_idle_rss_mib {:.1} (the worst of {AGENTS}; median {:.1})",
        last(&resident),
        median(&resident)
    );
    let busy = times_after.iter().zip(times_before).map(|(after, before)| (*after - before).as_secs_f64());
    let busy = sorted(busy.map(|time| 100.0 * time / seconds));
    println!(
        "figure agent_idle_cpu_pct {:.2} (median of {AGENTS}, of one core; worst {:.2})",
        median(&busy),
        last(&busy)
    );
    let rates = carried_after.iter().zip(carried_before).map(|(after, before)| {
        let LinkBytes { sent, received, packets: _ } = after.since(before);
        (sent + received) as f64 / seconds
    });
    let rates = sorted(rates);
    let kbit = |rate: f64| rate * 8.0 / 1000.0;
    let mean = rates.iter().sum::<f64>() / AGENTS as f64;
    let context = format!("a node's link, both directions, mean of {AGENTS}; worst {:.1}", kbit(last(&rates)));
    println!("figure mesh_idle_kbit_s_30 {:.1} ({context})", kbit(mean));
    mean
}

async fn an_image_of_one_node_reaches_every_inventory(fleet: &Fleet) {
    const PROVIDER: usize = 7;
    let image = "reg.test/late/app:1";
    put_image(&fleet.agents[PROVIDER].store, &[image.to_owned()], &[2000, 2000], 7).await.unwrap();
    let began = Instant::now();
    fleet.wait_provider(image, PROVIDER).await;
    let context = "from containerd's record to the last of 29 agents that list the provider";
    println!("figure mesh_content_known_s_30 {:.2} ({context})", began.elapsed().as_secs_f64());
    fleet.wait_converged().await;
}

/// Sums over all agents, and the traffic of each link.
struct Traffic {
    at: Instant,
    link_bytes: Vec<LinkBytes>,
    announcements: u64,
    messages: u64,
}

impl Traffic {
    async fn of(fleet: &Fleet) -> Self {
        let views = fleet.views().await;
        Self {
            at: Instant::now(),
            link_bytes: fleet.network.link_bytes(),
            announcements: views.iter().map(|(_, view)| view.sequence).sum(),
            messages: views.iter().map(|(_, view)| view.messages_in).sum(),
        }
    }

    fn received_since(&self, before: &Self) -> u64 {
        self.link_bytes.iter().zip(&before.link_bytes).map(|(after, before)| after.since(*before).received).sum()
    }
}

/// Announces one blob per publisher and round, so the number of announcements is known. The figure
/// checks the simulation's bytes per message. `idle` is the bytes that an agent sends and receives
/// per second without announcements.
async fn announcements_reach_every_agent(fleet: &Fleet, idle: f64) {
    const PUBLISHERS: usize = 10;
    const ROUNDS: usize = 12;
    /// Longer than the batching of announcements: 200 ms after containerd's event, then up to 1 s.
    const INTERVAL: Duration = Duration::from_millis(1500);
    sleep(SETTLE).await;
    let before = Traffic::of(fleet).await;
    for round in 0..ROUNDS {
        for agent in &fleet.agents[..PUBLISHERS] {
            let bytes = content(&format!("round {round} {}", agent.node), 1000);
            // The pin is never released. Collections send no event, so a collected blob would stay
            // announced for up to a minute.
            let pin = agent.store.pin(DEADLINE).await.unwrap();
            write(&agent.store, &bytes, &pin, &BlobMetadata::default()).await;
        }
        sleep(INTERVAL).await;
    }
    fleet.wait_converged().await;
    let after = Traffic::of(fleet).await;

    let received = after.received_since(&before) as f64;
    let idle_bytes = idle / 2.0 * AGENTS as f64 * after.at.duration_since(before.at).as_secs_f64();
    let (announcements, messages) = (after.announcements - before.announcements, after.messages - before.messages);
    let an_agent = |bytes: f64| bytes / AGENTS as f64 / 1024.0;
    println!(
        "  {PUBLISHERS} publishers, {ROUNDS} times a blob each: {announcements} announcements, {messages} messages received; {:.1} KiB per agent, {:.1} of them above idle",
        an_agent(received),
        an_agent(received - idle_bytes),
    );
    let context = format!("received above idle, all agents, / {messages} messages received");
    println!("figure mesh_bytes_per_message_real {:.0} ({context})", (received - idle_bytes) / messages as f64);
}

async fn a_killed_agent_is_dropped_and_returns(fleet: &mut Fleet) {
    let mut times = Vec::new();
    // Every agent joins the address of agent 1.
    for number in [1, 8, 14, 21, 29] {
        let began = Instant::now();
        fleet.kill(&[number]);
        fleet.wait_dropped(&[number]).await;
        times.push(began.elapsed().as_secs_f64());
        fleet.start([number]);
        fleet.wait_converged().await;
    }
    let times = sorted(times);
    let context = format!(
        "SIGKILL until the last of 29 inventories drops the peer, median of {}; worst {:.2}",
        times.len(),
        last(&times)
    );
    println!("figure dead_peer_forgotten_s {:.2} ({context})", median(&times));
}

async fn five_killed_agents_are_dropped_and_return(fleet: &mut Fleet) {
    let five = [2, 9, 15, 22, 28];
    let began = Instant::now();
    fleet.kill(&five);
    fleet.wait_dropped(&five).await;
    println!("figure five_dead_peers_forgotten_s {:.2} (SIGKILL to five at once)", began.elapsed().as_secs_f64());

    let before = Traffic::of(fleet).await;
    fleet.start(five);
    fleet.wait_converged().await;
    let back = before.at.elapsed().as_secs_f64();
    println!("figure five_restarted_known_s {back:.2} (started at once, until all {AGENTS} inventories are complete)");
    let after = Traffic::of(fleet).await;
    println!(
        "  meanwhile an agent received {:.1} KiB, {:.0} messages",
        after.received_since(&before) as f64 / AGENTS as f64 / 1024.0,
        after.messages.saturating_sub(before.messages) as f64 / AGENTS as f64,
    );
}

async fn an_agent_whose_link_is_down_is_dropped_and_returns(fleet: &Fleet) {
    let mut times = Vec::new();
    for number in [5, 17, 26] {
        let began = Instant::now();
        set_link(number, "down");
        fleet.wait_dropped(&[number]).await;
        times.push(began.elapsed().as_secs_f64());
        set_link(number, "up");
        fleet.wait_converged().await;
    }
    let times = sorted(times);
    let context = format!(
        "link down until the last of 29 inventories drops the peer, median of {}; worst {:.2}",
        times.len(),
        last(&times)
    );
    println!("figure dead_peer_forgotten_link_s {:.2} ({context})", median(&times));
}

/// Sets the mesh link of one agent `down` or `up`.
fn set_link(agent: usize, state: &str) {
    network::ip(&[], &[format!("link set mesh-{agent} {state}")]);
}

fn sorted(numbers: impl IntoIterator<Item = f64>) -> Vec<f64> {
    let mut numbers: Vec<_> = numbers.into_iter().collect();
    numbers.sort_by(f64::total_cmp);
    numbers
}

fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

fn last(sorted: &[f64]) -> f64 {
    sorted[sorted.len() - 1]
}
