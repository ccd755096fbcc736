//! Holds transfers to a rate: one throttle for everything that comes, one for everything that goes.
//!
//! Without a limit it costs a look at the rules. With one, streams take turns chunk by chunk, in the order in which they came.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Mutex, Notify, watch};
use tokio::time::{Instant, sleep};

use crate::decide::bucket::{Bucket, CHUNK, transfers_at_once};
use crate::decide::rules::{Budgets, Rules};

/// The rules in force, where anybody set some.
pub(super) type InForce = Option<watch::Receiver<Arc<Rules>>>;

/// One direction.
pub(super) struct Throttle {
    rules: InForce,
    rate_of: fn(&Budgets) -> u64,
    /// Whoever holds it is next; tokio's mutex lets them in as they came.
    bucket: Mutex<Bucket>,
    /// Held by whoever is next to get a place.
    entrance: Mutex<()>,
    places: Places,
}

/// How many transfers of this direction run.
#[derive(Default)]
struct Places {
    taken: AtomicUsize,
    freed: Notify,
}

/// The right to one transfer, free again when dropped.
pub(super) struct Place<'a>(&'a Places);

impl Throttle {
    pub(super) fn new(rules: InForce, rate_of: fn(&Budgets) -> u64) -> Self {
        let rate = rate_in(&rules, rate_of);
        Self {
            rules,
            rate_of,
            bucket: Mutex::new(Bucket::new(rate, Instant::now().into_std())),
            entrance: Mutex::default(),
            places: Places::default(),
        }
    }

    /// Whether there is a limit now.
    pub(super) fn is_limited(&self) -> bool {
        self.rate() > 0
    }

    fn rate(&self) -> u64 {
        rate_in(&self.rules, self.rate_of)
    }

    /// Waits until so many bytes may pass.
    pub(super) async fn pass(&self, bytes: u64) {
        let mut left = bytes;
        while left > 0 && self.is_limited() {
            let chunk = left.min(CHUNK);
            self.pass_chunk(chunk).await;
            left -= chunk;
        }
    }

    async fn pass_chunk(&self, bytes: u64) {
        let mut bucket = self.bucket.lock().await;
        let mut rules = self.rules.clone();
        loop {
            // Seen before it is read: what changes from here on wakes us.
            rules.iter_mut().for_each(watch::Receiver::mark_unchanged);
            let now = Instant::now().into_std();
            bucket.set_rate(self.rate(), now);
            let Err(wait) = bucket.take(bytes, now) else { return };
            tokio::select! {
                () = sleep(wait) => {}
                () = changed(&mut rules) => {}
            }
        }
    }

    /// Waits for a place. Under a limit so few are given that each transfer is fast enough for its other end; as they came.
    pub(super) async fn place(&self) -> Place<'_> {
        let _next = self.entrance.lock().await;
        let mut rules = self.rules.clone();
        loop {
            rules.iter_mut().for_each(watch::Receiver::mark_unchanged);
            if let Some(place) = self.try_place() {
                return place;
            }
            tokio::select! {
                // Told to one who waits, or kept for the next: nobody else waits here.
                () = self.places.freed.notified() => {}
                () = changed(&mut rules) => {}
            }
        }
    }

    /// A place, if there is one; whoever waits for one is passed by.
    pub(super) fn try_place(&self) -> Option<Place<'_>> {
        let most = transfers_at_once(self.rate());
        let taken = &self.places.taken;
        let more = |taken: usize| (taken < most).then_some(taken + 1);
        taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Place(&self.places))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
        self.0.freed.notify_one();
    }
}

fn rate_in(rules: &InForce, rate_of: fn(&Budgets) -> u64) -> u64 {
    rules.as_ref().map_or(0, |rules| rate_of(&rules.borrow().budgets))
}

/// Other rules; never when nobody can set any more.
async fn changed(rules: &mut InForce) {
    if let Some(rules) = rules
        && rules.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::future::join_all;

    use super::*;
    use crate::decide::bucket::MIN_RATE;
    use crate::transfer::tests::rules;

    fn throttle(rate: u64) -> (watch::Sender<Arc<Rules>>, Throttle) {
        let (sender, receiver) = watch::channel(rules(rate, 0));
        (sender, Throttle::new(Some(receiver), |budgets| budgets.max_download_rate))
    }

    #[tokio::test(start_paused = true)]
    async fn streams_take_turns() {
        let (_rules, throttle) = throttle(MIN_RATE);
        throttle.pass(CHUNK).await;
        let began = Instant::now();
        let ends = join_all((0..3).map(|_| async {
            throttle.pass(2 * CHUNK).await;
            began.elapsed().as_secs()
        }));
        assert_eq!(ends.await, [4, 5, 6], "each had its first chunk before any had its second");
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_waits_notices_another_rate_at_once() {
        let (sender, throttle) = throttle(MIN_RATE);
        throttle.pass(CHUNK).await;
        let began = Instant::now();
        let change = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            sender.send_replace(rules(0, 0));
        };
        tokio::join!(throttle.pass(100 * CHUNK), change);
        assert_eq!(began.elapsed(), Duration::from_millis(500));
    }

    #[tokio::test(start_paused = true)]
    async fn what_passes_is_what_the_rate_allows() {
        for streams in [1, 3, 50] {
            let (_rules, throttle) = throttle(10 * MIN_RATE);
            let began = Instant::now();
            // The bucket is full at first: 2.5 chunks.
            join_all((0..streams).map(|_| throttle.pass(100 * CHUNK))).await;
            let expected = f64::from(streams * 100) / 10.0 - 0.25;
            let took = began.elapsed().as_secs_f64();
            // Timers go off in whole milliseconds, and credit that gathers meanwhile is kept.
            assert!((expected..expected + 0.01).contains(&took), "{streams}: {took}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn under_a_limit_only_few_have_a_place_and_a_higher_one_gives_more() {
        let (sender, throttle) = throttle(MIN_RATE);
        let first = throttle.place().await;
        let _second = throttle.try_place().unwrap();
        assert!(throttle.try_place().is_none());
        let (_third, ()) = tokio::join!(throttle.place(), async { drop(first) });
        assert!(throttle.try_place().is_none());
        let (_fourth, _) = tokio::join!(throttle.place(), async { sender.send_replace(rules(2 * MIN_RATE, 0)) });
        sender.send_replace(rules(0, 0));
        let _many: Vec<_> = (0..1000).map(|_| throttle.try_place().unwrap()).collect();
    }

    #[tokio::test(start_paused = true)]
    async fn one_that_gives_up_waiting_leaves_its_turn_to_the_next() {
        let (_rules, throttle) = throttle(MIN_RATE);
        let (_first, second) = (throttle.place().await, throttle.place().await);
        let given_up = tokio::time::timeout(Duration::from_secs(1), throttle.place()).await;
        assert!(given_up.is_err());
        drop(second);
        throttle.place().await;
    }

    #[tokio::test(start_paused = true)]
    async fn rules_that_nobody_can_change_any_more_stay_in_force() {
        let (sender, throttle) = throttle(MIN_RATE);
        drop(sender);
        let began = Instant::now();
        throttle.pass(3 * CHUNK).await;
        assert_eq!(began.elapsed().as_secs(), 2);
    }
}
