//! Whether peers answer over UDP. The watch writes the state; fetchers, status and Events read it.

use std::sync::{Arc, Mutex, PoisonError};

use crate::ports::UdpStatus;

/// The state of UDP for status, Events and readiness. Clones share one state.
#[derive(Debug, Clone, Default)]
pub struct UdpState(Arc<Mutex<UdpStatus>>);

impl UdpState {
    /// The state at the moment.
    pub fn status(&self) -> UdpStatus {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether UDP is blocked.
    pub fn is_blocked(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).blocked_since.is_some()
    }

    /// Replaces the state, and returns the one before.
    pub(in crate::agent) fn replace(&self, status: UdpStatus) -> UdpStatus {
        std::mem::replace(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner), status)
    }
}
