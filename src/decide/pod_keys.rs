//! Keys that were shown with tokens of one pod. A pod can have tokens for any number of keys,
//! because the audience of a token is the key's PeerId and the API server signs any audience.
//! Without a bound, one stolen token of an agent would fill every table of peers and exclude other
//! agents.
//!
//! Two keys of a pod count: the key that the agent has, and the one before the key file was lost.
//! Of three, the key that was shown least recently is dropped. The agent shows the right key again
//! at the next dial, so a thief displaces that key no longer, and never a key of another pod.

use std::collections::{HashMap, VecDeque};

use crate::model::PeerId;

/// Keys of one pod that count at a time.
const MAX_KEYS: usize = 2;

/// Keys by the UID of their pod. The owner of this table also removes a key that the owner drops
/// for another reason, so this table never has more keys than the owner's.
#[derive(Debug, Default)]
pub struct PodKeys {
    pods: HashMap<String, VecDeque<PeerId>>,
}

impl PodKeys {
    /// Records that a token of this pod was shown with this key. Returns the key that no longer
    /// counts.
    pub fn record(&mut self, pod: &str, peer: PeerId) -> Option<PeerId> {
        let keys = match self.pods.get_mut(pod) {
            Some(keys) => keys,
            None => self.pods.entry(pod.to_owned()).or_default(),
        };
        keys.retain(|key| *key != peer);
        keys.push_back(peer);
        if keys.len() > MAX_KEYS { keys.pop_front() } else { None }
    }

    /// For a key that was dropped, or that belongs to another pod now.
    pub fn remove(&mut self, pod: &str, peer: PeerId) {
        if let Some(keys) = self.pods.get_mut(pod) {
            keys.retain(|key| *key != peer);
            if keys.is_empty() {
                self.pods.remove(pod);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(n: u8) -> PeerId {
        PeerId::from_public_key([n; 32])
    }

    #[test]
    fn a_third_key_of_a_pod_displaces_the_least_recently_shown_key() {
        let mut keys = PodKeys::default();
        assert_eq!((keys.record("p", peer(1)), keys.record("p", peer(2))), (None, None));
        assert_eq!(keys.record("p", peer(1)), None, "the key is in the table");
        assert_eq!(keys.record("p", peer(3)), Some(peer(2)));
        assert_eq!(keys.record("q", peer(4)), None, "another pod");
    }

    #[test]
    fn a_pod_whose_keys_are_removed_uses_no_memory() {
        let mut keys = PodKeys::default();
        keys.record("p", peer(1));
        keys.remove("p", peer(2));
        keys.remove("q", peer(1));
        keys.remove("p", peer(1));
        assert!(keys.pods.is_empty());
    }

    proptest! {
        #[test]
        fn a_table_that_drops_every_displaced_key_has_at_most_two_keys_of_each_pod(
            shown in prop::collection::vec((0_u8..4, 0_u8..12), 0..200),
        ) {
            let (mut keys, mut table) = (PodKeys::default(), HashMap::new());
            for (pod, key) in shown {
                if let Some(before) = table.insert(peer(key), pod.to_string()).filter(|before| *before != pod.to_string()) {
                    keys.remove(&before, peer(key));
                }
                if let Some(displaced) = keys.record(&pod.to_string(), peer(key)) {
                    prop_assert_ne!(displaced, peer(key));
                    prop_assert_eq!(table.remove(&displaced), Some(pod.to_string()));
                }
                for pod in 0..4_u8 {
                    prop_assert!(table.values().filter(|of| **of == pod.to_string()).count() <= MAX_KEYS);
                }
                prop_assert_eq!(keys.pods.values().map(VecDeque::len).sum::<usize>(), table.len());
            }
        }
    }
}
