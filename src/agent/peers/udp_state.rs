//! Whether peers answer over UDP. The UDP watch writes the state; fetchers, status and Events read
//! the state.

use std::sync::Arc;

use parking_lot::Mutex;

use crate::control::UdpStatus;

/// The state of UDP, for status, Events and readiness. Clones share the state.
#[derive(Debug, Clone, Default)]
pub struct UdpState(Arc<Mutex<UdpStatus>>);

impl UdpState {
    /// The current state.
    pub fn status(&self) -> UdpStatus {
        self.0.lock().clone()
    }

    /// Whether UDP is blocked now.
    pub fn is_blocked(&self) -> bool {
        self.0.lock().blocked_since.is_some()
    }

    /// Replaces the state, and returns the former one.
    pub(in crate::agent) fn replace(&self, status: UdpStatus) -> UdpStatus {
        std::mem::replace(&mut *self.0.lock(), status)
    }
}
