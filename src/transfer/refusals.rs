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

/// An address is told of once in it, for each reason. An agent that is refused tries again several times in a minute.
const SPAN: Duration = Duration::from_secs(60);

/// Lines in a span, for somebody with a whole network of addresses. One has some 300 bytes, so these are 28 MB a day, of the 50 MB that
/// the kubelet keeps of a container's log: the day before can still be read. A cluster in which more agents are refused than this has
/// one reason for all.
const MOST: usize = 64;

/// Of these, lines about one IPv6 subnet, whose hosts may choose among 2^64 addresses: the nodes of other subnets still get theirs.
const MOST_OF_SUBNET: usize = MOST / 2;

/// The refusals that were told.
#[derive(Default)]
pub(super) struct Refusals {
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    since: Option<Instant>,
    refusals: HashSet<(IpAddr, &'static str)>,
}

impl Refusals {
    /// Whether to tell that `address` was refused. The reason is its kind: in the whole text may be what the stranger said, which can
    /// be something else each time.
    pub(super) fn is_news(&self, address: IpAddr, reason: &'static str) -> bool {
        let now = Instant::now();
        let mut told = self.told.lock().unwrap_or_else(PoisonError::into_inner);
        if told.since.is_none_or(|since| now >= since + SPAN) {
            *told = Told { since: Some(now), refusals: HashSet::new() };
        }
        let is_near = |other: IpAddr| Subnet::of(other) == Subnet::of(address);
        let of_subnet = told.refusals.iter().filter(|(other, _)| is_near(*other)).count();
        of_subnet < MOST_OF_SUBNET && told.refusals.len() < MOST && told.refusals.insert((address, reason))
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
    async fn an_address_is_told_of_once_a_minute_for_each_reason() {
        let refusals = Refusals::default();
        assert!(refusals.is_news(address(1), "denied"));
        assert!(!refusals.is_news(address(1), "denied"));
        assert!(refusals.is_news(address(1), "cannot_tell") && refusals.is_news(address(2), "denied"));
        advance(SPAN - Duration::from_millis(1)).await;
        assert!(!refusals.is_news(address(1), "denied"));
        advance(Duration::from_millis(1)).await;
        assert!(refusals.is_news(address(1), "denied"));
    }

    #[tokio::test(start_paused = true)]
    async fn one_ipv6_subnet_leaves_lines_for_others() {
        let refusals = Refusals::default();
        let is_news =
            |subnet: u16, host: u16| refusals.is_news(IpAddr::from([0xfd77, 0, 0, subnet, 0, 0, 0, host]), "denied");
        assert_eq!((0..200).filter(|host| is_news(1, *host)).count(), MOST_OF_SUBNET);
        assert!(is_news(2, 1));
    }

    #[tokio::test(start_paused = true)]
    async fn a_network_of_strangers_gets_a_bounded_number_of_lines() {
        let refusals = Refusals::default();
        let told = || (0..200).filter(|n| refusals.is_news(address(*n), "denied")).count();
        assert_eq!((told(), told()), (MOST, 0));
        advance(SPAN).await;
        assert_eq!(told(), MOST);
    }
}
