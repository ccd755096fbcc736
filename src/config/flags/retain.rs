//! The values of `--retain-layers` and `--retain-fetch`.

use clap::ValueEnum;

use crate::decide::fill::FetchFrom;
use crate::decide::retain::RetainLayers;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::config) enum RetainKind {
    /// Images that pods of opted-in namespaces run or ran.
    OptedIn,
    /// Every image.
    All,
    /// No image.
    None,
}

impl From<RetainKind> for RetainLayers {
    fn from(kind: RetainKind) -> Self {
        match kind {
            RetainKind::OptedIn => Self::OptedIn,
            RetainKind::All => Self::All,
            RetainKind::None => Self::None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(in crate::config) enum FetchKind {
    /// Nothing is fetched.
    #[value(alias = "false")]
    None,
    /// From peers.
    #[value(alias = "true")]
    Peers,
    /// From peers, else from the image's registry.
    Registry,
}

impl From<FetchKind> for FetchFrom {
    fn from(kind: FetchKind) -> Self {
        match kind {
            FetchKind::None => Self::None,
            FetchKind::Peers => Self::Peers,
            FetchKind::Registry => Self::Registry,
        }
    }
}
