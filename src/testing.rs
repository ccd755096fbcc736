//! Ports in memory, and the contracts of the ports as checks that run on every store.
//!
//! The stores are implementations, not mocks: a store hashes its input and loses unpinned content.
//! `lighterman demo` uses some of them.

mod cluster;
pub mod contract;
mod fetcher;
pub mod image;
mod memory_store;
mod notifier;
mod registry;
mod stopping_store;

use crate::decide::policy::Policy;

pub use cluster::{MemoryClaims, MemoryCluster};
pub use fetcher::{Behaviour, MemoryFetcher};
pub use memory_store::MemoryStore;
pub use notifier::MemoryNotifier;
pub use registry::MemoryRegistry;
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
