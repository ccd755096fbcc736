//! The Kubernetes adapter against a real API server.

mod admission;
mod apiserver;
mod chart;
mod claims;
mod kubelet_events;
mod nodes;
mod own_image;
mod owners;
mod pod_policy;
mod pod_watch;
mod pods;
mod proxy;
mod rbac;
mod reports;
mod token_policy;
