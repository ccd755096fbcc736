//! Entries of logs as they come, whoever brings them: checked, put in order, applied.

use std::time::Instant;

use super::conduct::ENTRIES;
use super::follower::Receipt;
use super::{Notary, Protocol, Verdict};
use crate::decide::inventory::Inventory;
use crate::model::{ContentChange, Entry, Item, MAX_CHANGES, MAX_MEMBERS, PeerId, changes_digest};
use crate::oci::{Reference, Repository};

impl<N: Notary> Protocol<N> {
    /// Somebody's entry, by gossip.
    pub(super) fn entry(&mut self, from: PeerId, entry: Entry, table: &mut Inventory, now: Instant) -> Verdict {
        let (publisher, epoch) = (entry.head.publisher, entry.head.epoch);
        if publisher == self.own.peer {
            return Verdict::Ignore("own");
        }
        let Some(member) = self.member(publisher) else {
            // Somebody new, if this is really its word.
            let is_its = || self.notary.is_signed(publisher, &entry.head.signed(), &entry.head.signature);
            if self.unknown.len() < MAX_MEMBERS && !self.unknown.contains_key(&publisher) && is_its() {
                self.unknown.insert(publisher, from);
            }
            return Verdict::Ignore("unknown_author");
        };
        if member.conduct.is_banned(now) || !member.is_vouched(now) {
            return Verdict::Ignore("not_admitted");
        }
        if epoch != member.epoch() {
            if epoch > member.epoch() {
                self.unknown.entry(publisher).or_insert(from);
            }
            return Verdict::Ignore("other_epoch");
        }
        // Before anything is computed: old entries can be had by everybody, and sent in as many frames as one likes.
        if member.log.has(&entry.head) {
            return Verdict::Ignore("late");
        }
        if let Err(fault) = check(&entry) {
            return Verdict::Reject(fault);
        }
        if !self.notary.is_signed(publisher, &entry.head.signed(), &entry.head.signature) {
            return Verdict::Reject("forged");
        }
        let Some(member) = self.roster.get_mut(publisher) else { return Verdict::Ignore("unknown_author") };
        // Only news count, or whoever plays old entries again would use up the publisher's allowance. And nobody is blamed: a neighbour may
        // have held them back. What is too much is asked for later, as fast as we like.
        if member.log.is_news(&entry.head) && !member.conduct.entries.take(&ENTRIES, now) {
            return Verdict::Ignore("too_many");
        }
        self.take_entry(from, entry, table, now)
    }

    pub(super) fn take_entry(&mut self, from: PeerId, entry: Entry, table: &mut Inventory, now: Instant) -> Verdict {
        let publisher = entry.head.publisher;
        let Some(member) = self.roster.get_mut(publisher) else { return Verdict::Ignore("unknown_author") };
        match member.log.receive(entry, from, now) {
            Receipt::Next(entries) => {
                self.apply(publisher, entries, table);
                Verdict::Accept
            }
            Receipt::Held => {
                self.behind.insert(publisher);
                Verdict::Accept
            }
            Receipt::Late => Verdict::Ignore("late"),
            Receipt::Contradiction => {
                self.nonsense(publisher, "contradiction", now);
                // Both are signed: whoever has the other one sees it, too. Who has banned the publisher passes nothing more of it on.
                Verdict::Accept
            }
        }
    }

    pub(super) fn apply(&mut self, publisher: PeerId, entries: Vec<Entry>, table: &mut Inventory) {
        let mut dropped = 0;
        for entry in entries {
            self.recent.push(entry.clone());
            dropped += table.change(publisher, entry.changes);
        }
        if let Some(member) = self.roster.get_mut(publisher) {
            if dropped > 0 {
                member.log.mark_partial();
            }
            if !member.log.is_behind() {
                self.behind.remove(&publisher);
            }
        }
        self.roster.touched(publisher);
    }
}

/// What can be said of an entry without knowing its publisher.
pub(super) fn check(entry: &Entry) -> Result<(), &'static str> {
    let Entry { head, changes } = entry;
    if head.sequence == 0 || changes.len() > MAX_CHANGES || head.changes != changes_digest(changes) {
        return Err("malformed");
    }
    let is_change_proper = |change: &ContentChange| match change {
        ContentChange::Added(item) | ContentChange::Removed(item) => is_proper(item),
    };
    if changes.iter().all(is_change_proper) { Ok(()) } else { Err("malformed") }
}

/// Whether an image's name is one that CRI would write, which also bounds its length.
pub(super) fn is_proper(item: &Item) -> bool {
    let reference = match item {
        Item::Blob(_) | Item::Fetching(_) => return true,
        Item::Outage(outage) => return Repository::is_registry(&outage.registry),
        Item::Image(repository, Some(tag), _) => Reference::Tag(repository.clone(), tag.clone()),
        Item::Image(repository, None, digest) => Reference::Digest(repository.clone(), *digest),
    };
    reference.to_string().parse() == Ok(reference)
}
