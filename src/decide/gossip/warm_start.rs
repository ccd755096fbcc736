//! The state of a cluster that has run for long, where a simulation begins.

use std::time::Instant;

use super::{CredentialVerifier, Protocol};
use crate::decide::inventory::Inventory;

impl<N: CredentialVerifier> Protocol<N> {
    /// Marks the introduction and all changes as published.
    pub fn mark_all_published(&mut self) {
        self.introduce_at = None;
        let _ = self.log.take_entries(|message| self.verifier.sign(message));
    }

    /// Copies the other agent's introduction and the position of its log, as if this agent had
    /// received all of the other's gossip. The caller puts the other's items into the inventory.
    /// Does nothing before the other has an introduction and a published log.
    pub fn copy_log_position(&mut self, other: &Self, inventory: &mut Inventory, now: Instant) {
        let (Some(introduction), Some(head)) = (&other.introduction, other.log.head()) else { return };
        let _ = self.receive_introduction(introduction.clone(), inventory, now);
        if let Some(member) = self.membership.get_mut(other.local.peer) {
            // No entry was buffered before.
            let _ = member.log.replace(head.clone(), false);
        }
        self.membership.update_bucket(other.local.peer);
    }
}
