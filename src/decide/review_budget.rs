//! Budget of TokenReviews per agent, so that all agents together stay below a rate that does not
//! grow with the cluster.

use std::time::{Duration, Instant};

use crate::util::token_bucket::{Rate, TokenBucket};

/// Reviews that all agents may request at once, and the limit of one agent. In a rollout a tenth of
/// the agents restart together and each connects to a dozen others. An API server answers a review
/// in a few milliseconds and serves 200 writes at a time.
const CLUSTER_BURST: u64 = 4000;
const MAX_BURST: u64 = 8;

/// With a smaller burst, two agents that join at once would not be reviewed at each of their peers.
const MIN_BURST: u64 = 2;

/// Reviews per second of the whole cluster after the burst.
const CLUSTER_RATE: u32 = 50;

/// Minimum interval between two reviews of an agent after the burst. A small cluster does not need
/// 50 a second.
const MIN_INTERVAL: Duration = Duration::from_secs(20);

/// The reviews that one agent may request now. The default budget is full.
#[derive(Debug, Default)]
pub struct ReviewBudget(TokenBucket);

impl ReviewBudget {
    /// Takes one review if the budget has one, in a cluster of `agents` agents.
    pub fn try_take(&mut self, agents: usize, now: Instant) -> bool {
        self.0.try_take(1, share_of_cluster(agents), now)
    }
}

/// The rate of one agent.
fn share_of_cluster(agents: usize) -> Rate {
    let agents = u64::try_from(agents.max(1)).unwrap_or(u64::MAX);
    let period = Duration::from_secs(agents).max(MIN_INTERVAL * CLUSTER_RATE);
    Rate { burst: (CLUSTER_BURST / agents).clamp(MIN_BURST, MAX_BURST), tokens: CLUSTER_RATE.into(), period }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(budget: &mut ReviewBudget, agents: usize, now: Instant) -> usize {
        (0..100).filter(|_| budget.try_take(agents, now)).count()
    }

    #[test]
    fn a_budget_is_a_burst_and_then_a_rate() {
        let start = Instant::now();
        let mut budget = ReviewBudget::default();
        assert_eq!(taken(&mut budget, 3, start), MAX_BURST as usize);
        assert_eq!(taken(&mut budget, 3, start + MIN_INTERVAL - Duration::from_millis(1)), 0);
        assert_eq!(taken(&mut budget, 3, start + MIN_INTERVAL), 1);
        assert_eq!(
            taken(&mut budget, 3, start + MIN_INTERVAL * 1000),
            MAX_BURST as usize,
            "the budget is bounded by the burst"
        );
    }

    #[test]
    fn the_reviews_of_a_cluster_do_not_grow_with_its_agents() {
        for agents in [1, 3, 500, 1000, 5000, 16_384] {
            let Rate { burst, tokens, period } = share_of_cluster(agents);
            let (agents, rate) = (agents as u64, (agents as u64 * tokens) as f64 / period.as_secs_f64());
            assert!(rate <= f64::from(CLUSTER_RATE) + 0.01, "{agents} agents request {rate} reviews a second");
            assert!(burst * agents <= CLUSTER_BURST.max(MIN_BURST * agents), "{agents}");
        }
    }

    #[test]
    fn a_rollout_of_five_thousand_agents_is_spread_over_minutes() {
        // Each agent reviews twelve others in the same second, as if all restarted at once.
        let start = Instant::now();
        let mut budgets: Vec<_> = (0..5000).map(|_| ReviewBudget::default()).collect();
        let mut max = 0;
        for second in 0..60 {
            let now = start + Duration::from_secs(second);
            let requested =
                budgets.iter_mut().map(|budget| (0..12).filter(|_| budget.try_take(5000, now)).count()).sum();
            max = max.max(if second == 0 { 0 } else { requested });
            assert!(second > 0 || requested <= 10_000, "{requested} reviews in the first second");
        }
        assert!(max <= 5000, "{max}");
    }
}
