//! Log entries, from gossip or from a reply: checked, put in order, applied.

use super::fault::GossipFault;
use std::time::Instant;

use super::follower::EntryReceipt;
use super::peer_score::ENTRY_LIMIT;
use super::{CredentialVerifier, GossipVerdict, Protocol};
use crate::decide::inventory::Inventory;
use crate::model::{InventoryChange, InventoryItem, LogEntry, MAX_CHANGES, MAX_MEMBERS, PeerId, changes_digest};
use crate::oci::{Reference, Repository};

impl<N: CredentialVerifier> Protocol<N> {
    /// Handles an entry from gossip.
    pub(super) fn receive_entry(
        &mut self,
        from: PeerId,
        entry: LogEntry,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let (publisher, epoch) = (entry.head.publisher, entry.head.epoch);
        if publisher == self.local.peer {
            return GossipVerdict::Ignore("own");
        }
        let Some(member) = self.member(publisher) else {
            // The publisher is a new member, if the signature is the publisher's.
            let has_valid_signature =
                || self.verifier.is_signed(publisher, &entry.head.signed_bytes(), &entry.head.signature);
            if self.missing_introductions.len() < MAX_MEMBERS
                && !self.missing_introductions.contains_key(&publisher)
                && has_valid_signature()
            {
                self.missing_introductions.insert(publisher, from);
            }
            return GossipVerdict::Ignore("unknown_author");
        };
        if member.score.is_banned(now) || !member.has_valid_credential(now) {
            return GossipVerdict::Ignore("not_admitted");
        }
        if epoch != member.epoch() {
            if epoch > member.epoch() {
                self.missing_introductions.entry(publisher).or_insert(from);
            }
            return GossipVerdict::Ignore("other_epoch");
        }
        // Checked before anything is computed: every peer can get old entries, and can repeat them
        // in any number of messages.
        if member.log.contains(&entry.head) {
            return GossipVerdict::Ignore("late");
        }
        if let Err(fault) = validate_entry(&entry) {
            return GossipVerdict::Reject(fault);
        }
        if !self.verifier.is_signed(publisher, &entry.head.signed_bytes(), &entry.head.signature) {
            return GossipVerdict::Reject(GossipFault::Forged);
        }
        let Some(member) = self.membership.get_mut(publisher) else { return GossipVerdict::Ignore("unknown_author") };
        // Only new entries count, else a peer that repeats old entries would use up the publisher's
        // rate. No fault is recorded: a neighbor may have held the entries back. This agent
        // requests the excess later, at its own pace.
        if member.log.is_new(&entry.head) && !member.score.entries.try_take(1, ENTRY_LIMIT, now) {
            return GossipVerdict::Ignore("too_many");
        }
        self.apply_entry(from, entry, inventory, now)
    }

    pub(super) fn apply_entry(
        &mut self,
        from: PeerId,
        entry: LogEntry,
        inventory: &mut Inventory,
        now: Instant,
    ) -> GossipVerdict {
        let publisher = entry.head.publisher;
        let Some(member) = self.membership.get_mut(publisher) else { return GossipVerdict::Ignore("unknown_author") };
        match member.log.receive(entry, from, now) {
            EntryReceipt::Next(entries) => {
                self.apply_changes(publisher, entries, inventory);
                GossipVerdict::Accept
            }
            EntryReceipt::Buffered => {
                self.behind.insert(publisher);
                GossipVerdict::Accept
            }
            EntryReceipt::Duplicate => GossipVerdict::Ignore("late"),
            EntryReceipt::Contradiction => {
                self.record_fault(publisher, GossipFault::Contradiction, now);
                // The publisher signed both entries, so members that have the other one see the
                // contradiction too. An agent that banned the publisher relays no more of its
                // entries.
                GossipVerdict::Accept
            }
        }
    }

    pub(super) fn apply_changes(&mut self, publisher: PeerId, entries: Vec<LogEntry>, inventory: &mut Inventory) {
        let mut dropped = 0;
        for entry in entries {
            self.recent.push(entry.clone());
            dropped += inventory.change(publisher, entry.changes);
        }
        if let Some(member) = self.membership.get_mut(publisher) {
            if dropped > 0 {
                member.log.mark_partial();
            }
            if !member.log.is_behind() {
                self.behind.remove(&publisher);
            }
        }
        self.membership.update_bucket(publisher);
    }
}

/// The checks of an entry that need no publisher.
pub(super) fn validate_entry(entry: &LogEntry) -> Result<(), GossipFault> {
    let LogEntry { head, changes } = entry;
    if head.sequence == 0 || changes.len() > MAX_CHANGES || head.changes != changes_digest(changes) {
        return Err(GossipFault::Malformed);
    }
    let is_valid_change = |change: &InventoryChange| match change {
        InventoryChange::Added(item) | InventoryChange::Removed(item) => is_valid_item(item),
    };
    if changes.iter().all(is_valid_change) { Ok(()) } else { Err(GossipFault::Malformed) }
}

/// Whether CRI would write the image's name, which also bounds the name's length.
pub(super) fn is_valid_item(item: &InventoryItem) -> bool {
    let reference = match item {
        InventoryItem::Blob(_) | InventoryItem::Fetching(_) => return true,
        InventoryItem::Outage(outage) => return Repository::is_registry(&outage.registry),
        InventoryItem::Image(repository, Some(tag), _) => Reference::Tag(repository.clone(), tag.clone()),
        InventoryItem::Image(repository, None, digest) => Reference::Digest(repository.clone(), *digest),
    };
    reference.to_string().parse() == Ok(reference)
}
