//! Recovering one image: from a reference to an image record that the runtime can use.
//!
//! [`recover`] is the main flow and reads top to bottom. The other modules are its steps: the
//! reference, the documents, the pieces of the blobs, the disk space and the unpacking.

pub mod blob_fetcher;
pub mod builder;
pub mod claim_coordinator;
pub mod disk_space;
pub mod downloads;
pub(in crate::agent) mod failure_text;
pub mod layer_unpacker;
pub mod mesh_range_fetcher;
pub mod peer_fetcher;
pub mod progress;
pub mod recover;
pub mod recover_error;
pub mod reference_resolver;
pub mod swarm;
