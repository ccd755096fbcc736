//! Links: each direction of each node's carries so many bytes a second, shared in turns by what goes over it.

use std::collections::VecDeque;

/// What goes over a link at a time, in bytes.
const CHUNK: u64 = 64 << 10;

/// Chunks of one stream that are under way: more than a link's bandwidth times the way across zones.
const WINDOW: u8 = 3;

pub(super) type StreamId = usize;

/// One answer under way.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) request: u64,
    pub(super) ticket: u64,
    /// What may be sent after this piece, and how many of it.
    pub(super) allowed_pieces: Vec<u32>,
    pub(super) pieces_left: u8,
    pub(super) piece: u32,
    /// Bytes of the piece that are not on their way.
    pub(super) unsent: u64,
    in_flight: u8,
    is_queued: bool,
    /// It was given up at its receiving end, or has sent everything.
    pub(super) is_over: bool,
}

/// One node's link.
#[derive(Debug, Default)]
struct Link {
    /// Streams that have something to send, in turn.
    ready: VecDeque<StreamId>,
    is_sending: bool,
    /// When what is on its way here will have been received.
    received_at: u64,
}

/// A chunk that goes out now.
pub(super) struct SentChunk {
    pub(super) stream: StreamId,
    pub(super) piece: u32,
    pub(super) bytes: u64,
    /// When the link is free again.
    pub(super) sent_at: u64,
    /// When the other end has it.
    pub(super) received_at: u64,
}

pub(super) struct Network {
    /// Bytes per second.
    pub(super) bandwidth: u64,
    links: Vec<Link>,
    streams: Vec<Stream>,
    unused: Vec<StreamId>,
}

impl Network {
    pub(super) fn new(nodes: usize, bandwidth: u64) -> Self {
        Self {
            bandwidth,
            links: (0..nodes).map(|_| Link::default()).collect(),
            streams: Vec::new(),
            unused: Vec::new(),
        }
    }

    pub(super) fn stream(&mut self, stream: StreamId) -> &mut Stream {
        &mut self.streams[stream]
    }

    pub(super) fn open(
        &mut self,
        from: usize,
        to: usize,
        request: u64,
        ticket: u64,
        choice: Vec<u32>,
        left: u8,
    ) -> StreamId {
        let stream = Stream {
            from,
            to,
            request,
            ticket,
            allowed_pieces: choice,
            pieces_left: left,
            piece: 0,
            unsent: 0,
            in_flight: 0,
            is_queued: false,
            is_over: false,
        };
        match self.unused.pop() {
            Some(unused) => {
                self.streams[unused] = stream;
                unused
            }
            None => {
                self.streams.push(stream);
                self.streams.len() - 1
            }
        }
    }

    /// Its place is used again when nothing of it is under way.
    pub(super) fn close(&mut self, id: StreamId) {
        if !std::mem::replace(&mut self.streams[id].is_over, true) {
            self.free_if_unused(id);
        }
    }

    fn free_if_unused(&mut self, id: StreamId) {
        let stream = &self.streams[id];
        if stream.is_over && stream.in_flight == 0 && !stream.is_queued {
            self.unused.push(id);
        }
    }

    /// There is something of it to send.
    pub(super) fn queue(&mut self, id: StreamId) {
        let stream = &mut self.streams[id];
        if !stream.is_queued && !stream.is_over && stream.unsent > 0 && stream.in_flight < WINDOW {
            stream.is_queued = true;
            self.links[stream.from].ready.push_back(id);
        }
    }

    /// The next chunk that this node sends, if it has one and is not sending.
    pub(super) fn send(&mut self, node: usize, now: u64, latency: impl Fn(usize, usize) -> u64) -> Option<SentChunk> {
        if self.links[node].is_sending {
            return None;
        }
        loop {
            let id = self.links[node].ready.pop_front()?;
            let stream = &mut self.streams[id];
            stream.is_queued = false;
            if stream.is_over {
                self.free_if_unused(id);
                continue;
            }
            let bytes = stream.unsent.min(CHUNK);
            stream.unsent -= bytes;
            stream.in_flight += 1;
            let time = bytes * 1_000_000 / self.bandwidth;
            let (piece, to) = (stream.piece, stream.to);
            let there = &mut self.links[to].received_at;
            *there = (*there).max(now + latency(node, to)) + time;
            let received_at = *there;
            self.links[node].is_sending = true;
            self.queue(id);
            return Some(SentChunk { stream: id, piece, bytes, sent_at: now + time, received_at });
        }
    }

    pub(super) fn sent(&mut self, node: usize) {
        self.links[node].is_sending = false;
    }

    /// A chunk was received.
    pub(super) fn received(&mut self, id: StreamId) {
        self.streams[id].in_flight -= 1;
        if self.streams[id].is_over { self.free_if_unused(id) } else { self.queue(id) }
    }
}
