//! Registry outages, as nodes announce them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// How a registry fails.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum OutageKind {
    /// The registry's name does not resolve.
    NoSuchHost,
    /// The registry's host refuses connections, or the network has no route to the host.
    Refused,
    /// No answer: packets are dropped, or the host is gone.
    TimedOut,
    /// The registry answers, but TLS fails.
    Tls,
    /// The registry answers 5xx.
    ServerError,
}

impl OutageKind {
    /// The label in metrics and messages.
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
            Self::NoSuchHost => "the name does not resolve",
            Self::Refused => "connections are refused",
            Self::TimedOut => "no answer",
            Self::Tls => "TLS fails",
            Self::ServerError => "the server answers 5xx",
        })
    }
}

/// An outage of one registry, as one node found it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Outage {
    /// Host and, if given, port, as in [`crate::oci::Repository::registry`].
    pub registry: String,
    /// How the registry fails.
    pub kind: OutageKind,
    /// Start of the outage, in seconds since 1970 by the node's own clock. Only people read the
    /// time: no decision depends on another node's clock.
    pub since: u64,
}
