//! Values that every part of one agent shares.

use std::sync::Arc;

use tokio::sync::watch;

use super::peers::inventory_view::PeerInventory;
use super::recovery::progress::RecoveryTracker;
use crate::decide::policy::{Policy, RecoveryOptions};
use crate::metrics::Metrics;
use crate::model::{NodeName, PeerId};

/// The agent's identity, its settings, and the state that the parts share. Clones share the state.
#[derive(Clone)]
pub(super) struct AgentContext {
    pub(super) node: NodeName,
    pub(super) peer: PeerId,
    pub(super) policy: watch::Receiver<Arc<Policy>>,
    pub(super) options: RecoveryOptions,
    pub(super) inventory: PeerInventory,
    pub(super) tracker: RecoveryTracker,
    pub(super) metrics: Metrics,
}
