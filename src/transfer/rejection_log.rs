//! Which refusals at the door are worth a line that people read.
//!
//! Strangers decide how often they are refused, so their number must not decide how long the log gets. Not here: counting them, which
//! the metrics do, all of them.

use std::collections::HashSet;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::decide::subnet::Subnet;

/// An address is logged of once in it, for each reason. An agent that is refused tries again several times in a minute.
const LOG_INTERVAL: Duration = Duration::from_secs(60);

/// Lines in a span, for somebody with a whole network of addresses. One has some 300 bytes, so these are 28 MB a day, of the 50 MB that
/// the kubelet keeps of a container's log: the day before can still be read. A cluster in which more agents are refused than this has
/// one reason for all.
const MAX_LINES: usize = 64;

/// Of these, lines about one IPv6 subnet, whose hosts may choose among 2^64 addresses: the nodes of other subnets still get theirs.
const MAX_LINES_PER_SUBNET: usize = MAX_LINES / 2;

/// The refusals that were logged.
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
    /// Whether to tell that `address` was refused. The reason is its kind: in the whole text may be what the stranger said, which can
    /// be something else each time.
    pub(super) fn record(&self, address: IpAddr, reason: &'static str) -> bool {
        let now = Instant::now();
        let mut logged = self.logged.lock().unwrap_or_else(PoisonError::into_inner);
        if logged.interval_start.is_none_or(|since| now >= since + LOG_INTERVAL) {
            *logged = LoggedRejections { interval_start: Some(now), rejections: HashSet::new() };
        }
        let is_near = |other: IpAddr| Subnet::of(other) == Subnet::of(address);
        let of_subnet = logged.rejections.iter().filter(|(other, _)| is_near(*other)).count();
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
        let refusals = RejectionLog::default();
        assert!(refusals.record(address(1), "denied"));
        assert!(!refusals.record(address(1), "denied"));
        assert!(refusals.record(address(1), "cannot_tell") && refusals.record(address(2), "denied"));
        advance(LOG_INTERVAL - Duration::from_millis(1)).await;
        assert!(!refusals.record(address(1), "denied"));
        advance(Duration::from_millis(1)).await;
        assert!(refusals.record(address(1), "denied"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_ipv6_subnet_leaves_log_lines_for_others() {
        let refusals = RejectionLog::default();
        let is_news =
            |subnet: u16, host: u16| refusals.record(IpAddr::from([0xfd77, 0, 0, subnet, 0, 0, 0, host]), "denied");
        assert_eq!((0..200).filter(|host| is_news(1, *host)).count(), MAX_LINES_PER_SUBNET);
        assert!(is_news(2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn the_log_lines_about_rejected_addresses_are_bounded() {
        let refusals = RejectionLog::default();
        let logged = || (0..200).filter(|n| refusals.record(address(*n), "denied")).count();
        assert_eq!((logged(), logged()), (MAX_LINES, 0));
        advance(LOG_INTERVAL).await;
        assert_eq!(logged(), MAX_LINES);
    }
}
