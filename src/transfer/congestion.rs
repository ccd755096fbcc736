//! How much may be under way on a connection: CUBIC (RFC 9438) as quinn has it, which is told of a long queue as if a packet were lost.
//!
//! CUBIC shares a link evenly and keeps it busy, and fills whatever queue is there before it. Where that holds a second, everything else
//! that the node sends waits as long. Not here: what it was measured against (`tuning`).

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// By how much a round trip may grow. Twice what a port of a switch or of a router holds as a rule (50 ms and less), where loss says so sooner: with
/// 20 ms the last of eight nodes that share an image on two processors is done after 1.28 to 1.41 times what its link needs, instead of 1.13 (in frames of 9000
/// bytes; probably a wait for a processor is taken for a queue). Short against the 750 ms that the mesh gives a neighbour to answer
/// ([`crate::decide::gossip::PROBE`]), also when the answer waits as long.
const QUEUE: Duration = Duration::from_millis(100);
const _: () = assert!(3 * QUEUE.as_millis() < crate::decide::gossip::PROBE.as_millis());

/// Smaller windows are not made smaller for it: then the queue is not their own, or the way has become another one. About what CUBIC begins with.
const LEAST_WINDOW: u64 = 16 << 10;

/// Makes the controllers of new connections.
#[derive(Debug, Default)]
pub struct DelayBounded {
    cubic: Arc<CubicConfig>,
}

impl DelayBounded {
    /// On top of a CUBIC that is set otherwise than quinn does.
    pub fn new(cubic: CubicConfig) -> Self {
        Self { cubic: Arc::new(cubic) }
    }
}

impl ControllerFactory for DelayBounded {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = self.cubic.clone().build(now, current_mtu);
        Box::new(DelayBoundedCubic { cubic, round_trip: Duration::ZERO, heeds_from: now })
    }
}

struct DelayBoundedCubic {
    cubic: Box<dyn Controller>,
    /// Smoothed, as it was last.
    round_trip: Duration,
    /// Packets sent before were under way, or waited, when it slowed down last; what they say is known.
    heeds_from: Instant,
}

impl DelayBoundedCubic {
    /// An acknowledgement of what was sent at `sent` came when a round trip took so long, and at least so long ever.
    fn heed(&mut self, now: Instant, sent: Instant, round_trip: Duration, least: Duration) {
        self.round_trip = round_trip;
        let is_long = round_trip > least.saturating_add(QUEUE);
        if is_long && sent > self.heeds_from && self.window() > LEAST_WINDOW {
            self.on_congestion_event(now, sent, false, 0);
        }
    }
}

impl Controller for DelayBoundedCubic {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.heed(now, sent, rtt.get(), rtt.min());
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        // What is sent until the queue is shorter still finds it long.
        self.heeds_from = now + self.round_trip;
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        self.cubic.on_mtu_update(new_mtu);
    }

    fn window(&self) -> u64 {
        self.cubic.window()
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let Self { cubic, round_trip, heeds_from } = self;
        Box::new(Self { cubic: cubic.clone_box(), round_trip: *round_trip, heeds_from: *heeds_from })
    }

    fn initial_window(&self) -> u64 {
        self.cubic.initial_window()
    }

    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NO_QUEUE: Duration = Duration::from_millis(1);
    const SHORT_QUEUE: Duration = Duration::from_millis(101);
    const LONG_QUEUE: Duration = Duration::from_millis(120);

    /// One that may have a MiB under way, and a moment at which it is used.
    fn controller() -> (DelayBoundedCubic, Instant) {
        let (mut cubic, now) = (CubicConfig::default(), Instant::now());
        cubic.initial_window(1 << 20);
        let cubic = Arc::new(cubic).build(now, 1452);
        (DelayBoundedCubic { cubic, round_trip: Duration::ZERO, heeds_from: now }, now + Duration::from_secs(1))
    }

    /// The window after a packet of `sent` was acknowledged when round trips took so long.
    fn after(controller: &mut DelayBoundedCubic, sent: Instant, round_trip: Duration) -> u64 {
        controller.heed(sent + round_trip, sent, round_trip, NO_QUEUE);
        controller.window()
    }

    #[test]
    fn a_queue_that_a_switch_has_is_left_to_loss() {
        let (mut controller, now) = controller();
        assert_eq!(after(&mut controller, now, NO_QUEUE), 1 << 20);
        assert_eq!(after(&mut controller, now, SHORT_QUEUE), 1 << 20);
    }

    #[test]
    fn a_long_queue_slows_it_down_like_a_loss() {
        let (mut controller, now) = controller();
        let (mut lost, _) = self::controller();
        lost.on_congestion_event(now + LONG_QUEUE, now, false, 1452);
        let slower = after(&mut controller, now, LONG_QUEUE);
        assert!(slower < 1 << 20 && slower == lost.window(), "{slower} and {}", lost.window());
    }

    #[test]
    fn the_same_queue_slows_it_down_once() {
        let (mut controller, now) = controller();
        let once = after(&mut controller, now, LONG_QUEUE);
        let slowed = now + LONG_QUEUE;
        // Sent before it had slowed down, or while what it had sent before still waited.
        for sent in [now, slowed, slowed + LONG_QUEUE] {
            assert_eq!(after(&mut controller, sent, LONG_QUEUE), once);
        }
        let again = after(&mut controller, slowed + LONG_QUEUE + NO_QUEUE, LONG_QUEUE);
        assert!(again < once, "{again}");
    }

    #[test]
    fn what_a_loss_slowed_down_is_not_slowed_down_for_its_queue_too() {
        let (mut controller, now) = controller();
        after(&mut controller, now, SHORT_QUEUE);
        controller.on_congestion_event(now + SHORT_QUEUE, now, false, 1452);
        let slowed = controller.window();
        assert_eq!(after(&mut controller, now + SHORT_QUEUE + NO_QUEUE, LONG_QUEUE), slowed);
    }

    #[test]
    fn a_small_window_stays_whatever_the_queue() {
        let (mut controller, now) = controller();
        let mut sent = now;
        let mut windows: Vec<_> = (0..100)
            .map(|_| {
                sent += 3 * LONG_QUEUE;
                after(&mut controller, sent, LONG_QUEUE)
            })
            .collect();
        assert!(windows.is_sorted_by(|one, next| one >= next), "{windows:?}");
        windows.dedup();
        // CUBIC takes three tenths at a time.
        assert!((LEAST_WINDOW * 7 / 10..=LEAST_WINDOW).contains(windows.last().unwrap()), "{windows:?}");
    }

    #[test]
    fn a_copy_has_the_window_of_the_one_it_is_made_of() {
        let (mut controller, now) = controller();
        let slower = after(&mut controller, now, LONG_QUEUE);
        assert_eq!(controller.clone_box().window(), slower);
    }
}
