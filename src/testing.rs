//! Ports that live in memory and keep the contract, and the contract itself as checks that run on every store.
//!
//! Not mocks: a store here hashes what it is given and loses what nothing holds, so a test that passes on it means something.
//! `lighterman demo` runs on some of them.

mod cluster;
pub mod contract;
mod fetcher;
pub mod image;
mod memory_store;
mod notifier;
mod registry;
mod stopping_store;

pub use cluster::{MemoryClaims, MemoryCluster};
pub use fetcher::{Behaviour, MemoryFetcher};
pub use memory_store::MemoryStore;
pub use notifier::MemoryNotifier;
pub use registry::MemoryRegistry;
pub use stopping_store::{KillPoint, StoppingStore};
