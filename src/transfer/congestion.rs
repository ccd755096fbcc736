//! The congestion window: quinn's CUBIC (RFC 9438), which counts a long queue as a lost packet.
//!
//! CUBIC shares a link evenly and keeps the link busy, but fills any queue at a bottleneck. A queue
//! of a second delays all other traffic of the node by a second. Not here: the measurements
//! (`tuning`).

use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use quinn::Connection;
use quinn::congestion::{Controller, ControllerFactory, ControllerMetrics, CubicConfig};
use quinn_proto::RttEstimator;

/// Queueing delay that counts as loss. Twice the queue of a port of a switch or router as a rule
/// (50 ms and less), where a loss is the earlier signal. With 20 ms the last of eight nodes that
/// share an image on two processors needs 1.28 to 1.41 times the time of its link, instead of 1.13
/// (in frames of 9000 bytes). Probably a wait for a processor is mistaken for a queue. The bound is
/// short against the 750 ms that the mesh gives a neighbor to answer
/// ([`crate::decide::gossip::PING_INTERVAL`]), also when the answer waits as long.
const MAX_QUEUE_DELAY: Duration = Duration::from_millis(100);
const _: () = assert!(3 * MAX_QUEUE_DELAY.as_millis() < crate::decide::gossip::PING_INTERVAL.as_millis());

/// A smaller window is not shrunk for a queue: other traffic fills the queue, or the path has
/// changed. About CUBIC's first window in packets of 1452 bytes, and two of the largest packets.
const MIN_WINDOW: u64 = 16 << 10;

/// The first window, in packets (RFC 6928; RFC 9002, section 7.2, bounds the window to 14 720
/// bytes). quinn sets the window before path MTU discovery. With the largest packets the window
/// would be one packet at a time, and each would wait for a delayed acknowledgement.
const INITIAL_WINDOW_PACKETS: u64 = 10;

/// Creates the controllers of new connections.
#[derive(Debug, Default)]
pub struct DelayBounded {
    cubic: Arc<CubicConfig>,
}

impl DelayBounded {
    /// Takes CUBIC settings other than quinn's. A first window below ten packets is raised all the
    /// same.
    pub fn new(cubic: CubicConfig) -> Self {
        Self { cubic: Arc::new(cubic) }
    }
}

impl ControllerFactory for DelayBounded {
    fn build(self: Arc<Self>, now: Instant, current_mtu: u16) -> Box<dyn Controller> {
        let cubic = self.cubic.clone().build(now, current_mtu);
        let config = Some(self.cubic.clone());
        Box::new(DelayBoundedCubic {
            cubic,
            config,
            smoothed_rtt: Duration::ZERO,
            reacts_from: now,
            closing: Arc::default(),
        })
    }
}

/// Must be called before a close. quinn otherwise holds the close frame back like data when the
/// window is full, and then drops the frame; the peer waits for its idle timeout. Fixed in quinn
/// after 0.11.19 (quinn-rs/quinn#2785), which makes this function superfluous.
pub(super) fn lift_window(connection: &Connection) {
    if let Ok(controller) = connection.congestion_state().into_any().downcast::<DelayBoundedCubic>() {
        controller.closing.store(true, Ordering::Relaxed);
    }
}

struct DelayBoundedCubic {
    cubic: Box<dyn Controller>,
    /// The settings of `cubic`; `None` after the first congestion event.
    config: Option<Arc<CubicConfig>>,
    /// The smoothed round trip of the last acknowledgement.
    smoothed_rtt: Duration,
    /// Packets sent earlier were in flight, or queued, at the last congestion event; their delay is
    /// accounted for.
    reacts_from: Instant,
    /// Lifts the window. The connection has a clone of this controller, and clones share the flag.
    closing: Arc<AtomicBool>,
}

impl DelayBoundedCubic {
    /// Takes the smoothed and the least round trip from an acknowledgement of a packet sent at
    /// `sent`.
    fn on_rtt_sample(&mut self, now: Instant, sent: Instant, round_trip: Duration, min_rtt: Duration) {
        self.smoothed_rtt = round_trip;
        let is_long = round_trip > min_rtt.saturating_add(MAX_QUEUE_DELAY);
        if is_long && sent > self.reacts_from && self.window() > MIN_WINDOW {
            self.on_congestion_event(now, sent, false, 0);
        }
    }
}

impl Controller for DelayBoundedCubic {
    fn on_sent(&mut self, now: Instant, bytes: u64, last_packet_number: u64) {
        self.cubic.on_sent(now, bytes, last_packet_number);
    }

    fn on_ack(&mut self, now: Instant, sent: Instant, bytes: u64, app_limited: bool, rtt: &RttEstimator) {
        self.on_rtt_sample(now, sent, rtt.get(), rtt.min());
        self.cubic.on_ack(now, sent, bytes, app_limited, rtt);
    }

    fn on_end_acks(&mut self, now: Instant, in_flight: u64, app_limited: bool, largest_packet_num_acked: Option<u64>) {
        self.cubic.on_end_acks(now, in_flight, app_limited, largest_packet_num_acked);
    }

    fn on_congestion_event(&mut self, now: Instant, sent: Instant, is_persistent_congestion: bool, lost_bytes: u64) {
        self.cubic.on_congestion_event(now, sent, is_persistent_congestion, lost_bytes);
        // Packets that are sent until the queue is shorter still measure the long queue.
        self.reacts_from = now + self.smoothed_rtt;
        self.config = None;
    }

    fn on_mtu_update(&mut self, new_mtu: u16) {
        let initial_window = INITIAL_WINDOW_PACKETS * u64::from(new_mtu);
        match &self.config {
            Some(config) if self.cubic.window() < initial_window => {
                let mut config = CubicConfig::clone(config);
                config.initial_window(initial_window);
                self.cubic = Arc::new(config).build(self.reacts_from, new_mtu);
            }
            _ => self.cubic.on_mtu_update(new_mtu),
        }
    }

