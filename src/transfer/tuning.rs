//! How the transport is set, and where each number comes from.

use std::sync::Arc;
use std::time::Duration;

use quinn::{ClientConfig, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig, TransportConfig, VarInt};

use super::congestion::DelayBounded;
use super::tls::Tls;
use crate::wire::{Hello, Message};

/// Bytes that fetched chunks gather to before the sink is called, so that the call costs nothing per byte; measured,
/// writes of 256 KiB and more make no difference any more.
pub(super) const BATCH: usize = 512 << 10;

/// Chunks in a batch at most. A chunk is what came in one packet, 1.4 KiB as a rule or more; this is room for packets of half
/// the size, and bounds what a sender of tiny ones makes us hold.
pub(super) const BATCH_CHUNKS: usize = 768;

/// The same for pieces, whose sink hashes each batch as it gets it: what is hashed is still in the processor's cache.
pub(super) const PIECE_BATCH: usize = 128 << 10;

/// Bytes of a state in a list.
pub(super) const STATE_BYTES: usize = 32;

/// Bytes read from the store at a time; one such read is ahead of the one being sent.
pub(super) const READ_BYTES: usize = 256 << 10;

/// Blobs whose pieces a peer may follow on a connection: the layers of five recoveries at a time, a dozen each. Each costs a task that sleeps and
/// a bit a piece, 16 KiB at most.
pub(super) const MAX_FOLLOWED: usize = 64;

/// Streams that an admitted peer may have open on a connection: what it follows, and as many again for orders ([`BLOBS_PER_PEER`]), lists and
/// questions of the same recoveries.
pub(super) const MAX_STREAMS: u32 = 2 * MAX_FOLLOWED as u32;

/// Orders for one blob that are sent at a time. Few, so that each is done soon and what it brought is passed on by whoever got it; with four, those
/// that wait for their receivers hold others up (simulated at 250 nodes: 1.39 times the best for four, 1.30 for eight, the same for sixteen).
pub(super) const SLOTS_PER_BLOB: usize = 8;

/// An upload that moves less than [`READ`] in this time does not count as one. 2 Mbit/s: a node that uploads at 1 Gbit/s to as many as it has slots for
/// moves 30 times as much to each.
pub(super) const UPLOAD_STALL: Duration = Duration::from_secs(1);

/// News of pieces gather so long before they are told: a sixth of the shortest time after which whoever waits for a piece asks
/// somebody else too, and twenty messages a second and follower at most.
pub(super) const PIECE_MAP_INTERVAL: Duration = Duration::from_millis(50);

/// From one word of a peer to the next that is read, however fast it talks: five times as often as an honest one does. What it says meanwhile waits in
/// the stream's window, and then at its own end.
pub(super) const MIN_PIECE_MAP_INTERVAL: Duration = Duration::from_millis(10);

/// 10 Gbit/s for 1.6 ms, a zone's round trip with some queueing, and several streams of a connection bring pieces at a time. At 1 Gbit/s over 20 ms one
/// stream takes 0.56 of the link with this (with BBR 0.51, and 0.66 with 4 MiB, 0.69 with 8); on loopback 2, 4 and 8 MiB are equally fast (`links_far` and `links_loopback` of the
/// benchmark, as all figures here). Not more: what is not read yet is memory, 16 blobs at a time, and above 2048 packets of one stream quinn copies
/// them together (`COMPACT_THRESHOLD`), which 3 MB in packets of 1452 bytes are.
const STREAM_WINDOW: u32 = 2 << 20;

/// Blobs fetched from one peer at a time; a further one waits. One fills any link, and more than the connection's windows have room for
/// would starve each other: quinn gives what becomes free to whichever stream asks first, with ten on a slow link always to the same.
pub(super) const BLOBS_PER_PEER: usize = 4;

/// Every stream's window, so that no stream ever waits for another's, and one more for small blobs and for what was read but is not
/// reported yet (an eighth of the window).
const CONNECTION_WINDOW: u32 = (BLOBS_PER_PEER as u32 + 1) * STREAM_WINDOW;

/// What may be unacknowledged on a connection: all that the other end's windows let through, for the same reason.
const SEND_WINDOW: u64 = CONNECTION_WINDOW as u64;

/// A served peer sends us a [`Hello`] and then requests of at most 518 bytes, which are read at once.
const REQUEST_WINDOW: u32 = 2 * Hello::LIMIT as u32;

/// A node is in the same cluster, so 50 ms is long; the specification's 333 ms would make the first lost packet cost a
/// second. What comes after the handshake is as fast with either.
const INITIAL_RTT: Duration = Duration::from_millis(50);

