//! Tests on one machine, without a cluster, against real components: each containerd, an API server
//! with its etcd, a registry, and kernel links that are slow or break. `make test` sets these up.
//! Some tests combine parts that otherwise only the agent combines.

mod containerd;
#[path = "../fleet/mod.rs"]
mod fleet;
mod kubernetes;
mod links;
mod mesh;
mod piece_sharing;
mod registry;
mod udp_blocked;
