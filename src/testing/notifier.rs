//! A webhook receiver in memory.

use async_trait::async_trait;
use parking_lot::{Mutex, MutexGuard};

use crate::ports::{Notification, Notifier, NotifyError};

/// Stores every accepted message.
#[derive(Default)]
pub struct MemoryNotifier {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    sent: Vec<Notification>,
    attempts: usize,
    failure: Option<NotifyError>,
}

impl MemoryNotifier {
    /// Sets the answer to every later message; `None` accepts messages.
    pub fn set_failure(&self, failure: Option<NotifyError>) {
        self.lock().failure = failure;
    }

    /// Accepted messages, in order.
    pub fn sent(&self) -> Vec<Notification> {
        self.lock().sent.clone()
    }

    /// Number of messages, accepted or refused.
    pub fn attempts(&self) -> usize {
        self.lock().attempts
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

#[async_trait]
impl Notifier for MemoryNotifier {
    async fn notify(&self, notification: &Notification) -> Result<(), NotifyError> {
        let mut state = self.lock();
        state.attempts += 1;
        match &state.failure {
            Some(failure) => Err(failure.clone()),
            None => {
                state.sent.push(notification.clone());
                Ok(())
            }
        }
    }
}
