//! Tests against real components that one machine can run without a cluster around them: each containerd, and an API
//! server with its etcd. `make test` sets them up.

mod containerd;
mod kubernetes;
