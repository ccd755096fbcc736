//! Who else is on the link: somebody who asks for an echo, and at times a TCP stream of the kernel's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::mpsc;
use std::thread::Scope;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::shaped_link::{self, RECEIVER, SENDER, ShapedLink};
use crate::report::BenchError;

/// How long the echoes took.
#[derive(Default)]
pub(super) struct Echoes {
    pub(super) round_trips: Vec<Duration>,
    pub(super) sent: usize,
}

/// Asked for so often.
const ECHO_INTERVAL: Duration = Duration::from_millis(20);

/// What is still under way after the connections were closed may come until then.
const LINGER: Duration = Duration::from_millis(1500);

/// Answers at the sender's end whatever is asked there, until an empty question comes.
pub(super) fn serve_echo<'scope>(
    scope: &'scope Scope<'scope, '_>,
    wire: &'scope ShapedLink,
) -> Result<SocketAddr, BenchError> {
    let (tell, told) = mpsc::channel();
    scope.spawn(move || -> Result<(), BenchError> {
        shaped_link::enter(&wire.sender)?;
        let socket = UdpSocket::bind((SENDER, 0))?;
        socket.set_read_timeout(Some(LINGER))?;
        tell.send(socket.local_addr()?)?;
        let mut question = [0; 8];
        while let Ok((length @ 1.., from)) = socket.recv_from(&mut question) {
            socket.send_to(&question[..length], from)?;
        }
        Ok(())
    });
    Ok(told.recv()?)
}

/// Asks at equal intervals, whether or not what was asked before was answered.
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
            // One that nobody listens to any more counts as lost.
            let _ = socket.send(&now.to_be_bytes());
            echoes.sent += 1;
        }
        if let Ok(8) = socket.recv(&mut answer) {
            echoes.round_trips.push(began.elapsed() - Duration::from_micros(u64::from_be_bytes(answer)));
        }
    }
}

/// Sends at the sender's end whatever a TCP stream takes, until the other end closes.
pub(super) fn serve_tcp<'scope>(
    scope: &'scope Scope<'scope, '_>,
    wire: &'scope ShapedLink,
) -> Result<SocketAddr, BenchError> {
    let (tell, told) = mpsc::channel();
    scope.spawn(move || -> Result<(), BenchError> {
        shaped_link::enter(&wire.sender)?;
        // As CUBIC, which most programs on a node use, it goes by losses, and on short ways it is as quick. Unlike it, every namespace may
        // choose it (ip-sysctl, tcp_allowed_congestion_control).
        std::fs::write("/proc/sys/net/ipv4/tcp_congestion_control", "reno")?;
        let listener = TcpListener::bind((SENDER, 0))?;
        tell.send(listener.local_addr()?)?;
        let (mut stream, _) = listener.accept()?;
        while stream.write_all(&[0x5a; 64 << 10]).is_ok() {}
        Ok(())
    });
    Ok(told.recv()?)
}

/// Takes what comes of it until told to stop; answers the bytes.
pub(super) fn receive_tcp(sender: SocketAddr, stop: &CancellationToken) -> Result<u64, BenchError> {
    let mut stream = TcpStream::connect(sender)?;
    stream.set_read_timeout(Some(ECHO_INTERVAL))?;
    let (mut taken, mut buffer) = (0, vec![0; 64 << 10]);
    while !stop.is_cancelled() {
        // Nothing may come for a while.
        taken += stream.read(&mut buffer).unwrap_or(0) as u64;
    }
    Ok(taken)
}
