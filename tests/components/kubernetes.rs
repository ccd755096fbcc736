//! The Kubernetes adapter against a real API server.

mod admission;
mod apiserver;
mod chart;
mod claims;
mod kubelet_events;
mod own_image;
mod owners;
mod pod_policy;
mod pods;
mod policy;
mod proxy;
mod reports;
mod rights;
mod watch;
mod zone;
