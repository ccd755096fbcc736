//! Nodes of a Kubernetes cluster give each other the container images that a registry cannot.
//!
//! One binary, one agent per node, no controller and no leader. To read it, begin with [`agent::recover`]: the way from a
//! failing pod to a runnable image, top to bottom.
//!
//! # Floors
//!
//! A module uses the floors beneath its own, never its neighbours on the same floor and nothing above. `tests/fast/floors.rs` reads this
//! table and keeps it true.
//!
//! ```text
//! cli
//! agent
//! config
//! admin admission cluster containerd control layout mesh registry testing transfer webhook
//! addresses credential files http identity
//! ports wire metrics
//! decide
//! model
//! oci
//! ```
//!
//! Deviations from the first design: `identity` is a floor of its own, because both network adapters prove the same key and
//! siblings must not import each other; so are `addresses`, because the admin port and the way to
//! peers both tell this node's addresses from others, `files`, because two stores read blobs from files, and `http`, because two adapters
//! ask servers outside the cluster, and `credential`, because what strangers show is read before anything else and has to be fuzzed
//! without the rest; and `testing` stands among the adapters, since that is what it implements.

pub mod decide;
pub mod model;
pub mod oci;
pub mod ports;
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
pub mod cli;
#[cfg(feature = "agent")]
pub mod cluster;
#[cfg(feature = "agent")]
pub mod config;
#[cfg(feature = "agent")]
pub mod containerd;
#[cfg(feature = "agent")]
pub mod control;
#[cfg(feature = "door")]
pub mod credential;
#[cfg(feature = "agent")]
pub mod files;
#[cfg(feature = "agent")]
pub mod http;
#[cfg(feature = "door")]
pub mod identity;
#[cfg(feature = "agent")]
pub mod layout;
#[cfg(feature = "agent")]
pub mod mesh;
#[cfg(feature = "agent")]
pub mod metrics;
#[cfg(feature = "agent")]
pub mod registry;
#[cfg(feature = "testing")]
pub mod testing;
#[cfg(feature = "agent")]
pub mod transfer;
#[cfg(feature = "agent")]
pub mod webhook;
