//! Settings of the QUIC transport, and the source of each number.

use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt};

use super::congestion::DelayBounded;
use super::tls::Tls;
use crate::wire::{Hello, Message};

/// Fetched bytes per call of the sink, so that the call costs nothing per byte. Measured: writes of
/// 256 KiB and more are equally fast.
pub(super) const BATCH: usize = 512 << 10;

/// Chunks per batch at most. A chunk is the payload of one packet, 1.4 KiB or more as a rule. The
/// limit has room for packets of half that size, and bounds the memory for a sender of tiny
/// packets.
pub(super) const BATCH_CHUNKS: usize = 768;

/// The batch size for pieces. The sink hashes each batch on arrival, while the bytes are still in
/// the processor's cache.
pub(super) const PIECE_BATCH: usize = 128 << 10;

/// Bytes of one state in a hash chain.
pub(super) const STATE_BYTES: usize = 32;

/// Bytes per read from the store; one read runs ahead of the send.
pub(super) const READ_BYTES: usize = 256 << 10;

/// Blobs whose piece maps a peer may follow on one connection: a dozen layers each of five
/// recoveries at a time. Each costs a sleeping task and one bit per piece, 16 KiB at most.
pub(super) const MAX_FOLLOWED: usize = 64;

/// Streams that an admitted peer may have open on one connection: one per followed blob, and as
/// many again for pieces ([`BLOBS_PER_PEER`]), hash chains and blobs of the same recoveries.
pub(super) const MAX_STREAMS: u32 = 2 * MAX_FOLLOWED as u32;

/// Uploads of one blob at a time. With few uploads, each ends soon, and its receiver passes the
/// pieces on. With four, uploads that wait for their receivers block others. Simulated at 250
/// nodes: 1.39 times the optimum for four, 1.30 for eight, the same for sixteen.
pub(super) const SLOTS_PER_BLOB: usize = 8;

/// An upload that moves less than [`READ_BYTES`] in this time is parked. The bound is 2 Mbit/s: a
/// node that uploads at 1 Gbit/s on all its slots moves 30 times as much on each.
pub(super) const UPLOAD_STALL: Duration = Duration::from_secs(1);

/// Batching interval of piece map updates to followers: a sixth of the shortest time after which a
/// fetcher sends a hedged request. The interval allows twenty messages a second and follower.
pub(super) const PIECE_MAP_INTERVAL: Duration = Duration::from_millis(50);

/// Minimum interval between two piece map updates that are read from one peer: five times the rate
/// of an honest peer. Further updates wait in the stream's window, then at the sender.
pub(super) const MIN_PIECE_MAP_INTERVAL: Duration = Duration::from_millis(10);

/// 10 Gbit/s for 1.6 ms: a zone's round trip with some queueing, while several streams of a
/// connection carry pieces. At 1 Gbit/s over 20 ms one stream takes 0.56 of the link with this
/// window (0.51 with BBR; 0.66 with 4 MiB and 0.69 with 8). On loopback 2, 4 and 8 MiB are equally
/// fast. The figures are `links_far` and `links_loopback` of the benchmark.
///
/// A larger window costs more memory for unread bytes, for 16 blobs at a time. Above 2048 packets
/// of one stream quinn also copies them together (`COMPACT_THRESHOLD`); 3 MB in packets of 1452
/// bytes are that many.
const STREAM_WINDOW: u32 = 2 << 20;

/// Blobs fetched from one peer at a time; further fetches wait. One blob fills any link. More blobs
/// than the connection's window has room for would starve each other: quinn gives freed window to
/// the stream that writes first, with ten streams on a slow link always to the same stream.
pub(super) const BLOBS_PER_PEER: usize = 4;

/// One window for every stream, so that no stream waits for another. A further window is for small
/// blobs and for bytes that were read but are not reported yet (an eighth of the window).
const CONNECTION_WINDOW: u32 = (BLOBS_PER_PEER as u32 + 1) * STREAM_WINDOW;

/// Unacknowledged bytes on a connection: all that the receiver's windows let through, for the same
/// reason.
const SEND_WINDOW: u64 = CONNECTION_WINDOW as u64;

/// A served peer sends a [`Hello`] and then requests of at most 518 bytes, which are read at once.
const REQUEST_WINDOW: u32 = 2 * Hello::LIMIT as u32;

/// A peer is in the same cluster, so 50 ms is long. With the 333 ms of RFC 9002 the first lost
/// packet would cost a second. The transfer after the handshake is as fast with either.
const INITIAL_RTT: Duration = Duration::from_millis(50);

/// Largest packet, in bytes; path MTU discovery probes up to this size. With frames of 9000 bytes,
/// a byte of an image costs two thirds of the processor time that the byte costs in packets of
/// 1452. 1452 is the payload of an Ethernet frame of 1500 bytes under IPv6 and UDP (`image_memory`
/// and `image_memory_jumbo` of the benchmark).
///
/// quinn hands the kernel ten packets at a time (`MAX_TRANSMIT_SEGMENTS`). The ten must fit into
/// one IP packet of 65 535 bytes, headers included. The kernel refuses a larger batch (`EMSGSIZE`),
/// and quinn counts the packets as lost.
const MAX_MTU: u16 = 6500;
const _: () = assert!(10 * MAX_MTU as usize + 48 <= u16::MAX as usize, "ten packets and their headers fit into one");

/// The dialer keeps a pooled connection alive (see [`Timeouts::idle_connection`]).
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// In milliseconds: five lost keep-alives, each retransmitted several times. The timer restarts
/// with the first of the five, so a dead peer is detected within six seconds. [`Timeouts::stall`]
/// is longer, because a stalled peer may be alive.
const IDLE_TIMEOUT_MS: u32 = 5000;

