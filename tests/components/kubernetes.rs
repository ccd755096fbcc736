//! The Kubernetes adapter against a real API server.

mod admission;
mod apiserver;
mod claims;
mod kubelet_events;
mod owners;
mod pods;
mod proxy;
mod reports;
mod rights;
mod watch;
