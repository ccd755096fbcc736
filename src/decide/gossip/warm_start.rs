//! A cluster that has been running for long, without having run it: so begin simulations.

use std::time::Instant;

use super::{CredentialVerifier, Protocol};
use crate::decide::inventory::Inventory;

impl<N: CredentialVerifier> Protocol<N> {
    /// All that this agent was to tell counts as told.
    pub fn mark_all_published(&mut self) {
        self.introduce_at = None;
        let _ = self.log.take_entries(|message| self.verifier.sign(message));
    }

    /// As if this agent had heard everything that another one has told so far, but for its content: whoever calls this puts that into the
    /// table. Nothing happens before the other has introduced itself and told what it holds.
    pub fn copy_log_position(&mut self, other: &Self, table: &mut Inventory, now: Instant) {
        let (Some(introduction), Some(head)) = (&other.introduction, other.log.head()) else { return };
        let _ = self.receive_introduction(introduction.clone(), table, now);
        if let Some(member) = self.roster.get_mut(other.local.peer) {
            // Nothing was held back before.
            let _ = member.log.replace(head.clone(), false);
        }
        self.roster.update_bucket(other.local.peer);
    }
}
