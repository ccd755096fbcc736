//! The clocks of the process: one that tests pause, and the wall clock.

use std::time::{Duration, Instant, SystemTime};

/// Tokio's clock, which tests pause.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Sleeps until the deadline; forever without one.
pub async fn sleep_until(deadline: Option<impl Into<tokio::time::Instant>>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline.into()).await,
        None => std::future::pending().await,
    }
}

/// Wall-clock time since 1970; zero on a machine whose clock is before 1970.
pub fn unix_time() -> Duration {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_paused_clock_stands_still_until_a_sleep_and_a_sleep_without_a_deadline_never_ends() {
        let start = now();
        std::thread::sleep(Duration::from_millis(1));
        assert_eq!(now(), start);
        sleep_until(Some(start + Duration::from_secs(60))).await;
        assert_eq!(now(), start + Duration::from_secs(60));
        let endless = sleep_until(None::<Instant>);
        assert!(tokio::time::timeout(Duration::from_secs(3600), endless).await.is_err());
    }
}
