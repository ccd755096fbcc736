//! Limits transfers to a rate: one limiter for downloads, one for uploads.
//!
//! Without a limit a call only reads the policy. With a limit, streams take turns chunk by chunk,
//! in the order of their calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tokio::sync::{Mutex, Notify, watch};
use tokio::time::sleep;

use crate::decide::byte_bucket::{ByteBucket, CHUNK, concurrent_transfers};
use crate::decide::policy::{Budgets, Policy};
use crate::util::clock;

/// The policy in force; `None` where no policy can set a rate.
pub(super) type PolicyReceiver = Option<watch::Receiver<Arc<Policy>>>;

/// The limiter of one direction.
pub(super) struct RateLimiter {
    policy: PolicyReceiver,
    rate_of: fn(&Budgets) -> u64,
    /// The holder of the lock is next; tokio's mutex is first in, first out.
    bucket: Mutex<ByteBucket>,
    /// Held by the transfer that gets the next permit.
    permit_queue: Mutex<()>,
    permits: TransferPermits,
    /// Bytes that the bucket let pass.
    #[cfg(test)]
    limited_bytes: std::sync::atomic::AtomicU64,
}

/// Counts the running transfers of one direction.
#[derive(Default)]
struct TransferPermits {
    in_use: AtomicUsize,
    released: Notify,
}

/// The permit of one transfer; released when dropped.
pub(super) struct TransferPermit<'a>(&'a TransferPermits);

impl RateLimiter {
    pub(super) fn new(policy: PolicyReceiver, rate_of: fn(&Budgets) -> u64) -> Self {
        let rate = rate_in(&policy, rate_of);
        Self {
            policy,
            rate_of,
            bucket: Mutex::new(ByteBucket::new(rate)),
            permit_queue: Mutex::default(),
            permits: TransferPermits::default(),
            #[cfg(test)]
            limited_bytes: Default::default(),
        }
    }

    /// Whether the policy limits the rate now.
    pub(super) fn is_limited(&self) -> bool {
        self.rate() > 0
    }

    fn rate(&self) -> u64 {
        rate_in(&self.policy, self.rate_of)
    }

    /// Waits until so many bytes may pass.
    pub(super) async fn acquire_bytes(&self, bytes: u64) {
        let mut left = bytes;
        while left > 0 && self.is_limited() {
            let chunk = left.min(CHUNK);
            self.acquire_chunk(chunk).await;
            left -= chunk;
        }
    }

    async fn acquire_chunk(&self, bytes: u64) {
        let mut bucket = self.bucket.lock().await;
        let mut policy = self.policy.clone();
        loop {
            // Marked before the policy is read: a later change wakes the wait.
            policy.iter_mut().for_each(watch::Receiver::mark_unchanged);
            let now = clock::now();
            bucket.set_rate(self.rate(), now);
            let Err(wait) = bucket.take(bytes, now) else { break };
            tokio::select! {
                () = sleep(wait) => {}
                () = policy_changed(&mut policy) => {}
            }
        }
        #[cfg(test)]
        self.limited_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Bytes that the bucket let pass.
    #[cfg(test)]
    pub(super) fn limited_bytes(&self) -> u64 {
        self.limited_bytes.load(Ordering::Relaxed)
    }

    /// Waits for a permit, first in, first out. A limit allows so few transfers that each is fast
    /// enough for its other end.
    pub(super) async fn acquire_permit(&self) -> TransferPermit<'_> {
        let _next = self.permit_queue.lock().await;
        let mut policy = self.policy.clone();
        loop {
            policy.iter_mut().for_each(watch::Receiver::mark_unchanged);
            if let Some(permit) = self.try_acquire_permit() {
                return permit;
            }
            tokio::select! {
                // Wakes this waiter, or is kept for the next: the lock admits one waiter at a time.
                () = self.permits.released.notified() => {}
                () = policy_changed(&mut policy) => {}
            }
        }
    }

    /// Takes a permit if one is free, ahead of waiting transfers.
    pub(super) fn try_acquire_permit(&self) -> Option<TransferPermit<'_>> {
        let limit = concurrent_transfers(self.rate());
        let in_use = &self.permits.in_use;
        let increment = |count: usize| (count < limit).then_some(count + 1);
        in_use.fetch_update(Ordering::Relaxed, Ordering::Relaxed, increment).ok().map(|_| TransferPermit(&self.permits))
    }
}