/// Bytes in a packet at most; what a path carries is probed for, up to this. Where the network has frames of 9000 bytes a byte of an
/// image costs two thirds of the processor time that it costs in packets of 1452, the payload of an Ethernet frame of 1500 under IPv6 and UDP
/// (`image_memory` and `image_memory_jumbo` of the benchmark).
///
/// Not more: quinn gives the kernel ten packets at a time (`MAX_TRANSMIT_SEGMENTS`), which together must fit into what one of IP can be,
/// 65 535 bytes with its headers. Ten that do not are refused (`EMSGSIZE`) and count as lost.
const MAX_MTU: u16 = 6500;
const _: () = assert!(10 * MAX_MTU as usize + 48 <= u16::MAX as usize, "ten packets, and the headers of IPv6 and UDP");

/// The dialler keeps a connection alive while it is in the pool (see [`Limits::unused`]).
const KEEP_ALIVE: Duration = Duration::from_secs(1);

/// In milliseconds; five keep-alives lost, each of which was sent again several times meanwhile. The wait begins anew with the first of
/// them, so a dead peer is noticed within six seconds: before [`Limits::stall`], which would have to assume that it lives.
const IDLE_TIMEOUT_MS: u32 = 5000;

/// How long we wait, for what.
#[derive(Debug, Clone, Copy)]
pub(super) struct Timeouts {
    /// For the handshake of a connection that we dial. Four lost packets at [`INITIAL_RTT`].
    pub(super) dial: Duration,
    /// For a stranger's handshake and its `Hello`.
    pub(super) hello: Duration,
    /// For our admission to decide about a stranger (it may ask the API server).
    pub(super) admission: Duration,
    /// For the answer to a request: the other end's store may have to spin up a disk.
    pub(super) answer: Duration,
    /// For the next [`FLOOR`] bytes of a blob.
    pub(super) stall: Duration,
    /// For a reader to take [`READ`] bytes. A fetcher gives up below [`FLOOR`] in [`Limits::stall`], which makes four
    /// times 10 s; only one that does not read at all, or reads slower than it would itself put up with, gets here.
    pub(super) slow_reader: Duration,
    /// A pooled connection that nobody used for so long is closed.
    pub(super) idle_connection: Duration,
    /// For streams being served to end when the agent stops.
    pub(super) drain: Duration,
}

/// A sender of fewer bytes than this per [`Limits::stall`] is given up: 6.5 KB/s, at which a 30 MB layer would take
/// more than an hour.
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

    /// For an answer at the door: all that it may take there.
    pub(super) fn handshake(&self) -> Duration {
        self.hello + self.admission
    }
}

/// For connections that we dial: they bring blobs, and the other end opens no streams.
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

/// For connections that others dial: they take blobs. One stream, for the `Hello`, until the door raises it.
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
        // Connection attempts that wait for the door to look at them: it looks at once, so a burst is all there can be.
        // A ClientHello with a post-quantum key share is two packets.
        .max_incoming(256)
        .incoming_buffer_size(8 << 10)
        .incoming_buffer_size_total(1 << 20);
    config
}

/// For the socket: the largest packets that we take.
pub(super) fn endpoint() -> EndpointConfig {
    let mut config = EndpointConfig::default();
    config.max_udp_payload_size(MAX_MTU).expect("QUIC allows 1200 and more (RFC 9000, section 18.2)");
    config
}

/// CUBIC that is told of long queues ([`DelayBounded`]), measured against CUBIC alone and BBR (README.md of the benchmarks, "Links", and `swarm8`). For it: eight nodes
/// share an image sooner and more evenly (the last one done after 1.12 to 1.16 times what its link needs; with BBR after 1.16 to 1.45), probably because
/// quinn's BBR takes the fastest sample that it ever had for the link's rate, so that chance makes each connection's window; where processors are what is
/// short (1.30 to 1.44 instead of 1.54 to 1.69); a link that it has for itself (0.92 of 1 Gbit/s instead of 0.80, the first 4 MiB after 40 ms
/// instead of 161). Against: a way of 20 ms that loses a packet in a thousand (0.09 of 1 Gbit/s instead of 0.32); a narrow place's
/// queue is filled (an echo takes 44 ms instead of 0 where the queue holds 50; but 70 instead of CUBIC's 318 where it holds a second), and 4.5 % are sent in vain there
/// in a connection's first second. What it leaves to TCP is as much as BBR leaves or more.
///
/// Acknowledgements are as RFC 9000 has them: one for 10 or for 20 packets makes the same swarm no faster (two times three runs of each, in turn). Segmentation offload is on, as quinn has it: without it a byte costs
/// three times the processor time. AES-128-GCM costs three quarters of what ChaCha20 does where the processor has AES. One endpoint
/// serves all: two of them carried 4 to 13 % more over two connections on two cores, and 15 % less when others kept the cores busy, which a second port to
/// know and to open is not worth.
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
