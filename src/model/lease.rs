//! The fields of a Kubernetes Lease that a claim uses.

use std::time::SystemTime;

/// A Lease, as read from the API server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseSnapshot {
    /// The holder's node name.
    pub holder: Option<String>,
    /// The last renewal, by the holder's clock.
    pub renewed: Option<SystemTime>,
    /// The version that was read.
    pub version: LeaseVersion,
}

/// The Lease's `resourceVersion`, an opaque text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseVersion(pub String);
