use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::*;

const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);

/// A look-up queries A and AAAA records of one name that is fully qualified.
const QUERIES: usize = 2;

/// The agent of one node. `state` gives the answer of DNS and the number of peers at a time after
/// the start.
struct ResolvingAgent<S> {
    start: Instant,
    schedule: DnsSchedule,
    rng: SmallRng,
    state: S,
}

impl<S: Fn(Duration) -> (Option<usize>, usize)> ResolvingAgent<S> {
    fn new(seed: u64, state: S) -> Self {
        let start = Instant::now();
        Self { start, schedule: DnsSchedule::new(start), rng: SmallRng::seed_from_u64(seed), state }
    }

    /// The look-ups between two times, with the peers counted each second.
    fn look_ups(&mut self, from: Duration, to: Duration) -> Vec<Duration> {
        let mut found = Vec::new();
        let mut at = Duration::ZERO;
        while at < to {
            let (now, (listed, peers)) = (self.start + at, (self.state)(at));
            self.schedule.record_peers(peers, now, self.rng.random());
            if self.schedule.due() <= now {
                self.schedule.record_lookup(listed, now, self.rng.random());
                found.push(at);
            }
            at += Duration::from_secs(1);
        }
        found.retain(|at| *at >= from);
        found
    }
}

#[test]
fn an_agent_of_a_converged_mesh_sends_at_most_twelve_queries_an_hour() {
    let mut max_queries = 0;
    for seed in 0..200 {
        // Three seconds after the start, gossip has brought all other members.
        let mut agent = ResolvingAgent::new(seed, |at| (Some(4999), if at.as_secs() < 3 { 0 } else { 4999 }));
        let look_ups = agent.look_ups(10 * MINUTE, 10 * MINUTE + HOUR).len();
        assert!(look_ups > 0, "two halves of a cluster find each other again");
        max_queries = max_queries.max(look_ups * QUERIES);
    }
    assert!(max_queries <= 12, "{max_queries}");
}

#[test]
fn an_absent_node_does_not_make_the_others_resolve_for_ever() {
    // Three agents are listed, and one of them never starts.
    let mut agent = ResolvingAgent::new(1, |at| (Some(2), usize::from(at.as_secs() > 1)));
    assert!(agent.look_ups(10 * MINUTE, 10 * MINUTE + HOUR).len() * QUERIES <= 12);
}

#[test]
fn an_agent_alone_in_its_cluster_resolves_seldom() {
    let mut agent = ResolvingAgent::new(1, |_| (Some(0), 0));
    assert!(agent.look_ups(20 * MINUTE, 20 * MINUTE + HOUR).len() * QUERIES <= 12);
}

#[test]
fn an_agent_that_starts_first_finds_the_second_within_seconds() {
    let mut agent = ResolvingAgent::new(1, |at| (Some(usize::from(at.as_secs() >= 8)), 0));
    let look_ups = agent.look_ups(Duration::from_secs(8), MINUTE);
    assert!(look_ups[0] <= Duration::from_secs(10), "{look_ups:?}");
}

#[test]
fn an_agent_that_lost_its_peers_resolves_within_seconds() {
    let lost = HOUR.as_secs();
    for seed in 0..20 {
        let mut agent = ResolvingAgent::new(seed, |at| (Some(4999), if at.as_secs() < lost { 4999 } else { 0 }));
        let look_ups = agent.look_ups(HOUR, HOUR + MINUTE);
        assert!(look_ups[0] <= HOUR + SPREAD, "{look_ups:?}");
        assert!(look_ups.len() >= 3, "and again: {look_ups:?}");
    }
}

#[test]
fn agents_that_lost_each_other_do_not_resolve_in_the_same_second() {
    let lost = HOUR.as_secs();
    let mut seconds = std::collections::BTreeMap::<u64, usize>::new();
    for seed in 0..200 {
        let mut agent = ResolvingAgent::new(seed, |at| (Some(4999), if at.as_secs() < lost { 4999 } else { 0 }));
        *seconds.entry(agent.look_ups(HOUR, HOUR + MINUTE)[0].as_secs()).or_default() += 1;
    }
    assert!(seconds.values().all(|agents| *agents < 50), "{seconds:?}");
}

#[test]
fn a_peer_that_comes_and_goes_does_not_shorten_the_pauses() {
    let mut agent = ResolvingAgent::new(1, |at| (Some(2), 1 + usize::from(at.as_secs() % 20 < 10)));
    assert!(agent.look_ups(10 * MINUTE, 10 * MINUTE + HOUR).len() * QUERIES <= 12);
}

#[test]
fn a_dns_answer_without_addresses_keeps_the_expected_number_of_agents() {
    let now = Instant::now();
    let mut schedule = DnsSchedule::new(now);
    schedule.record_lookup(Some(4), now, 0.5);
    schedule.record_peers(0, now, 0.5);
    for answer in [None, Some(0)] {
        schedule.record_lookup(answer, now, 0.5);
        assert!(schedule.is_short(), "{answer:?}");
    }
}

proptest! {
    #[test]
    fn a_look_up_is_always_due_within_the_longest_pause(
        steps in proptest::collection::vec((any::<bool>(), proptest::option::of(0usize..20), 0usize..20, 0u64..2000, 0.0f64..1.0), 0..99),
    ) {
        let mut now = Instant::now();
        let mut schedule = DnsSchedule::new(now);
        for (resolves, listed, peers, pause, chance) in steps {
            if resolves {
                schedule.record_lookup(listed, now, chance);
            } else {
                schedule.record_peers(peers, now, chance);
            }
            prop_assert!(schedule.due() <= now + spread(MAX_PAUSE, 1.0));
            now += Duration::from_secs(pause);
        }
    }
}

#[test]
fn a_node_listed_with_an_address_of_each_family_counts_once() {
    let addresses =
        |listed: &[&str]| listed.iter().map(|address| address.parse().unwrap()).collect::<Vec<SocketAddr>>();
    let dual = addresses(&["10.0.0.1:1", "10.0.0.2:1", "[fd77::1]:1", "[fd77::2]:1"]);
    assert_eq!(count_agents(&dual), 2);
    assert_eq!(count_agents(&addresses(&["10.0.0.1:1", "[fd77::1]:1", "[fd77::2]:1"])), 2, "one node has IPv6 alone");
    assert_eq!(count_agents(&[]), 0);
    let start = Instant::now();
    let mut schedule = DnsSchedule::new(start);
    schedule.record_peers(2, start, 0.0);
    schedule.record_lookup(Some(count_agents(&dual)), start, 0.0);
    assert!(!schedule.is_short());
}
