//! A Kubernetes Lease, as far as a claim looks at it.

use std::time::SystemTime;

/// A Lease as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseSnapshot {
    /// Who holds it: a node's name.
    pub holder: Option<String>,
    /// When it was renewed last, by the holder's clock.
    pub renewed: Option<SystemTime>,
    /// Which version was read.
    pub version: LeaseVersion,
}

/// The resource version, opaque.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LeaseVersion(pub String);
