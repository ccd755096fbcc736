//! The IP addresses of this node.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Addresses for documentation (RFC 5737 and RFC 3849), which no node has.
const DOCUMENTATION_ADDRESSES: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// Whether this node has the address: only then can a socket bind to the address. Every address of
/// 127.0.0.0/8 is local. With `ip_nonlocal_bind` a socket can bind to any address, so a bind proves
/// nothing and the result is false.
pub fn is_local_address(address: IpAddr) -> bool {
    let can_bind = |address: IpAddr| UdpSocket::bind((address, 0)).is_ok();
    let unassigned = DOCUMENTATION_ADDRESSES.iter().filter(|other| other.is_ipv4() == address.is_ipv4());
    can_bind(address) && !unassigned.copied().any(can_bind)
}

/// Whether the kernel has IPv6 and an interface has an IPv6 address. With
/// `net.ipv6.conf.all.disable_ipv6` no interface has an IPv6 address, loopback included; a socket
/// can still bind to `[::]`, and libp2p finds no address to listen on.
pub fn has_ipv6() -> bool {
    let is_empty = |list: String| list.trim().is_empty();
    let has_none = std::fs::read_to_string("/proc/net/if_inet6").is_ok_and(is_empty);
    !has_none && UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).is_ok()
}

/// Whether peers on other links can connect to the address. A link-local address means another host
/// on each link.
pub fn is_address_for_peers(address: IpAddr) -> bool {
    let is_link_local = match address {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    };
    !address.is_unspecified() && !address.is_multicast() && !is_link_local
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_this_machine_are_local() {
        assert!(is_local_address([127, 0, 0, 1].into()));
        assert!(!is_local_address([198, 51, 100, 1].into()), "TEST-NET-2");
    }

    #[test]
    fn a_link_local_address_is_not_for_peers() {
        let is_for_peers = |address: &str| is_address_for_peers(address.parse().unwrap());
        assert!(["10.0.0.1", "127.0.0.1", "fd77::11", "2001:db8::1", "::1"].into_iter().all(is_for_peers));
        assert!(!["169.254.1.1", "fe80::1", "0.0.0.0", "::", "224.0.0.1", "ff02::1"].into_iter().any(is_for_peers));
    }
}
