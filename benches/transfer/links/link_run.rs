//! A run over a link: connections that read as fast as possible for some time, and echo requests
//! beside them.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;
use nix::sys::resource::UsageWho;
use quinn::{ClientConfig, Connection, ConnectionStats, Endpoint, Runtime as _, ServerConfig, TokioRuntime};
use tokio::runtime::{Builder, Runtime};
use tokio_util::sync::CancellationToken;

use super::background_traffic::{Echoes, receive_tcp, send_echoes, serve_echo, serve_tcp};
use super::delayed_socket::{DelayedSocket, Distance};
use super::shaped_link::{self, RECEIVER, SENDER, ShapedLink};
use crate::cpu;
use crate::quinn_setting::QuinnSetting;
use crate::report::{BenchError, median};

/// A link, and the traffic on the link.
#[derive(Clone, Copy)]
pub(super) struct LinkCase {
    pub(super) name: &'static str,
    pub(super) mbit_s: u32,
    /// Waiting time of a packet in a full queue.
    pub(super) queue_ms: u32,
    /// Delay that the path adds to a round trip. The link alone takes a twentieth of a millisecond.
    pub(super) round_trip_ms: u64,
    /// Lost packets per million, in each direction.
    pub(super) lost: u32,
    pub(super) connections: usize,
    /// Streams on each connection.
    pub(super) streams: usize,
    pub(super) read_pattern: ReadPattern,
    /// Whether a TCP stream of the kernel sends as much as possible beside.
    pub(super) tcp: bool,
    pub(super) seconds: f64,
}

/// The order in which content is read.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum ReadPattern {
    /// Streams are read without pause.
    Stream,
    /// A piece is read, and after a pause the next piece.
    Pieces,
}

/// Pause after each piece.
const PAUSE: Duration = Duration::from_millis(100);

/// The result of a run.
pub(super) struct LinkRun {
    /// Bytes of content that each connection received.
    pub(super) received: Vec<u64>,
    /// Time from a request until [`PIECE`] bytes have arrived: for the first connection's first
    /// piece, or the median of several pieces. `None` if no piece arrived.
    pub(super) piece: Option<Duration>,
    /// Bytes of the TCP stream.
    pub(super) tcp: u64,
    pub(super) sent: Vec<ConnectionStats>,
    pub(super) cpu: Duration,
    pub(super) echoes: Echoes,
}

/// Requests on a stream.
const ENDLESS: &[u8] = b"!";
const ONE_PIECE: &[u8] = b"1";

/// Size of a piece of a large blob.
const PIECE: u64 = 4 << 20;

/// Makes the link and runs all traffic for the case's time. The seed decides which packets are
/// lost.
pub(super) fn run_case(case: &LinkCase, setting: &QuinnSetting, seed: u64) -> Result<LinkRun, BenchError> {
    let link = ShapedLink::new(case.mbit_s, case.queue_ms)?;
    let distance = Distance { delay: Duration::from_micros(case.round_trip_ms * 500), lost: case.lost };
    let (server, client) = setting.configs()?;
    let stop = CancellationToken::new();
    let before = cpu::spent(UsageWho::RUSAGE_SELF)?;
    thread::scope(|scope| {
        // When a thread fails, the other threads stop waiting.
        let _ending = stop.clone().drop_guard();
        let (link, setting, stop) = (&link, &setting, &stop);
        let (address_sender, address_receiver) = mpsc::channel();
        let sending = scope.spawn(move || -> Result<Vec<ConnectionStats>, BenchError> {
            shaped_link::enter(&link.sender)?;
            let runtime = runtime()?;
            let endpoint = bind(&runtime, setting, SENDER, distance, seed, Some(server))?;
            address_sender.send(endpoint.local_addr()?)?;
            runtime.block_on(serve(&endpoint, stop, case.connections, setting.chunk << 10))
        });
        let address = address_receiver.recv()?;
        let echo = serve_echo(scope, link)?;
        let echo_client = scope.spawn(move || -> Result<Echoes, BenchError> {
            shaped_link::enter(&link.receiver)?;
            send_echoes(echo, stop)
        });
        let stream = if case.tcp { Some(serve_tcp(scope, link)?) } else { None };
        let tcp_reader = stream.map(|sender| {
            scope.spawn(move || -> Result<u64, BenchError> {
                shaped_link::enter(&link.receiver)?;
                receive_tcp(sender, stop)
            })
        });
        let receiving = scope.spawn(move || -> Result<_, BenchError> {
            shaped_link::enter(&link.receiver)?;
            let runtime = runtime()?;
            let mut endpoints = Vec::new();
            for number in 1..=case.connections {
                endpoints.push(bind(&runtime, setting, RECEIVER, distance, seed + number as u64, None)?);
            }
            runtime.block_on(async {
                let connections = connect(&endpoints, &client, address).await?;
                match case.read_pattern {
                    ReadPattern::Stream => read_streams(&connections, case).await,
                    ReadPattern::Pieces => read_pieces(&connections[0], case).await,
                }
            })
        });
        // The panic message is already printed.
        let received = receiving.join().map_err(|_| "the receiver panicked")?;
        stop.cancel();
        let echoes = echo_client.join().map_err(|_| "the echo client panicked")??;
        let tcp = match tcp_reader {
            Some(tcp_reader) => tcp_reader.join().map_err(|_| "the TCP reader panicked")??,
            None => 0,
        };
        let sent = sending.join().map_err(|_| "the sender panicked")??;
        let (received, piece) = received?;
        let cpu = cpu::spent(UsageWho::RUSAGE_SELF)? - before;
        Ok(LinkRun { received, piece, tcp, sent, cpu, echoes })
    })
}

