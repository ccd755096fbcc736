//! The kernel's socket diagnostics over netlink: lists TCP sockets, and ends one.
//!
//! Formats: `linux/netlink.h`, `linux/inet_diag.h`, `linux/tcp.h`, in the machine's byte order
//! except for ports and addresses. The crates for these messages lack the cgroup and
//! `SOCK_DESTROY`, so this file encodes the two requests and decodes the one response.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use netlink_sys::protocols::NETLINK_SOCK_DIAG;
use netlink_sys::{Socket, SocketAddr as NetlinkAddress};
use nix::errno::Errno;

use crate::decide::stalled_connections::{TcpConnection, TcpConnections};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP: u16 = 0x300;

const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IPPROTO_TCP: u8 = 6;
const ESTABLISHED: u8 = 1;
const LISTEN: u8 = 10;
/// `INET_DIAG_INFO`: `struct tcp_info`.
const TCP_INFO: u16 = 2;
/// `INET_DIAG_CGROUP_ID`, from Linux 5.9 on.
const CGROUP_ID: u16 = 21;

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_msg`.
const MESSAGE: usize = 72;

/// Most answers of one listing: 65 536 sockets, a range of local ports, at ten or more sockets in
/// each answer of the kernel.
const MAX_ANSWERS: usize = 6_600;

/// Lists the TCP sockets of this network namespace that a process of the cgroup created.
pub(super) fn list(cgroup: u64) -> io::Result<TcpConnections> {
    let mut connections = TcpConnections::default();
    for family in [AF_INET, AF_INET6] {
        let socket = connect()?;
        socket.send(&request(SOCK_DIAG_BY_FAMILY, NLM_F_DUMP, family, 1 << ESTABLISHED | 1 << LISTEN, &[0; 48]), 0)?;
        let mut done = false;
        for _ in 0..MAX_ANSWERS {
            let (answer, _) = socket.recv_from_full()?;
            done = read(&answer, cgroup, &mut connections)?;
            if done {
                break;
            }
        }
        if !done {
            return Err(io::Error::other("the list of sockets does not end"));
        }
    }
    Ok(connections)
}

/// Ends a connection; `false` for a missing socket.
pub(super) fn destroy(connection: &TcpConnection) -> io::Result<bool> {
    let family = if connection.local.is_ipv4() { AF_INET } else { AF_INET6 };
    let socket = connect()?;
    socket.send(&request(SOCK_DESTROY, NLM_F_ACK, family, u32::MAX, &socket_id(connection)), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    match read(&answer, 0, &mut TcpConnections::default()) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The kernel answers during the request, so an empty queue is an error and no reason to wait.
fn connect() -> io::Result<Socket> {
    let socket = Socket::new(NETLINK_SOCK_DIAG)?;
    socket.connect(&NetlinkAddress::new(0, 0))?;
    socket.set_non_blocking(true)?;
    Ok(socket)
}

/// A `struct nlmsghdr` and a `struct inet_diag_req_v2`.
fn request(kind: u16, flags: u16, family: u8, states: u32, socket_id: &[u8; 48]) -> Vec<u8> {
    const LENGTH: u32 = 16 + 8 + 48;
    let mut bytes = Vec::with_capacity(LENGTH as usize);
    bytes.extend(LENGTH.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
    // Sequence number and port: each socket sends one request.
    bytes.extend([0; 8]);
    bytes.extend([family, IPPROTO_TCP, 1 << (TCP_INFO - 1), 0]);
    bytes.extend(states.to_ne_bytes());
    bytes.extend(socket_id);
    bytes
}

/// `struct inet_diag_sockid`: ports, addresses of 16 bytes, interface, cookie.
fn socket_id(connection: &TcpConnection) -> [u8; 48] {
    let TcpConnection { local, remote, cookie, silent_for: _, unread: _ } = connection;
    let mut id = [0; 48];
    for (index, endpoint) in [local, remote].into_iter().enumerate() {
        id[2 * index..][..2].copy_from_slice(&endpoint.port().to_be_bytes());
        let field = &mut id[4 + 16 * index..];
        match endpoint.ip() {
            IpAddr::V4(address) => field[..4].copy_from_slice(&address.octets()),
            IpAddr::V6(address) => field[..16].copy_from_slice(&address.octets()),
        }
    }
    // Two words of 32 bits, the low one first, whatever the machine's byte order.
    id[40..44].copy_from_slice(&(*cookie as u32).to_ne_bytes());
    id[44..].copy_from_slice(&((cookie >> 32) as u32).to_ne_bytes());
    id
}

/// Reads one answer of the kernel, which has several messages. Returns whether the answer was the
/// last.
fn read(mut answer: &[u8], cgroup: u64, connections: &mut TcpConnections) -> io::Result<bool> {
    while answer.len() >= HEADER {
        let length = word(answer, 0) as usize;
        let message = answer.get(HEADER..length).ok_or_else(|| io::Error::other("a message of netlink is cut off"))?;
        match u16::from_ne_bytes([answer[4], answer[5]]) {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = message.get(..4).map_or(0, |_| word(message, 0)) as i32;
                return if code == 0 { Ok(true) } else { Err(io::Error::from_raw_os_error(-code)) };
            }
            SOCK_DIAG_BY_FAMILY => add_socket(message, cgroup, connections),
            _ => {}
        }
        answer = answer.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// Adds a socket of this cgroup. A kernel that does not report cgroups yields no socket.
fn add_socket(message: &[u8], cgroup: u64, connections: &mut TcpConnections) {
    let Some((socket, attributes)) = message.split_at_checked(MESSAGE) else { return };
    let attributes = Attributes(attributes);
    let is_own = |value: &[u8]| value.get(..8).is_some_and(|id| id == cgroup.to_ne_bytes());
    if !attributes.clone().any(|(kind, value)| kind == CGROUP_ID && is_own(value)) {
        return;
    }
    let (family, state) = (socket[0], socket[1]);
    let endpoint = |index: usize| {
        let port = u16::from_be_bytes([socket[4 + 2 * index], socket[5 + 2 * index]]);
        let address: [u8; 16] = std::array::from_fn(|byte| socket[8 + 16 * index + byte]);
        let address = match family {
            AF_INET => IpAddr::V4(Ipv4Addr::new(address[0], address[1], address[2], address[3])),
            _ => IpAddr::V6(Ipv6Addr::from(address)),
        };
        SocketAddr::new(address, port)
    };
    if state == LISTEN {
        connections.listening.insert(endpoint(0).port());
        return;
    }
    let mut info = attributes.filter(|(kind, _)| *kind == TCP_INFO);
    let Some(silent_for) = info.next().and_then(|(_, info)| idle_time(info)) else { return };
    connections.established.push(TcpConnection {
        local: endpoint(0),
        remote: endpoint(1),
        cookie: u64::from(word(socket, 44)) | u64::from(word(socket, 48)) << 32,
        silent_for,
        unread: word(socket, 56),
    });
}

/// Time since the last sent or received data: `tcpi_last_data_sent` and `tcpi_last_data_recv` of
/// `struct tcp_info`, in milliseconds.
fn idle_time(info: &[u8]) -> Option<Duration> {
    let info = info.get(..56)?;
    Some(Duration::from_millis(word(info, 44).min(word(info, 52)).into()))
}

/// Kinds and values of `struct rtattr`.
#[derive(Clone)]
struct Attributes<'a>(&'a [u8]);

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let header = self.0.get(..4)?;
        let length = usize::from(u16::from_ne_bytes([header[0], header[1]]));
        let kind = u16::from_ne_bytes([header[2], header[3]]);
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    }
}

/// `bytes` must reach to `at + 4`.
fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((4 + value.len() as u16).to_ne_bytes());
        bytes.extend(kind.to_ne_bytes());
        bytes.extend(value);
        bytes
    }

    /// An answer about one socket, as the kernel writes it.
    fn answer(connection: &TcpConnection, state: u8, cgroup: u64) -> Vec<u8> {
        let family = if connection.local.is_ipv4() { AF_INET } else { AF_INET6 };
        let mut message = vec![family, state, 0, 0];
        message.extend(socket_id(connection));
        message.extend([0; 4]);
        message.extend(connection.unread.to_ne_bytes());
        message.extend([0; 12]);
        let mut info = [0; 232];
        let millis = (connection.silent_for.as_millis() as u32).to_ne_bytes();
        info[44..48].copy_from_slice(&(u32::MAX).to_ne_bytes());
        info[52..56].copy_from_slice(&millis);
        message.extend(attribute(TCP_INFO, &info));
        message.extend(attribute(CGROUP_ID, &cgroup.to_ne_bytes()));
        let mut bytes = Vec::new();
        bytes.extend(((HEADER + message.len()) as u32).to_ne_bytes());
        bytes.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        bytes.extend([0; 10]);
        bytes.extend(message);
        bytes
    }

    fn connection(local: &str, remote: &str) -> TcpConnection {
        let (local, remote) = (local.parse().unwrap(), remote.parse().unwrap());
        TcpConnection { local, remote, cookie: 0x1_0000_0002, silent_for: Duration::from_millis(1500), unread: 3 }
    }

    #[test]
    fn sockets_of_another_cgroup_are_left_out() {
        let v4 = connection("10.0.0.7:40000", "192.0.2.1:443");
        let v6 = connection("[2001:db8::7]:40001", "[2001:db8::1]:5000");
        let mut bytes = answer(&v4, ESTABLISHED, 77);
        bytes.extend(answer(&connection("10.0.0.7:40002", "192.0.2.2:443"), ESTABLISHED, 78));
        bytes.extend(answer(&v6, ESTABLISHED, 77));
        bytes.extend(answer(&connection("127.0.0.1:35000", "0.0.0.0:0"), LISTEN, 77));
        let mut connections = TcpConnections::default();
        assert!(!read(&bytes, 77, &mut connections).unwrap());
        assert_eq!(connections, TcpConnections { established: vec![v4, v6], listening: [35_000].into() });
    }

    #[test]
    fn a_cut_off_answer_and_an_error_are_reported() {
        let bytes = answer(&connection("10.0.0.7:40000", "192.0.2.1:443"), ESTABLISHED, 77);
        for length in HEADER..bytes.len() {
            assert!(read(&bytes[..length], 77, &mut TcpConnections::default()).is_err(), "{length}");
        }
        let mut message = 20u32.to_ne_bytes().to_vec();
        message.extend(NLMSG_ERROR.to_ne_bytes());
        message.extend([0; 10]);
        message.extend((-(Errno::EPERM as i32)).to_ne_bytes());
        let error = read(&message, 77, &mut TcpConnections::default()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    }
}
