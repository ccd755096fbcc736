//! Bytes of a message on a node's link, Ethernet headers included, as a network interface counts
//! them.
//!
//! The connections are TCP without Nagle's algorithm, noise, yamux, and libp2p's protocols. Each
//! message is flushed, so each is a noise frame and a packet of its own.

use lighterman::model::{Gossip, SyncReply, SyncRequest};
use lighterman::oci::Digest;
use serde::Serialize;

/// Ethernet 14, IPv4 20, TCP 20 with 12 of timestamps.
const HEADERS: usize = 14 + 20 + 32;

/// Payload of an Ethernet frame of 1500 bytes, without the IPv4 and TCP headers.
const SEGMENT: usize = 1500 - 20 - 32;

/// Size of a yamux header. A message is split into frames of 16 KiB (yamux's `split_send_size`).
const YAMUX: usize = 12;
const YAMUX_FRAME: usize = 16 << 10;

/// A noise frame has a length of 2 bytes and an authentication code of 16, for at most 64 511 bytes
/// (libp2p-noise's `MAX_FRAME_LEN`).
const NOISE: usize = 2 + 16;
const NOISE_FRAME: usize = 64_511;

/// An acknowledgement without data.
pub(crate) const ACK: usize = HEADERS;

/// Header of `lighterman::wire` frames: length and version.
const FRAME: usize = 6;

/// A ServiceAccount token that is bound to a pod and names the node has 1.2 to 1.4 KB. Simulated
/// tokens have a few bytes, so that a million of them fit into memory. This difference is added to
/// each message with a token.
const TOKEN: usize = 1300;

/// Length of the gossipsub topic's name.
const TOPIC: usize = "lighterman/mesh/1".len();

/// A gossipsub message ID: a truncated hash of the content.
const MESSAGE_ID: usize = 20;

/// Bytes to open a connection, in one direction. TCP's handshake has 74 bytes and two bare
/// acknowledgements. The multistream negotiation of noise and yamux has four packets of 20 to 40
/// bytes, noise XX messages of 32, 64, and 200 with the identity. The streams of ping and gossip
/// need three packets of 50 bytes each. In sum: a dozen packets and 600 bytes.
pub(crate) const CONNECTING: usize = 12 * HEADERS + 600;

/// Bytes of the QUIC handshake, in one direction: the first flight padded to 1200, a certificate of
/// 500, the Hello with its token, and four small packets. UDP headers are 42 bytes.
pub(crate) const QUIC_HANDSHAKE: usize = 1200 + 500 + TOKEN + 8 * 42 + 200;

/// A request uses a stream of its own: multistream's header and the protocol's name (40 bytes), the
/// confirmation by the other side, and the end of the stream. Each is a packet. In one direction.
pub(crate) const STREAM_OVERHEAD: usize = 2 * (HEADERS + NOISE + YAMUX) + 40;

/// One flush of this payload on one stream.
pub(crate) fn flushed(payload: usize) -> usize {
    let framed = payload + YAMUX * payload.div_ceil(YAMUX_FRAME).max(1);
    let sealed = framed + NOISE * framed.div_ceil(NOISE_FRAME);
    sealed + HEADERS * sealed.div_ceil(SEGMENT)
}

/// libp2p's pings and answers have 32 bytes.
pub(crate) fn ping() -> usize {
    flushed(32)
}

/// A field of a protobuf message: tag, length, content.
fn field(content: usize) -> usize {
    1 + varint(content) + content
}

fn varint(number: usize) -> usize {
    (1..).find(|bytes| number >> (7 * bytes) == 0).unwrap_or(10)
}

/// Each gossipsub frame is an `Rpc` with a length prefix.
fn rpc(content: usize) -> usize {
    flushed(varint(content) + content)
}

/// `Message`: data and topic. gossipsub adds no signature, because log entries are signed by their
/// author.
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

/// The size of a message's own encoding.
pub(crate) fn of_gossip(message: &Gossip) -> usize {
    let token = if matches!(message, Gossip::Introduction(_)) { TOKEN } else { 0 };
    encoded(message) + token
}

/// Identifies a message by its content.
pub(crate) fn message_id(message: &Gossip) -> Digest {
    let bytes =
        bincode::serde::encode_to_vec(message, bincode::config::standard()).expect("the message can be encoded");
    Digest::of(&bytes)
}

/// Bytes of a request on the link.
pub(crate) fn of_request(request: &SyncRequest) -> usize {
    flushed(encoded(request)) + STREAM_OVERHEAD
}

/// Bytes of a reply on the link.
pub(crate) fn of_reply(reply: &SyncReply) -> usize {
    let tokens = if let SyncReply::Introductions(introductions, _) = reply { TOKEN * introductions.len() } else { 0 };
    flushed(encoded(reply) + tokens) + STREAM_OVERHEAD
}

fn encoded(message: &impl Serialize) -> usize {
    let config = bincode::config::standard();
    FRAME
        + bincode::serde::encode_into_std_write(message, &mut std::io::sink(), config)
            .expect("the message can be encoded")
}

/// Received bytes of one direction that are not acknowledged. Linux delays an acknowledgement for
/// up to 40 ms to send it along with data, and sends it at once when a second full segment arrives.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Unacknowledged {
    since: Option<u64>,
    bytes: usize,
}

/// Longest delay of an acknowledgement, in microseconds.
const DELAYED_ACK: u64 = 40_000;

impl Unacknowledged {
    /// Records received bytes. Returns the number of bare acknowledgements sent up to now.
    pub(crate) fn received(&mut self, bytes: usize, now: u64) -> usize {
        let late = self.settle(now);
        self.bytes += bytes;
        let at_once = self.bytes / (SEGMENT + HEADERS + 1);
        if at_once > 0 {
            // A single acknowledgement covers two segments.
            let acks = at_once.div_ceil(2);
            *self = Self::default();
            return late + acks;
        }
        self.since.get_or_insert(now);
        late
    }

    /// Records that data is sent in the other direction, with the acknowledgement. Returns the
    /// number of bare acknowledgements sent before.
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
