//! The UDP socket, with buffers for the packets that arrive while the runtime is busy.

use std::io;
use std::net::{SocketAddr, UdpSocket};

use nix::sys::socket::{setsockopt, sockopt};
use socket2::{Domain, Protocol, Socket, Type};

/// Bytes that the kernel buffers while the runtime is busy with one batch. Hashing and writing 512
/// KiB takes up to a millisecond, in which 10 Gbit/s bring 1.25 MB. The kernel counts its own
/// overhead (about as much again) against the buffer, and doubles the requested size for that
/// reason (socket(7), SO_RCVBUF). Twice that for a late wake-up.
const BUFFER: usize = 4 << 20;

/// Binds the socket. `[::]` accepts IPv4 as well.
pub(super) fn bind(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    if address.is_ipv6() {
        socket.set_only_v6(!address.ip().is_unspecified())?;
    }
    enlarge(&socket)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// CAP_NET_ADMIN, which a privileged agent has, lifts the limit of the node (212 992 bytes by
/// default).
fn enlarge(socket: &Socket) -> io::Result<()> {
    if setsockopt(socket, sockopt::RcvBufForce, &BUFFER).is_err() {
        socket.set_recv_buffer_size(BUFFER)?;
    }
    if setsockopt(socket, sockopt::SndBufForce, &BUFFER).is_err() {
        socket.set_send_buffer_size(BUFFER)?;
    }
    let (receive, send) = (socket.recv_buffer_size()?, socket.send_buffer_size()?);
    if receive < BUFFER || send < BUFFER {
        tracing::warn!(
            receive,
            send,
            wanted = BUFFER,
            "the kernel caps the socket's buffers, so fast transfers will lose packets: raise net.core.rmem_max and \
             net.core.wmem_max, or give the agent CAP_NET_ADMIN"
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unspecified_ipv6_address_takes_ipv4_too() {
        let socket = bind("[::]:0".parse().unwrap()).unwrap();
        socket.set_nonblocking(false).unwrap();
        let port = socket.local_addr().unwrap().port();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"x", ("127.0.0.1", port)).unwrap();
        socket.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        assert_eq!(socket.recv_from(&mut [0; 8]).unwrap().0, 1);
    }
}
