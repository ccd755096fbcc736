//! Budget of TokenReviews per agent, so that all agents together stay below a rate that does not
//! grow with the cluster.

use std::time::{Duration, Instant};

/// Reviews that all agents may request at once, and the limit of one agent. In a rollout a tenth of
/// the agents restart together and each connects to a dozen others. An API server answers a review
/// in a few milliseconds and serves 200 writes at a time.
const CLUSTER_BURST: usize = 4000;
const MAX_BURST: u32 = 8;

/// With a smaller burst, two agents that join at once would not be reviewed at each of their peers.
const MIN_BURST: u32 = 2;

/// Reviews per second of the whole cluster after the burst.
const CLUSTER_RATE: u32 = 50;

/// Minimum interval between two reviews of an agent after the burst. A small cluster does not need
/// 50 a second.
const MIN_INTERVAL: Duration = Duration::from_secs(20);

/// The reviews that one agent may request now.
#[derive(Debug)]
pub struct ReviewBudget {
    left: u32,
    /// The instant up to which reviews were added.
    since: Instant,
}

impl ReviewBudget {
    /// A full budget.
    pub fn full(now: Instant) -> Self {
        Self { left: MAX_BURST, since: now }
    }

    /// Takes one review if the budget has one, in a cluster of `agents` agents.
    pub fn try_take(&mut self, agents: usize, now: Instant) -> bool {
        let (burst, interval) = share_of_cluster(agents);
        let elapsed = now.saturating_duration_since(self.since);
        let gathered = u32::try_from(elapsed.as_nanos() / interval.as_nanos()).unwrap_or(u32::MAX);
        self.since += interval.saturating_mul(gathered);
        self.left = self.left.saturating_add(gathered).min(burst);
        let is_taken = self.left > 0;
        self.left -= u32::from(is_taken);
        is_taken
    }
}

/// Burst of one agent, and the interval of its further reviews.
fn share_of_cluster(agents: usize) -> (u32, Duration) {
    let agents = agents.max(1);
    let burst = u32::try_from(CLUSTER_BURST / agents).unwrap_or(MAX_BURST).clamp(MIN_BURST, MAX_BURST);
    let interval = Duration::from_secs(1).saturating_mul(u32::try_from(agents).unwrap_or(u32::MAX)) / CLUSTER_RATE;
    (burst, interval.max(MIN_INTERVAL))
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
        let mut budget = ReviewBudget::full(start);
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
            let (burst, interval) = share_of_cluster(agents);
            let rate = agents as f64 / interval.as_secs_f64();
            assert!(rate <= f64::from(CLUSTER_RATE) + 0.01, "{agents} agents request {rate} reviews a second");
            assert!(burst as usize * agents <= CLUSTER_BURST.max(MIN_BURST as usize * agents), "{agents}");
        }
    }

    #[test]
    fn a_rollout_of_five_thousand_agents_is_spread_over_minutes() {
        // Each agent reviews twelve others in the same second, as if all restarted at once.
        let start = Instant::now();
        let mut budgets: Vec<_> = (0..5000).map(|_| ReviewBudget::full(start)).collect();
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
