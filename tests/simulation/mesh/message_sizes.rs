//! What a message weighs on a node's link, Ethernet headers included, as the counters of a network interface see it.
//!
//! TCP without Nagle, noise, yamux, and libp2p's protocols on top. Each message is flushed, so it is a noise frame and a packet of its
//! own.

use lighterman::model::{Gossip, SyncReply, SyncRequest};
use lighterman::oci::Digest;
use serde::Serialize;

/// Ethernet 14, IPv4 20, TCP 20 with 12 of timestamps.
const HEADERS: usize = 14 + 20 + 32;

/// What fits into an Ethernet frame of 1500 beside IPv4 and TCP.
const SEGMENT: usize = 1500 - 20 - 32;

/// Its header; a message is cut into frames of 16 KiB (yamux's `split_send_size`).
const YAMUX: usize = 12;
const YAMUX_FRAME: usize = 16 << 10;

/// A length of 2 bytes and an authentication code of 16, for at most 64 511 bytes (libp2p-noise's `MAX_FRAME_LEN`).
const NOISE: usize = 2 + 16;
const NOISE_FRAME: usize = 64_511;

/// A bare acknowledgement.
pub(crate) const ACK: usize = HEADERS;

/// The frame of [`lighterman::wire`]: length and version.
const FRAME: usize = 6;

/// A ServiceAccount token, bound to a pod and with the node's name in it, is 1.2 to 1.4 KB. The simulated ones are a few bytes, so that a
/// million of them fit into memory; the difference is added to each message that carries one.
const TOKEN: usize = 1300;

/// The gossipsub topic's name, in characters.
const TOPIC: usize = "lighterman/mesh/1".len();

/// A gossipsub message's identifier: a short hash of its content.
const MESSAGE_ID: usize = 20;

/// Opening a connection, in one direction: TCP's handshake (74 and two bare acknowledgements), multistream for noise and yamux (four
/// packets of 20 to 40 bytes), noise XX (32, 64 and 200 with the identity), and the streams of ping and gossip with their negotiation
/// (three packets of 50 each): a dozen packets and 600 bytes.
pub(crate) const CONNECTING: usize = 12 * HEADERS + 600;

/// Meeting at the door, in one direction: QUIC's first flight padded to 1200, a certificate of 500 bytes, the Hello with its token, and
/// four small packets; UDP headers are 42.
pub(crate) const QUIC_HANDSHAKE: usize = 1200 + 500 + TOKEN + 8 * 42 + 200;

/// A question goes over a stream of its own: multistream's header and the protocol's name (40 bytes), confirmed by the other side, and
/// the stream's end, each a packet; in one direction.
pub(crate) const STREAM_OVERHEAD: usize = 2 * (HEADERS + NOISE + YAMUX) + 40;

/// One flush of so many bytes on one stream.
pub(crate) fn flushed(payload: usize) -> usize {
    let framed = payload + YAMUX * payload.div_ceil(YAMUX_FRAME).max(1);
    let sealed = framed + NOISE * framed.div_ceil(NOISE_FRAME);
    sealed + HEADERS * sealed.div_ceil(SEGMENT)
}

/// libp2p's ping and its answer are 32 bytes.
pub(crate) fn ping() -> usize {
    flushed(32)
}

/// A field of a protobuf message: its tag, its length, its content.
fn field(content: usize) -> usize {
    1 + varint(content) + content
}

fn varint(number: usize) -> usize {
    (1..).find(|bytes| number >> (7 * bytes) == 0).unwrap_or(10)
}

/// Everything of gossipsub is a `Rpc` with its length before it.
fn rpc(content: usize) -> usize {
    flushed(varint(content) + content)
}

/// `Message`: data and topic; entries carry their author's signature themselves.
pub(crate) fn message(data: usize) -> usize {
    field(data) + field(TOPIC)
}

/// `Rpc.publish`.
pub(crate) fn publish(data: usize) -> usize {
    rpc(field(message(data)))
}

/// `Rpc.control` with one `ControlIHave`.
pub(crate) fn ihave(ids: usize) -> usize {
    rpc(field(field(field(TOPIC) + ids * field(MESSAGE_ID))))
}

/// `Rpc.control` with one `ControlIWant` or `ControlIDontWant`.
pub(crate) fn iwant(ids: usize) -> usize {
    rpc(field(field(ids * field(MESSAGE_ID))))
}

/// `Rpc.control` with one `ControlGraft`, or `ControlPrune` with its back-off, or a subscription.
pub(crate) fn graft() -> usize {
    rpc(field(field(field(TOPIC) + 2)))
}

/// A message's own encoding.
pub(crate) fn of_gossip(message: &Gossip) -> usize {
    let token = if matches!(message, Gossip::Introduction(_)) { TOKEN } else { 0 };
    encoded(message) + token
}

/// What a message is known by.
pub(crate) fn message_id(message: &Gossip) -> Digest {
    let bytes = bincode::serde::encode_to_vec(message, bincode::config::standard()).expect("it can be encoded");
    Digest::of(&bytes)
}

/// A question on the wire.
pub(crate) fn of_question(question: &SyncRequest) -> usize {
    flushed(encoded(question)) + STREAM_OVERHEAD
}

/// A reply on the wire.
pub(crate) fn of_reply(reply: &SyncReply) -> usize {
    let tokens = if let SyncReply::Introductions(them, _) = reply { TOKEN * them.len() } else { 0 };
    flushed(encoded(reply) + tokens) + STREAM_OVERHEAD
}

fn encoded(message: &impl Serialize) -> usize {
    let config = bincode::config::standard();
    FRAME + bincode::serde::encode_into_std_write(message, &mut std::io::sink(), config).expect("it can be encoded")
}

/// What one direction of a connection has received and not acknowledged. Linux waits 40 ms for data to send along with it, but never
/// longer than until a full segment more has come.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Unacknowledged {
    since: Option<u64>,
    bytes: usize,
}

/// In microseconds.
const DELAYED_ACK: u64 = 40_000;

impl Unacknowledged {
    /// So many bytes came. Returns how many bare acknowledgements have been sent until now.
    pub(crate) fn received(&mut self, bytes: usize, now: u64) -> usize {
        let late = self.settle(now);
        self.bytes += bytes;
        let at_once = self.bytes / (SEGMENT + HEADERS + 1);
        if at_once > 0 {
            // One for each two segments.
            let acks = at_once.div_ceil(2);
            *self = Self::default();
            return late + acks;
        }
        self.since.get_or_insert(now);
        late
    }

    /// Data goes the other way, and the acknowledgement with it.
    pub(crate) fn sent(&mut self, now: u64) -> usize {
        let late = self.settle(now);
        *self = Self::default();
        late
    }

    fn settle(&mut self, now: u64) -> usize {
        let due = self.since.is_some_and(|since| since + DELAYED_ACK <= now);
        if due {
            *self = Self::default();
        }
        usize::from(due)
    }
}
