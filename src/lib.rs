//! Recovers container images that Kubernetes nodes cannot pull, from other nodes of the cluster.
//!
//! One binary, one agent per node, no controller and no leader. Begin to read at
//! [`agent::recovery::recover`]: the way from a failing pod to a runnable image, top to bottom.
//!
//! # Floors
//!
//! A module uses only the floors below its own, and no other module of the same floor.
//! `tests/fast/floors.rs` reads this table and checks every `use`.
//!
//! ```text
//! cli
//! agent
//! config
//! admin admission cluster containerd control layout mesh registry testing transfer webhook
//! addresses api_server credential files http identity simulated
//! ports wire metrics
//! decide
//! model
//! oci
//! util
//! ```
//!
//! The modules of one floor share code through a floor below:
//! - `identity`: both network adapters prove the same key.
//! - `addresses`: the admin port and the dialing of peers both separate this node's addresses from
//!   other addresses.
//! - `api_server`: the adapter of cluster objects and admission by token use one connection.
//! - `simulated`: the demo and `testing` use one cluster in memory.
//! - `files`: two stores read blobs from files.
//! - `http`: two adapters send requests to servers outside the cluster.
//! - `credential`: a peer's credential is parsed before any other input of an unauthenticated
//!   connection, and is fuzzed without the adapters.
//!
//! `testing` is on the floor of the adapters, because `testing` implements the same ports.

pub mod decide;
pub mod model;
pub mod oci;
pub mod ports;
pub mod util;
pub mod wire;

#[cfg(feature = "agent")]
pub mod addresses;
#[cfg(feature = "agent")]
pub mod admin;
#[cfg(feature = "agent")]
pub mod admission;
#[cfg(feature = "agent")]
pub mod agent;
#[cfg(feature = "agent")]
pub mod api_server;
#[cfg(feature = "agent")]
pub mod cli;
#[cfg(feature = "agent")]
pub mod cluster;
#[cfg(feature = "agent")]
pub mod config;
#[cfg(feature = "agent")]
pub mod containerd;
#[cfg(feature = "agent")]
pub mod control;
#[cfg(feature = "credentials")]
pub mod credential;
#[cfg(feature = "agent")]
pub mod files;
#[cfg(feature = "agent")]
pub mod http;
#[cfg(feature = "credentials")]
pub mod identity;
#[cfg(feature = "agent")]
pub mod layout;
#[cfg(feature = "agent")]
pub mod mesh;
#[cfg(feature = "agent")]
pub mod metrics;
#[cfg(feature = "agent")]
pub mod registry;
#[cfg(any(feature = "agent", feature = "testing"))]
pub mod simulated;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "agent")]
pub mod transfer;
#[cfg(feature = "agent")]
pub mod webhook;
