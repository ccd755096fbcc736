//! Limits of the TCP connections to an unauthenticated listener. Connections from the node itself
//! have a limit of their own, so other connections never take the place of a kubelet's probe.

use std::collections::BTreeMap;
use std::net::IpAddr;

use super::subnet::Subnet;

/// The origin of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// From an address of this node: the kubelet, and other processes in the node's network
    /// namespace.
    Node,
    /// From any other address, pods of this node included.
    Elsewhere,
}

/// Limits of concurrently open connections.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConnectionLimits {
    /// From this node.
    pub node: usize,
    /// From all other addresses together.
    pub elsewhere: usize,
    /// From any one address.
    pub address: usize,
    /// From any one IPv6 subnet, whose hosts may choose among 2^64 addresses. Well above `address`,
    /// because nodes and the pods of a node share a subnet.
    pub subnet: usize,
}

/// Why a connection is rejected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ConnectionRejection {
    /// The address has reached its limit.
    #[error("too many connections from this address")]
    Address,
    /// The subnet has reached its limit.
    #[error("too many connections from this IPv6 subnet")]
    Subnet,
    /// The limit of the connection's origin is reached.
    #[error("too many connections")]
    Origin,
}

/// The open connections of one listener.
#[derive(Debug)]
pub struct OpenConnections {
    limits: ConnectionLimits,
    /// Never holds a zero. At most `limits.node + limits.elsewhere` entries.
    open: BTreeMap<(Origin, IpAddr), usize>,
}

impl OpenConnections {
    /// No connection is open.
    pub fn new(limits: ConnectionLimits) -> Self {
        Self { limits, open: BTreeMap::new() }
    }

    /// Adds a connection, which counts until [`OpenConnections::remove`].
    ///
    /// # Errors
    /// [`ConnectionRejection`]; the connection then does not count.
    pub fn insert(&mut self, origin: Origin, address: IpAddr) -> Result<(), ConnectionRejection> {
        let limit = match origin {
            Origin::Node => self.limits.node,
            Origin::Elsewhere => self.limits.elsewhere,
        };
        if self.open.get(&(origin, address)).is_some_and(|count| *count >= self.limits.address) {
            return Err(ConnectionRejection::Address);
        }
        let (mut of_subnet, mut of_origin) = (0, 0);
        for ((_, other), count) in self.open.iter().filter(|((other, _), _)| *other == origin) {
            of_origin += count;
            of_subnet += if Subnet::of(*other) == Subnet::of(address) { *count } else { 0 };
        }
        if of_subnet >= self.limits.subnet {
            return Err(ConnectionRejection::Subnet);
        }
        if of_origin >= limit {
            return Err(ConnectionRejection::Origin);
        }
        *self.open.entry((origin, address)).or_default() += 1;
        Ok(())
    }

    /// Removes a connection that [`OpenConnections::insert`] accepted.
    pub fn remove(&mut self, origin: Origin, address: IpAddr) {
        if let Some(count) = self.open.get_mut(&(origin, address)) {
            *count -= 1;
            if *count == 0 {
                self.open.remove(&(origin, address));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: ConnectionLimits = ConnectionLimits { node: 4, elsewhere: 6, address: 3, subnet: 5 };

    fn address(last: u8) -> IpAddr {
        IpAddr::from([10, 0, 0, last])
    }

    #[test]
    fn remote_connections_leave_the_slots_of_the_node_free() {
        let mut connections = OpenConnections::new(LIMITS);
        let accepted = (0..=255).filter(|last| connections.insert(Origin::Elsewhere, address(*last)).is_ok()).count();
        assert_eq!(accepted, LIMITS.elsewhere);
        assert_eq!(connections.insert(Origin::Elsewhere, address(9)), Err(ConnectionRejection::Origin));
        assert_eq!(connections.insert(Origin::Node, address(1)), Ok(()));
    }

    #[test]
    fn an_address_at_its_limit_leaves_slots_for_other_addresses() {
        for (origin, limit) in [(Origin::Node, LIMITS.node), (Origin::Elsewhere, LIMITS.elsewhere)] {
            let mut connections = OpenConnections::new(LIMITS);
            let results: Vec<_> = (0..9).map(|_| connections.insert(origin, address(1))).collect();
            assert_eq!(results.iter().filter(|result| result.is_ok()).count(), LIMITS.address);
            assert_eq!(results.last(), Some(&Err(ConnectionRejection::Address)));
            assert_eq!((0..9).filter(|_| connections.insert(origin, address(2)).is_ok()).count(), limit - 3);
        }
    }

    #[test]
    fn an_ipv6_subnet_at_its_limit_leaves_slots_for_other_subnets() {
        let mut connections = OpenConnections::new(LIMITS);
        let mut connect = |prefix: u16, host: u16| {
            connections.insert(Origin::Elsewhere, [0xfd77, 0, 0, prefix, 0, 0, 0, host].into())
        };
        let results: Vec<_> = (0..99).map(|host| connect(1, host)).collect();
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), LIMITS.subnet);
        assert_eq!(results.last(), Some(&Err(ConnectionRejection::Subnet)));
        assert_eq!(connect(2, 1), Ok(()));
    }

    proptest! {
        #[test]
        fn closed_connections_are_not_counted(steps in proptest::collection::vec((any::<bool>(), 0u8..4, any::<bool>()), 0..99)) {
            let mut connections = OpenConnections::new(LIMITS);
            let mut open = Vec::new();
            for (is_node, last, closes) in steps {
                let origin = if is_node { Origin::Node } else { Origin::Elsewhere };
                if closes && let Some((origin, address)) = open.pop() {
                    connections.remove(origin, address);
                } else if connections.insert(origin, address(last)).is_ok() {
                    open.push((origin, address(last)));
                }
                for (origin, limit) in [(Origin::Node, LIMITS.node), (Origin::Elsewhere, LIMITS.elsewhere)] {
                    prop_assert!(open.iter().filter(|(other, _)| *other == origin).count() <= limit);
                }
            }
            while let Some((origin, address)) = open.pop() {
                connections.remove(origin, address);
            }
            prop_assert!(connections.open.is_empty());
        }
    }
}
