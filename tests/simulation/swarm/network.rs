//! Links: each direction of a node's link has a bandwidth that its streams share in turns.

use std::collections::VecDeque;

/// Bytes that a link sends at a time.
const CHUNK: u64 = 64 << 10;

/// Chunks in flight of one stream: more than the product of a link's bandwidth and the latency
/// between zones.
const WINDOW: u8 = 3;

pub(super) type StreamId = usize;

/// A response in flight.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) from: usize,
    pub(super) to: usize,
    pub(super) request: u64,
    pub(super) ticket: u64,
    /// The pieces that may follow the current piece, and how many of them are sent.
    pub(super) allowed_pieces: Vec<u32>,
    pub(super) pieces_left: u8,
    pub(super) piece: u32,
    /// Bytes of the current piece that are not sent yet.
    pub(super) unsent: u64,
    in_flight: u8,
    is_queued: bool,
    /// The receiver cancelled the stream, or all pieces are sent.
    pub(super) is_over: bool,
}

/// The link of a node.
#[derive(Debug, Default)]
struct Link {
    /// Streams with bytes to send, in turn.
    ready: VecDeque<StreamId>,
    is_sending: bool,
    /// Time at which all chunks on the way to this node are received.
    received_at: u64,
}

/// A chunk that is sent now.
pub(super) struct SentChunk {
    pub(super) stream: StreamId,
    pub(super) piece: u32,
    pub(super) bytes: u64,
    /// Time at which the link is free again.
    pub(super) sent_at: u64,
    /// Time at which the receiver has the chunk.
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
        allowed_pieces: Vec<u32>,
        pieces_left: u8,
    ) -> StreamId {
        let stream = Stream {
            from,
            to,
            request,
            ticket,
            allowed_pieces,
            pieces_left,
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

    /// Ends a stream. The ID is reused when no chunk of the stream is in flight.
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

    /// Queues a stream that has bytes to send.
    pub(super) fn queue(&mut self, id: StreamId) {
        let stream = &mut self.streams[id];
        if !stream.is_queued && !stream.is_over && stream.unsent > 0 && stream.in_flight < WINDOW {
            stream.is_queued = true;
            self.links[stream.from].ready.push_back(id);
        }
    }

    /// Sends the next chunk of this node, unless the link is busy or no stream has bytes.
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
            let link_free_at = &mut self.links[to].received_at;
            *link_free_at = (*link_free_at).max(now + latency(node, to)) + time;
            let received_at = *link_free_at;
            self.links[node].is_sending = true;
            self.queue(id);
            return Some(SentChunk { stream: id, piece, bytes, sent_at: now + time, received_at });
        }
    }

    pub(super) fn sent(&mut self, node: usize) {
        self.links[node].is_sending = false;
    }

    /// Records that a chunk was received.
    pub(super) fn received(&mut self, id: StreamId) {
        self.streams[id].in_flight -= 1;
        if self.streams[id].is_over { self.free_if_unused(id) } else { self.queue(id) }
    }
}
