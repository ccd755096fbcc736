//! Sources of missing layers, results of fetches, and reasons why layers are missing.

use std::fmt;
use std::time::Duration;

/// Where missing layers may be fetched from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FetchFrom {
    /// Nowhere.
    None,
    /// From peers.
    Peers,
    /// From peers, and from the image's registry.
    #[default]
    Registry,
}

/// Where an image's layers are fetched from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum FillSource {
    /// From peers.
    Peers,
    /// From the image's registry.
    Registry,
}

impl FillSource {
    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Peers => "peers",
            Self::Registry => "registry",
        }
    }
}

/// Why a fetch failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FillFailure {
    /// No peer sent a layer.
    Peers,
    /// This node's store or disk failed.
    Local,
    /// A recovery needs a layer now, and fetches the layer itself.
    NeededByRecovery,
    /// The registry denies the image, with every secret that could be read and without any.
    Denied {
        /// Pods name further secrets, which could not be read.
        unread: bool,
    },
    /// The registry does not have a layer.
    Gone,
    /// The registry sent bytes that do not match the digest.
    WrongBytes,
    /// The registry limits the rate, and may request a pause.
    RateLimited(Option<Duration>),
    /// The registry failed.
    Down,
}

impl FillFailure {
    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Peers => "not_from_peers",
            Self::Local => "local",
            Self::NeededByRecovery => "yielded",
            Self::Denied { .. } => "denied",
            Self::Gone => "gone",
            Self::WrongBytes => "wrong_bytes",
            Self::RateLimited(_) => "rate_limited",
            Self::Down => "down",
        }
    }
}

/// Why an image lacks layers now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum UnfilledReason {
    /// The layers are being fetched.
    Fetching,
    /// A later fetch may succeed.
    Pending,
    /// The budget or the disk has no room.
    NoRoom,
    /// The registry denies the image to the agent: only the kubelet can pull the image, with a
    /// credential plugin. Peers may have the layers, and the next pull stores them.
    KubeletCredentials,
    /// The registry denies the image to the agent, and the agent may not read all secrets of the
    /// pods.
    UnreadableSecret,
    /// The registry no longer has a layer.
    Gone,
    /// A setting forbids fetches, or containerd's own labels should keep the layers.
    NotFetched,
}

impl UnfilledReason {
    /// Every reason.
    pub const ALL: [Self; 7] = [
        Self::Fetching,
        Self::Pending,
        Self::NoRoom,
        Self::KubeletCredentials,
        Self::UnreadableSecret,
        Self::Gone,
        Self::NotFetched,
    ];

    /// The metric's label.
    pub fn label(self) -> &'static str {
        match self {
            Self::Fetching => "fetching",
            Self::Pending => "pending",
            Self::NoRoom => "no_room",
            Self::KubeletCredentials => "kubelet_credentials",
            Self::UnreadableSecret => "unreadable_secret",
            Self::Gone => "gone",
            Self::NotFetched => "not_fetched",
        }
    }
}

impl fmt::Display for UnfilledReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Fetching => "being fetched",
            Self::Pending => "to be fetched later",
            Self::NoRoom => "no room",
            Self::KubeletCredentials => "only the kubelet's credential plugin can pull them",
            Self::UnreadableSecret => "pull secret not readable",
            Self::Gone => "gone from the registry",
            Self::NotFetched => "not fetched",
        })
    }
}