fn runtime() -> Result<Runtime, BenchError> {
    Ok(Builder::new_current_thread().enable_all().build()?)
}

fn bind(
    runtime: &Runtime,
    setting: &QuinnSetting,
    address: Ipv4Addr,
    distance: Distance,
    seed: u64,
    server: Option<ServerConfig>,
) -> Result<Endpoint, BenchError> {
    let _inside = runtime.enter();
    let socket = setting.socket(address)?;
    socket.set_nonblocking(true)?;
    let mut socket = TokioRuntime.wrap_udp_socket(socket)?;
    if !distance.delay.is_zero() || distance.lost > 0 {
        socket = Arc::new(DelayedSocket::new(socket, distance, seed));
    }
    let config = QuinnSetting::endpoint()?;
    Ok(Endpoint::new_with_abstract_socket(config, server, socket, Arc::new(TokioRuntime))?)
}

/// Sends on every stream until `stop`. Returns the statistics of each connection.
async fn serve(
    endpoint: &Endpoint,
    stop: &CancellationToken,
    connections: usize,
    chunk: usize,
) -> Result<Vec<ConnectionStats>, BenchError> {
    let content = Bytes::from(vec![0x5a; chunk]);
    let accepting = async {
        let mut accepted = Vec::new();
        while accepted.len() < connections {
            let connection = endpoint.accept().await.ok_or("closed")?.await?;
            tokio::spawn(send(connection.clone(), content.clone()));
            accepted.push(connection);
        }
        Ok::<_, BenchError>(accepted)
    };
    let accepted = stop.run_until_cancelled(accepting).await.unwrap_or_else(|| Ok(Vec::new()))?;
    stop.cancelled().await;
    Ok(accepted.iter().map(Connection::stats).collect())
}

async fn send(connection: Connection, content: Bytes) {
    while let Ok((mut stream, mut request)) = connection.accept_bi().await {
        let content = content.clone();
        let mut left = match request.read_to_end(1).await.as_deref() {
            Ok(ENDLESS) => u64::MAX,
            _ => PIECE,
        };
        tokio::spawn(async move {
            while left > 0 && stream.write_chunk(content.clone()).await.is_ok() {
                left = left.saturating_sub(content.len() as u64);
            }
        });
    }
}

/// Opens a connection from each endpoint.
async fn connect(
    endpoints: &[Endpoint],
    client: &ClientConfig,
    address: SocketAddr,
) -> Result<Vec<Connection>, BenchError> {
    let mut connections = Vec::new();
    for endpoint in endpoints {
        connections.push(endpoint.connect_with(client.clone(), address, "bench")?.await?);
    }
    Ok(connections)
}

/// Reads all connections for the case's time. Returns the bytes of each connection, and the time of
/// the first connection's first piece.
async fn read_streams(connections: &[Connection], case: &LinkCase) -> Result<(Vec<u64>, Option<Duration>), BenchError> {
    let began = Instant::now();
    let counters: Vec<_> = connections.iter().map(|_| Arc::new(AtomicU64::new(0))).collect();
    let (piece_sender, mut piece_receiver) = tokio::sync::mpsc::channel(1);
    for (connection, counter) in connections.iter().zip(&counters) {
        for _ in 0..case.streams {
            let (mut request_stream, mut stream) = connection.open_bi().await?;
            request_stream.write_all(ENDLESS).await?;
            request_stream.finish()?;
            let (counter, piece_sender) = (Arc::clone(counter), piece_sender.clone());
            let first = Arc::ptr_eq(&counter, &counters[0]);
            tokio::spawn(async move {
                let mut chunks = vec![Bytes::new(); 768];
                while let Ok(Some(read)) = stream.read_chunks(&mut chunks).await {
                    let bytes = chunks[..read].iter().map(|chunk| chunk.len() as u64).sum();
                    chunks[..read].fill(Bytes::new());
                    let before = counter.fetch_add(bytes, Ordering::Relaxed);
                    if first && before < PIECE && before + bytes >= PIECE {
                        // The channel has room for the single message.
                        let _ = piece_sender.try_send(began.elapsed());
                    }
                }
            });
        }
    }
    tokio::time::sleep_until((began + Duration::from_secs_f64(case.seconds)).into()).await;
    let received = counters.iter().map(|counter| counter.load(Ordering::Relaxed)).collect();
    Ok((received, piece_receiver.try_recv().ok()))
}

/// Reads pieces with pauses between them, as an agent does that has several providers.
async fn read_pieces(connection: &Connection, case: &LinkCase) -> Result<(Vec<u64>, Option<Duration>), BenchError> {
    let until = Instant::now() + Duration::from_secs_f64(case.seconds);
    let mut took = Vec::new();
    while Instant::now() < until {
        let began = Instant::now();
        let (mut request_stream, mut stream) = connection.open_bi().await?;
        request_stream.write_all(ONE_PIECE).await?;
        request_stream.finish()?;
        while stream.read_chunk(usize::MAX, true).await?.is_some() {}
        took.push(began.elapsed().as_secs_f64());
        tokio::time::sleep(PAUSE).await;
    }
    let received = took.len() as u64 * PIECE;
    Ok((vec![received], Some(Duration::from_secs_f64(median(took)))))
}
