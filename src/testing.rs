//! Ports in memory, and the contracts of the ports as checks that run on every store.
//!
//! The stores are implementations, not mocks: a store hashes its input and loses unpinned content.
//! The shipped binary has none of these ([`crate::simulated`] is what the demo uses).

pub mod contract;
pub(crate) mod decompress;
mod dialer;
mod fetcher;
mod memory_store;
mod mesh;
mod notifier;
mod stopping_store;

use crate::decide::policy::Policy;

pub use crate::simulated::{MemoryClaims, MemoryCluster, MemoryRegistry, image};
pub use dialer::MemoryDialer;
pub use fetcher::{Behaviour, MemoryFetcher};
pub use memory_store::MemoryStore;
pub use mesh::{MemoryIntroduction, MemoryMesh};
pub use notifier::MemoryNotifier;
pub use stopping_store::{KillPoint, StoppingStore};

/// A policy without floors for free disk space, so that a result does not depend on the machine's
/// disk.
pub fn policy_without_disk_limits() -> Policy {
    let mut policy = Policy::default();
    policy.budgets.min_free_bytes = 0;
    policy.budgets.image_gc_percent = 100;
    policy.budgets.eviction_percent = 0;
    policy
}