impl Drop for TransferPermit<'_> {
    fn drop(&mut self) {
        self.0.in_use.fetch_sub(1, Ordering::Relaxed);
        self.0.released.notify_one();
    }
}

fn rate_in(policy: &PolicyReceiver, rate_of: fn(&Budgets) -> u64) -> u64 {
    policy.as_ref().map_or(0, |policy| rate_of(&policy.borrow().budgets))
}

/// Waits for another policy; forever when the sender is gone.
async fn policy_changed(policy: &mut PolicyReceiver) {
    if let Some(policy) = policy
        && policy.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use futures::future::join_all;
    use tokio::time::Instant;

    use super::*;
    use crate::decide::byte_bucket::MIN_RATE;
    use crate::transfer::tests::rates_policy;

    fn limiter(rate: u64) -> (watch::Sender<Arc<Policy>>, RateLimiter) {
        let (sender, receiver) = watch::channel(rates_policy(rate, 0));
        (sender, RateLimiter::new(Some(receiver), |budgets| budgets.max_download_rate))
    }

    #[tokio::test(start_paused = true)]
    async fn streams_share_the_rate_chunk_by_chunk() {
        let (_policy, limiter) = limiter(MIN_RATE);
        limiter.acquire_bytes(CHUNK).await;
        let began = Instant::now();
        let ends = join_all((0..3).map(|_| async {
            limiter.acquire_bytes(2 * CHUNK).await;
            began.elapsed().as_secs()
        }));
        assert_eq!(ends.await, [4, 5, 6], "each stream gets its first chunk before any gets the second");
    }

    #[tokio::test(start_paused = true)]
    async fn a_waiting_stream_follows_a_new_rate_at_once() {
        let (sender, limiter) = limiter(MIN_RATE);
        limiter.acquire_bytes(CHUNK).await;
        let began = Instant::now();
        let change = async {
            tokio::time::sleep(Duration::from_millis(500)).await;
            sender.send_replace(rates_policy(0, 0));
        };
        tokio::join!(limiter.acquire_bytes(100 * CHUNK), change);
        assert_eq!(began.elapsed(), Duration::from_millis(500));
    }

    #[tokio::test(start_paused = true)]
    async fn the_bytes_that_pass_are_the_rate_times_the_time() {
        for streams in [1, 3, 50] {
            let (_policy, limiter) = limiter(10 * MIN_RATE);
            let began = Instant::now();
            // The bucket is full at first: 2.5 chunks.
            join_all((0..streams).map(|_| limiter.acquire_bytes(100 * CHUNK))).await;
            let expected = f64::from(streams * 100) / 10.0 - 0.25;
            let took = began.elapsed().as_secs_f64();
            // Timers fire at whole milliseconds, and the credit of the meantime is kept.
            assert!((expected..expected + 0.01).contains(&took), "{streams}: {took}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_rate_bounds_the_permits_and_a_higher_rate_adds_permits() {
        let (sender, limiter) = limiter(MIN_RATE);
        let first = limiter.acquire_permit().await;
        let _second = limiter.try_acquire_permit().unwrap();
        assert!(limiter.try_acquire_permit().is_none());
        let (_third, ()) = tokio::join!(limiter.acquire_permit(), async { drop(first) });
        assert!(limiter.try_acquire_permit().is_none());
        let (_fourth, _) =
            tokio::join!(limiter.acquire_permit(), async { sender.send_replace(rates_policy(2 * MIN_RATE, 0)) });
        sender.send_replace(rates_policy(0, 0));
        let _many: Vec<_> = (0..1000).map(|_| limiter.try_acquire_permit().unwrap()).collect();
    }

    #[tokio::test(start_paused = true)]
    async fn a_cancelled_wait_for_a_permit_leaves_the_permit_to_the_next() {
        let (_policy, limiter) = limiter(MIN_RATE);
        let (_first, second) = (limiter.acquire_permit().await, limiter.acquire_permit().await);
        let given_up = tokio::time::timeout(Duration::from_secs(1), limiter.acquire_permit()).await;
        assert!(given_up.is_err());
        drop(second);
        limiter.acquire_permit().await;
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_policy_stays_in_force_after_its_sender_is_dropped() {
        let (sender, limiter) = limiter(MIN_RATE);
        drop(sender);
        let began = Instant::now();
        limiter.acquire_bytes(3 * CHUNK).await;
        assert_eq!(began.elapsed().as_secs(), 2);
    }
}
