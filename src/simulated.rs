//! A Kubernetes cluster and a registry in memory, and images that are made on the spot. The demo
//! runs real agents on these; tests use them beside the fakes of `testing`.

mod cluster;
pub mod image;
mod registry;

pub use cluster::{MemoryClaims, MemoryCluster};
pub use registry::MemoryRegistry;
