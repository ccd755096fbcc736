//! Subnets of addresses, for limits.

use std::net::{IpAddr, Ipv6Addr};

/// A host on an IPv6 link may take any address of the link's prefix, which has 64 bits (RFC 4291,
/// section 2.5.1), and another for each connection.
const PREFIX: u32 = 64;

/// The addresses that one host may choose from: an IPv6 prefix of 64 bits, or a single IPv4
/// address.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Subnet(IpAddr);

impl Subnet {
    /// The subnet of this address.
    pub fn of(address: IpAddr) -> Self {
        Self(match address.to_canonical() {
            IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & (u128::MAX << (128 - PREFIX))).into(),
            address => address,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn subnet(address: &str) -> Subnet {
        Subnet::of(address.parse().unwrap())
    }

    #[test]
    fn ipv6_addresses_of_one_prefix_are_one_subnet() {
        assert_eq!(subnet("2001:db8:0:1::1"), subnet("2001:db8:0:1:ffff:ffff:ffff:ffff"));
        assert_ne!(subnet("2001:db8:0:1::1"), subnet("2001:db8:0:2::1"));
    }

    #[test]
    fn an_ipv4_address_is_a_subnet_of_its_own() {
        assert_ne!(subnet("10.0.0.1"), subnet("10.0.0.2"));
        assert_ne!(subnet("::ffff:10.0.0.1"), subnet("::ffff:10.0.0.2"), "mapped addresses share a prefix");
        assert_eq!(subnet("::ffff:10.0.0.1"), subnet("10.0.0.1"));
    }
}
