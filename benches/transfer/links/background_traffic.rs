//! Other traffic on the link: echoes, and in some cases a TCP stream of the kernel.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::shaped_link::{self, RECEIVER, SENDER, ShapedLink};
use crate::report::BenchError;

/// The round-trip times of the echoes.
#[derive(Default)]
pub(super) struct Echoes {
    pub(super) round_trips: Vec<Duration>,
    pub(super) sent: usize,
}

/// Interval between echo requests.
const ECHO_INTERVAL: Duration = Duration::from_millis(20);

/// Time for packets in flight after the connections are closed.
const LINGER: Duration = Duration::from_millis(1500);

/// Answers echo requests at the sender's end, until an empty request arrives.
pub(super) fn serve_echo<'scope>(
    scope: &'scope Scope<'scope, '_>,
    link: &'scope ShapedLink,
) -> Result<SocketAddr, BenchError> {
    let (address_sender, address_receiver) = mpsc::channel();
    scope.spawn(move || -> Result<(), BenchError> {
        shaped_link::enter(&link.sender)?;
        let socket = UdpSocket::bind((SENDER, 0))?;
        socket.set_read_timeout(Some(LINGER))?;
        address_sender.send(socket.local_addr()?)?;
        let mut request = [0; 8];
        while let Ok((length @ 1.., from)) = socket.recv_from(&mut request) {
            socket.send_to(&request[..length], from)?;
        }
        Ok(())
    });
    Ok(address_receiver.recv()?)
}

/// Sends echo requests at equal intervals, whether or not earlier requests were answered.
pub(super) fn send_echoes(echo: SocketAddr, stop: &CancellationToken) -> Result<Echoes, BenchError> {
    let socket = UdpSocket::bind((RECEIVER, 0))?;
    socket.connect(echo)?;
    socket.set_read_timeout(Some(Duration::from_millis(1)))?;
    let began = Instant::now();
    let mut echoes = Echoes::default();
    let mut answer = [0; 8];
    let mut stopped = None;
    loop {
        if stop.is_cancelled() {
            let stopped = *stopped.get_or_insert_with(Instant::now);
            if echoes.round_trips.len() == echoes.sent || stopped.elapsed() > LINGER {
                socket.send(&[])?;
                return Ok(echoes);
            }
        } else if began.elapsed() >= ECHO_INTERVAL * u32::try_from(echoes.sent)? {
            let now = u64::try_from(began.elapsed().as_micros())?;
            // A request that no process receives counts as lost.
            let _ = socket.send(&now.to_be_bytes());
            echoes.sent += 1;
        }
        if let Ok(8) = socket.recv(&mut answer) {
            echoes.round_trips.push(began.elapsed() - Duration::from_micros(u64::from_be_bytes(answer)));
        }
    }
}

/// Sends as much as a TCP stream accepts at the sender's end, until the other end closes.
pub(super) fn serve_tcp<'scope>(
    scope: &'scope Scope<'scope, '_>,
    link: &'scope ShapedLink,
) -> Result<SocketAddr, BenchError> {
    let (address_sender, address_receiver) = mpsc::channel();
    scope.spawn(move || -> Result<(), BenchError> {
        shaped_link::enter(&link.sender)?;
        // Like CUBIC, the default of most systems, Reno reacts to losses, and is as fast at short
        // round trips. Unlike CUBIC, every namespace may choose Reno (ip-sysctl,
        // tcp_allowed_congestion_control).
        std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno")?;
        let listener = TcpListener::bind((SENDER, 0))?;
        address_sender.send(listener.local_addr()?)?;
        let (mut stream, _) = listener.accept()?;
        while stream.write_all(&[0x5a; 64 << 10]).is_ok() {}
        Ok(())
    });
    Ok(address_receiver.recv()?)
}

/// Reads the stream until `stop`, and returns the number of bytes.
pub(super) fn receive_tcp(sender: SocketAddr, stop: &CancellationToken) -> Result<u64, BenchError> {
    let mut stream = TcpStream::connect(sender)?;
    stream.set_read_timeout(Some(ECHO_INTERVAL))?;
    let (mut received, mut buffer) = (0, vec![0; 64 << 10]);
    while !stop.is_cancelled() {
        // A read may time out without data.
        received += stream.read(&mut buffer).unwrap_or(0) as u64;
    }
    Ok(received)
}
