//! The Kubernetes adapter against a real API server.

mod admission;
mod apiserver;
mod claims;
mod pods;
mod proxy;
mod reports;
mod rights;
