//! A socket that delays packets and drops some, like the path between two regions.
//!
//! The kernel's netem does this better, where a kernel has it. This socket delivers a packet up to
//! a millisecond late, the resolution of the runtime's timer. So packets that arrived one by one
//! are delivered in small groups.

use std::collections::VecDeque;
use std::fmt;
use std::io::{self, IoSliceMut};
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use parking_lot::Mutex;
use quinn::udp::{RecvMeta, Transmit};
use quinn::{AsyncUdpSocket, UdpPoller};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::time::{Instant, Sleep, sleep_until};

/// Properties of the path to the other end.
#[derive(Clone, Copy)]
pub(super) struct Distance {
    /// Delay of each packet.
    pub(super) delay: Duration,
    /// Dropped packets per million.
    pub(super) lost: u32,
}

pub(super) struct DelayedSocket {
    socket: Arc<dyn AsyncUdpSocket>,
    distance: Distance,
    delayed: Mutex<DelayedPackets>,
}

struct DelayedPackets {
    in_flight: VecDeque<(Instant, RecvMeta, Vec<u8>)>,
    next: Pin<Box<Sleep>>,
    rng: SmallRng,
}

impl DelayedSocket {
    /// Wraps a socket. Must be called within a runtime.
    pub(super) fn new(socket: Arc<dyn AsyncUdpSocket>, distance: Distance, seed: u64) -> Self {
        let delayed = DelayedPackets {
            in_flight: VecDeque::new(),
            next: Box::pin(sleep_until(Instant::now())),
            rng: SmallRng::seed_from_u64(seed),
        };
        Self { socket, distance, delayed: Mutex::new(delayed) }
    }
}

impl DelayedPackets {
    /// Reads packets until the socket has no more, and registers the task for the next packet.
    fn receive(
        &mut self,
        delayed_socket: &DelayedSocket,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> io::Result<()> {
        while let Poll::Ready(received) = delayed_socket.socket.poll_recv(cx, buffers, meta)? {
            let due = Instant::now() + delayed_socket.distance.delay;
            for (meta, buffer) in meta.iter().zip(buffers.iter()).take(received) {
                for packet in buffer[..meta.len].chunks(meta.stride.max(1)) {
                    if self.rng.random_range(0..1_000_000) >= delayed_socket.distance.lost {
                        let meta = RecvMeta { len: packet.len(), stride: packet.len(), ..*meta };
                        self.in_flight.push_back((due, meta, packet.to_vec()));
                    }
                }
            }
        }
        Ok(())
    }

    fn deliver(&mut self, buffers: &mut [IoSliceMut<'_>], meta: &mut [RecvMeta]) -> usize {
        let now = Instant::now();
        let mut delivered = 0;
        while delivered < buffers.len().min(meta.len()) && self.in_flight.front().is_some_and(|(due, ..)| *due <= now) {
            let Some((_, received_meta, packet)) = self.in_flight.pop_front() else { break };
            buffers[delivered][..packet.len()].copy_from_slice(&packet);
            meta[delivered] = received_meta;
            delivered += 1;
        }
        delivered
    }
}

impl fmt::Debug for DelayedSocket {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.socket.fmt(f)
    }
}

impl AsyncUdpSocket for DelayedSocket {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        self.socket.clone().create_io_poller()
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        self.socket.try_send(transmit)
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        let mut delayed = self.delayed.lock();
        delayed.receive(self, cx, buffers, meta)?;
        loop {
            let delivered = delayed.deliver(buffers, meta);
            if delivered > 0 {
                return Poll::Ready(Ok(delivered));
            }
            let Some(due) = delayed.in_flight.front().map(|(due, ..)| *due) else { return Poll::Pending };
            delayed.next.as_mut().reset(due);
            if delayed.next.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.socket.local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.socket.max_transmit_segments()
    }

    fn max_receive_segments(&self) -> usize {
        self.socket.max_receive_segments()
    }

    fn may_fragment(&self) -> bool {
        self.socket.may_fragment()
    }
}