    fn window(&self) -> u64 {
        if self.closing.load(Ordering::Relaxed) { u64::MAX } else { self.cubic.window() }
    }

    fn metrics(&self) -> ControllerMetrics {
        self.cubic.metrics()
    }

    fn clone_box(&self) -> Box<dyn Controller> {
        let Self { cubic, config, smoothed_rtt, reacts_from, closing } = self;
        let (cubic, config, closing) = (cubic.clone_box(), config.clone(), closing.clone());
        Box::new(Self { cubic, config, smoothed_rtt: *smoothed_rtt, reacts_from: *reacts_from, closing })
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

    /// A controller with a window of 1 MiB, and a time after its creation.
    fn controller() -> (DelayBoundedCubic, Instant) {
        let (mut cubic, now) = (CubicConfig::default(), Instant::now());
        cubic.initial_window(1 << 20);
        (build_controller(Arc::new(DelayBounded::new(cubic)), now), now + Duration::from_secs(1))
    }

    fn build_controller(factory: Arc<DelayBounded>, now: Instant) -> DelayBoundedCubic {
        *factory.build(now, 1200).into_any().downcast().expect("a `DelayBoundedCubic`")
    }

    /// The window after an acknowledgement of a packet sent at `sent`, with this round trip.
    fn window_after_ack(controller: &mut DelayBoundedCubic, sent: Instant, round_trip: Duration) -> u64 {
        controller.on_rtt_sample(sent + round_trip, sent, round_trip, NO_QUEUE);
        controller.window()
    }

    #[test]
    fn a_queue_within_a_switchs_size_does_not_shrink_the_window() {
        let (mut controller, now) = controller();
        assert_eq!(window_after_ack(&mut controller, now, NO_QUEUE), 1 << 20);
        assert_eq!(window_after_ack(&mut controller, now, SHORT_QUEUE), 1 << 20);
    }

    #[test]
    fn a_long_queue_shrinks_the_window_like_a_loss() {
        let (mut controller, now) = controller();
        let (mut lost, _) = self::controller();
        lost.on_congestion_event(now + LONG_QUEUE, now, false, 1452);
        let slower = window_after_ack(&mut controller, now, LONG_QUEUE);
        assert!(slower < 1 << 20 && slower == lost.window(), "{slower} and {}", lost.window());
    }

    #[test]
    fn one_queue_shrinks_the_window_once() {
        let (mut controller, now) = controller();
        let once = window_after_ack(&mut controller, now, LONG_QUEUE);
        let slowed = now + LONG_QUEUE;
        // Sent before the window shrank, or within a round trip after that.
        for sent in [now, slowed, slowed + LONG_QUEUE] {
            assert_eq!(window_after_ack(&mut controller, sent, LONG_QUEUE), once);
        }
        let again = window_after_ack(&mut controller, slowed + LONG_QUEUE + NO_QUEUE, LONG_QUEUE);
        assert!(again < once, "{again}");
    }

    #[test]
    fn a_window_that_a_loss_shrank_is_not_shrunk_for_the_same_queue() {
        let (mut controller, now) = controller();
        window_after_ack(&mut controller, now, SHORT_QUEUE);
        controller.on_congestion_event(now + SHORT_QUEUE, now, false, 1452);
        let slowed = controller.window();
        assert_eq!(window_after_ack(&mut controller, now + SHORT_QUEUE + NO_QUEUE, LONG_QUEUE), slowed);
    }

    #[test]
    fn a_window_below_the_minimum_is_not_shrunk_by_a_queue() {
        let (mut controller, now) = controller();
        let mut sent = now;
        let mut windows: Vec<_> = (0..100)
            .map(|_| {
                sent += 3 * LONG_QUEUE;
                window_after_ack(&mut controller, sent, LONG_QUEUE)
            })
            .collect();
        assert!(windows.is_sorted_by(|one, next| one >= next), "{windows:?}");
        windows.dedup();
        // CUBIC shrinks the window by three tenths each time.
        assert!((MIN_WINDOW * 7 / 10..=MIN_WINDOW).contains(windows.last().unwrap()), "{windows:?}");
    }

    #[test]
    fn a_cloned_controller_has_the_same_window() {
        let (mut controller, now) = controller();
        let slower = window_after_ack(&mut controller, now, LONG_QUEUE);
        assert_eq!(controller.clone_box().window(), slower);
    }

    #[test]
    fn a_connection_begins_with_ten_packets_of_what_its_path_carries() {
        let mut new = build_controller(Arc::default(), Instant::now());
        let mut windows = vec![new.window()];
        for mtu in [1452, 6500, 1200] {
            new.on_mtu_update(mtu);
            windows.push(new.window());
        }
        assert_eq!(windows, [12_000, 14_520, 65_000, 65_000]);
    }

    #[test]
    fn a_shrunk_window_is_not_reset_by_a_larger_mtu() {
        let (now, sent) = (Instant::now(), Instant::now() + LONG_QUEUE);
        let mut slowed = build_controller(Arc::default(), now);
        slowed.on_congestion_event(sent, sent, false, 1200);
        slowed.on_mtu_update(6500);
        assert_eq!(slowed.window(), 13_000, "CUBIC's least window of two packets");
    }

    #[test]
    fn a_cloned_controller_lifts_the_window_of_the_original() {
        let (controller, _) = controller();
        let copy: Box<DelayBoundedCubic> = controller.clone_box().into_any().downcast().expect("a `DelayBoundedCubic`");
        copy.closing.store(true, Ordering::Relaxed);
        assert_eq!(controller.window(), u64::MAX);
    }
}
