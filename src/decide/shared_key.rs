//! Two nodes with one key: a disk image that was made after an agent had run on it gives all nodes
//! the same `identity.key`, and so the same PeerId.
//!
//! A node with the key of another one is found at the start, by the node's name that is stored
//! beside the key file. Key files of early releases have no name beside them, so two nodes may keep
//! one key until their agents meet. Then the node that the cluster has had for less time makes a
//! new key. Both agents compare the same two creation times of the API server. So exactly one of
//! them makes a new key, without a message between the two.

use std::time::SystemTime;

use crate::model::NodeName;

/// A node that has the key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyOwner {
    /// The node's name, unique in a cluster.
    pub node: NodeName,
    /// The creation time of the Node object.
    pub created: SystemTime,
}

/// Whether this node is the one that makes a new key. For two nodes of one second, the names
/// decide.
pub fn must_replace_key(own: &KeyOwner, other: &KeyOwner) -> bool {
    (own.created, &own.node) > (other.created, &other.node)
}

/// The meaning of the name beside a key file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeyOrigin {
    /// The key was made on this node, or adopted by this node.
    Own,
    /// No name: an early release made the key. The key is kept, and the name is written.
    Unknown,
    /// Another node's name: the disk was copied, or the node was renamed. In both cases other
    /// agents know the key as another node's.
    Copied,
}

/// Reads the name beside a node's key. An unreadable name counts as no name.
pub fn key_origin(recorded: Option<&str>, node: &NodeName) -> KeyOrigin {
    match recorded.map(str::trim).and_then(|recorded| recorded.parse::<NodeName>().ok()) {
        Some(recorded) if recorded == *node => KeyOrigin::Own,
        Some(_) => KeyOrigin::Copied,
        None => KeyOrigin::Unknown,
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn exactly_the_younger_of_two_nodes_with_a_shared_key_replaces_the_key(
            (a, b) in ("[a-c]{1,3}", "[a-c]{1,3}").prop_filter("names are unique", |(a, b)| a != b),
            (of_a, of_b) in (0_u64..3, 0_u64..3),
        ) {
            let owner = |node: &str, created| KeyOwner {
                node: node.parse().unwrap(),
                created: SystemTime::UNIX_EPOCH + Duration::from_secs(created),
            };
            let (a, b) = (owner(&a, of_a), owner(&b, of_b));
            prop_assert_ne!(must_replace_key(&a, &b), must_replace_key(&b, &a));
            prop_assert!(of_a >= of_b || !must_replace_key(&a, &b));
            prop_assert!(!must_replace_key(&a, &a), "a node keeps its key against itself");
        }
    }

    #[test]
    fn a_key_counts_as_copied_only_beside_the_name_of_another_node() {
        let node: NodeName = "n1".parse().unwrap();
        assert_eq!(key_origin(Some("n1\n"), &node), KeyOrigin::Own);
        assert_eq!(key_origin(Some("n10\n"), &node), KeyOrigin::Copied);
        for unreadable in [None, Some(""), Some("\0\0\0"), Some("n1 n2"), Some("a\nb")] {
            assert_eq!(key_origin(unreadable, &node), KeyOrigin::Unknown, "{unreadable:?}");
        }
    }
}
