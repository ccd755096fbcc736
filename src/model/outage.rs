//! Registries that cannot be reached, as nodes tell each other.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a registry cannot be reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum OutageKind {
    /// Its name does not resolve.
    NoSuchHost,
    /// Nobody listens, or the network says that it cannot get there.
    Refused,
    /// No answer: packets are dropped, or the host is gone.
    TimedOut,
    /// It answers, but TLS fails.
    Tls,
    /// It answers 5xx.
    ServerError,
}

impl OutageKind {
    /// For metrics and messages.
    pub fn label(self) -> &'static str {
        match self {
            Self::NoSuchHost => "no_such_host",
            Self::Refused => "refused",
            Self::TimedOut => "timed_out",
            Self::Tls => "tls",
            Self::ServerError => "server_error",
        }
    }
}

impl fmt::Display for OutageKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoSuchHost => "its name does not resolve",
            Self::Refused => "connections are refused",
            Self::TimedOut => "no answer",
            Self::Tls => "TLS fails",
            Self::ServerError => "it answers 5xx",
        })
    }
}

/// One registry that one node cannot reach.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Outage {
    /// Host and, if given, port, as in [`crate::oci::Repository::registry`].
    pub registry: String,
    /// How it fails.
    pub kind: OutageKind,
    /// Since when that node knows, in seconds since 1970 by its own clock. For people; nothing is decided by another node's clock.
    pub since: u64,
}