#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// For the handshake of a dialed connection. Four lost packets at [`INITIAL_RTT`].
    pub(super) dial: Duration,
    /// For the handshake and the `Hello` of an unauthenticated connection.
    pub(super) hello: Duration,
    /// For our verdict about a peer; admission may send a TokenReview to the API server.
    pub(super) admission: Duration,
    /// For the answer to a request: the provider's disk may have to spin up.
    pub(super) answer: Duration,
    /// For the next [`MIN_BYTES_PER_STALL`] bytes of a blob.
    pub(super) stall: Duration,
    /// For a reader to take [`READ_BYTES`]. A fetcher gives up below [`MIN_BYTES_PER_STALL`] in
    /// [`Timeouts::stall`], which makes four times 10 s. Only a reader that does not read, or reads
    /// slower than the limit of its own fetches, exceeds this time.
    pub(super) slow_reader: Duration,
    /// An unused pooled connection is closed after this time.
    pub(super) idle_connection: Duration,
    /// For open streams to end when the agent stops.
    pub(super) drain: Duration,
}

/// A fetch of fewer bytes than this per [`Timeouts::stall`] is aborted. The bound is 6.5 KB/s, at
/// which a 30 MB layer would take more than an hour.
pub(super) const MIN_BYTES_PER_STALL: u64 = 64 << 10;

impl Timeouts {
    pub(super) const DEFAULT: Self = Self {
        dial: Duration::from_secs(3),
        hello: Duration::from_secs(5),
        admission: Duration::from_secs(5),
        answer: Duration::from_secs(10),
        stall: Duration::from_secs(10),
        slow_reader: Duration::from_secs(45),
        idle_connection: Duration::from_secs(30),
        drain: Duration::from_secs(3),
    };

    /// For the answer to our `Hello`: the listener may use both of these times.
    pub(super) fn handshake(&self) -> Duration {
        self.hello + self.admission
    }
}

/// Dialed connections receive blobs; the listener opens no streams.
pub(super) fn client(tls: &Tls) -> ClientConfig {
    let mut transport = common();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(0))
        .stream_receive_window(STREAM_WINDOW.into())
        .receive_window(CONNECTION_WINDOW.into())
        .keep_alive_interval(Some(KEEP_ALIVE));
    let mut config = ClientConfig::new(tls.client.clone());
    config.transport_config(Arc::new(transport));
    config
}

/// Accepted connections send blobs. Only one stream is allowed, for `Hello`, until the peer is
/// admitted.
pub(super) fn server(tls: &Tls) -> ServerConfig {
    let mut transport = common();
    transport
        .max_concurrent_bidi_streams(VarInt::from_u32(1))
        .stream_receive_window(REQUEST_WINDOW.into())
        .receive_window(REQUEST_WINDOW.into())
        .send_window(SEND_WINDOW);
    let mut config = ServerConfig::with_crypto(tls.server.clone());
    config
        .transport_config(Arc::new(transport))
        // Nodes keep their addresses.
        .migration(false)
        // Connection attempts that wait for the accept loop. The loop takes them at once, so only a
        // burst waits. A ClientHello with a post-quantum key share is two packets.
        .max_incoming(256)
        .incoming_buffer_size(8 << 10)
        .incoming_buffer_size_total(1 << 20);
    config
}

/// The socket accepts packets of at most [`MAX_MTU`] bytes.
pub(super) fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(MAX_MTU).expect("QUIC allows 1200 and more (RFC 9000, section 18.2)");
    config
}

/// CUBIC that counts a long queue as loss ([`DelayBounded`]), measured against CUBIC alone and BBR
/// ("Links" and `swarm8` in README.md of the benchmarks).
///
/// For this controller:
/// - Eight nodes share an image sooner and more evenly. The last one needs 1.12 to 1.16 times the
///   time of its link; with BBR 1.16 to 1.45. Probably quinn's BBR takes the fastest sample ever
///   for the rate of the link, so that chance makes the window of each connection.
/// - Where processors are scarce, the same figure is 1.30 to 1.44 instead of 1.54 to 1.69.
/// - One connection alone reaches 0.92 of 1 Gbit/s instead of 0.80, and the first 4 MiB take 40 ms
///   instead of 161.
///
/// Against:
/// - A path of 20 ms that loses a packet in a thousand: 0.09 of 1 Gbit/s instead of 0.32.
/// - The queue of a bottleneck is filled. An echo takes 44 ms instead of 0 where the queue holds 50
///   ms, and 70 ms instead of CUBIC's 318 where the queue holds a second. There 4.5 % of a
///   connection's first second are sent in vain.
///
/// TCP keeps as much of a shared link as beside BBR, or more.
///
/// Acknowledgements follow RFC 9000: one for 10 or for 20 packets makes the same swarm no faster
/// (two times three runs of each, in turn). Segmentation offload stays on, as quinn has it: without
/// offload a byte costs three times the processor time. AES-128-GCM costs three quarters of
/// ChaCha20 where the processor has AES. One endpoint serves all connections. Two endpoints carried
/// 4 to 13 % more over two connections on two cores, and 15 % less when other load kept the cores
/// busy. That gain is not worth a second port to announce and to open.
fn common() -> TransportConfig {
    let mut mtu = MtuDiscoveryConfig::default();
    mtu.upper_bound(MAX_MTU);
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_TIMEOUT_MS))))
        .initial_rtt(INITIAL_RTT)
        .mtu_discovery_config(Some(mtu))
        .congestion_controller_factory(Arc::new(DelayBounded::default()));
    transport
}
