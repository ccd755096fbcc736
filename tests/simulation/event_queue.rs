//! Future events in simulated time, in order. Events at the same moment keep the order in which
//! they were scheduled, so that a seed always gives the same run.

use std::cmp::Ordering;
use std::collections::BinaryHeap;

/// Future events, each with a time in microseconds.
pub(super) struct EventQueue<E> {
    entries: BinaryHeap<QueuedEvent<E>>,
    scheduled: u64,
}

struct QueuedEvent<E> {
    at: u64,
    number: u64,
    event: E,
}

impl<E> EventQueue<E> {
    pub(super) fn new() -> Self {
        Self { entries: BinaryHeap::new(), scheduled: 0 }
    }

    pub(super) fn schedule(&mut self, at: u64, event: E) {
        self.scheduled += 1;
        self.entries.push(QueuedEvent { at, number: self.scheduled, event });
    }

    /// Removes the next event, if its time is not after `until`.
    pub(super) fn next(&mut self, until: u64) -> Option<(u64, E)> {
        self.entries.peek().filter(|entry| entry.at <= until)?;
        self.entries.pop().map(|QueuedEvent { at, event, .. }| (at, event))
    }
}

impl<E> QueuedEvent<E> {
    fn key(&self) -> (u64, u64) {
        (self.at, self.number)
    }
}

impl<E> PartialEq for QueuedEvent<E> {
    fn eq(&self, other: &Self) -> bool {
        self.key() == other.key()
    }
}

impl<E> Eq for QueuedEvent<E> {}

impl<E> PartialOrd for QueuedEvent<E> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<E> Ord for QueuedEvent<E> {
    /// Reversed, because the heap returns the greatest entry first.
    fn cmp(&self, other: &Self) -> Ordering {
        other.key().cmp(&self.key())
    }
}
