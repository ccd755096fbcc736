//! Limits the log lines about rejected connections.
//!
//! Unauthenticated peers decide how often they are rejected, so their number must not decide the
//! size of the log. Not here: the count of all rejections, which is a metric.

use std::collections::HashSet;
use std::net::IpAddr;
use std::time::Duration;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::decide::subnet::Subnet;

/// Each address is logged once per interval and reason. A rejected agent tries again several times
/// a minute.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Lines per interval, against an attacker with a whole network of addresses. A line has some 300
/// bytes, so the lines are 28 MB a day. The kubelet keeps 50 MB of a container's log, so the day
/// before can still be read. A cluster in which more agents are rejected has one reason for all.
const MAX_LINES: usize = 64;

/// Lines about one IPv6 subnet, where a host may choose among 2^64 addresses. The other lines are
/// left to other subnets.
const MAX_LINES_PER_SUBNET: usize = MAX_LINES / 2;

#[derive(Default)]
pub(super) struct RejectionLog {
    logged: Mutex<LoggedRejections>,
}

#[derive(Default)]
struct LoggedRejections {
    interval_start: Option<Instant>,
    rejections: HashSet<(IpAddr, &'static str)>,
}

impl RejectionLog {
    /// Records a rejection; `true` when the rejection has to be logged. `reason` is a fixed label:
    /// the full text may contain input of the peer, which can differ each time.
    pub(super) fn record(&self, address: IpAddr, reason: &'static str) -> bool {
        let now = Instant::now();
        let mut logged = self.logged.lock();
        if logged.interval_start.is_none_or(|since| now >= since + LOG_INTERVAL) {
            *logged = LoggedRejections { interval_start: Some(now), rejections: HashSet::new() };
        }
        let is_same_subnet = |other: IpAddr| Subnet::of(other) == Subnet::of(address);
        let of_subnet = logged.rejections.iter().filter(|(other, _)| is_same_subnet(*other)).count();
        of_subnet < MAX_LINES_PER_SUBNET
            && logged.rejections.len() < MAX_LINES
            && logged.rejections.insert((address, reason))
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::advance;

    use super::*;

    fn address(n: usize) -> IpAddr {
        IpAddr::from([10, 0, 0, u8::try_from(n).unwrap()])
    }

    #[tokio::test(start_paused = true)]
    async fn a_rejected_address_is_logged_once_a_minute_for_each_reason() {
        let rejections = RejectionLog::default();
        assert!(rejections.record(address(1), "denied"));
        assert!(!rejections.record(address(1), "denied"));
        assert!(rejections.record(address(1), "cannot_tell") && rejections.record(address(2), "denied"));
        advance(LOG_INTERVAL - Duration::from_millis(1)).await;
        assert!(!rejections.record(address(1), "denied"));
        advance(Duration::from_millis(1)).await;
        assert!(rejections.record(address(1), "denied"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_ipv6_subnet_leaves_log_lines_for_others() {
        let rejections = RejectionLog::default();
        let is_logged =
            |subnet: u16, host: u16| rejections.record(IpAddr::from([0xfd77, 0, 0, subnet, 0, 0, 0, host]), "denied");
        assert_eq!((0..200).filter(|host| is_logged(1, *host)).count(), MAX_LINES_PER_SUBNET);
        assert!(is_logged(2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_log_lines_about_rejected_addresses_are_bounded() {
        let rejections = RejectionLog::default();
        let logged = || (0..200).filter(|n| rejections.record(address(*n), "denied")).count();
        assert_eq!((logged(), logged()), (MAX_LINES, 0));
        advance(LOG_INTERVAL).await;
        assert_eq!(logged(), MAX_LINES);
    }
}
