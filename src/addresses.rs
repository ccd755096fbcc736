//! Which IP addresses this node has.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};

/// Reserved for documentation (RFC 5737 and RFC 3849), so no node has them.
const NO_NODE_HAS: [IpAddr; 2] =
    [IpAddr::V4(Ipv4Addr::new(203, 0, 113, 1)), IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1))];

/// Whether this node has the address: only then can a socket have it. Every address of 127.0.0.0/8
/// is the node's. Where `ip_nonlocal_bind` is set any address can be bound, so a bind proves
/// nothing and the answer is no.
pub fn is_of_this_node(address: IpAddr) -> bool {
    let can_bind = |address: IpAddr| UdpSocket::bind((address, 0)).is_ok();
    let no_node_has = NO_NODE_HAS.iter().filter(|other| other.is_ipv4() == address.is_ipv4());
    can_bind(address) && !no_node_has.copied().any(can_bind)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_addresses_of_this_machine_are_of_this_node() {
        assert!(is_of_this_node([127, 0, 0, 1].into()));
        assert!(!is_of_this_node([198, 51, 100, 1].into()), "TEST-NET-2");
    }
}
