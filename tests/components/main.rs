//! Tests against real components that one machine can run without a cluster around them: each containerd, an API
//! server with its etcd, a registry, and links of the kernel's that are slow or break. `make test` sets them up. And of parts of ours together that are
//! only joined in the agent.

mod containerd;
#[path = "../fleet/mod.rs"]
mod fleet;
mod kubernetes;
mod links;
mod mesh;
mod piece_sharing;
mod registry;
mod udp_blocked;
