//! The real content of all nodes, and comparisons with the agents' inventories.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use lighterman::decide::inventory::Inventory;
use lighterman::model::{
    Bits, InventoryChange, InventoryItem, InventorySnapshot, MemberStatus, MeshStatus, PeerId, SyncReply,
};
use lighterman::oci::Digest;

use super::Mesh;
use super::catalogue::ItemNumber;
use super::credentials::SimulatedKey;
use super::gossipsub::NodeNumber;
use super::node::{Traffic, TrafficKind};

impl Mesh {
    /// Changes a node's content, and announces the change.
    pub(crate) fn change(&mut self, node: NodeNumber, added: &[ItemNumber], removed: &[ItemNumber]) {
        let items = &mut self.nodes[node].items;
        items.extend(added);
        items.retain(|item| !removed.contains(item));
        self.nodes[node].past_items.extend(added);
        self.announce(node, added, removed);
    }

    pub(super) fn announce(&mut self, node: NodeNumber, added: &[ItemNumber], removed: &[ItemNumber]) {
        let item = |number: &ItemNumber| self.catalogue.item(*number).clone();
        let added = added.iter().map(item).map(InventoryChange::Added);
        let removed = removed.iter().map(item).map(InventoryChange::Removed);
        let changes = added.chain(removed).collect();
        let left_out = self.with_protocol(node, |protocol, _, _| protocol.announce(changes));
        assert!(left_out.is_none_or(|count| count == 0), "node {node} has more content than it may announce");
    }

    /// The nodes with a running agent.
    pub(crate) fn running(&self) -> Vec<NodeNumber> {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].agent.is_some()).collect()
    }

    /// Whether the observer counts the other node as a member, and would fetch from it.
    pub(crate) fn considers_alive(&self, observer: NodeNumber, other: NodeNumber) -> bool {
        let agent = self.nodes[observer].agent.as_ref();
        agent.is_some_and(|agent| agent.inventory.node_of(self.nodes[other].peer.id).is_some())
    }

    /// Whether a node's inventory has the right number of items of each node, and none of nodes
    /// without an agent.
    ///
    /// `from` is the position of the last mismatch. The check continues there, which makes repeated
    /// checks cheap.
    fn counts_match(&self, observer: NodeNumber, from: &mut NodeNumber, others: &[NodeNumber]) -> bool {
        let Some(agent) = &self.nodes[observer].agent else { return true };
        let matches = |other: NodeNumber| {
            let node = &self.nodes[other];
            let expected = if node.agent.is_some() { node.items.len() } else { 0 };
            other == observer || agent.inventory.items_of(node.peer.id) == expected
        };
        for step in 0..others.len() {
            let position = (*from + step) % others.len();
            if !matches(others[position]) {
                *from = position;
                return false;
            }
        }
        true
    }

    /// Runs until the inventories of all observers have the right number of items.
    pub(crate) fn wait_converged(&mut self, deadline: Duration, observers: &[NodeNumber]) -> Option<Duration> {
        let all: Vec<_> = (0..self.nodes.len()).collect();
        let mut waiting: Vec<_> = observers.iter().map(|observer| (*observer, 0)).collect();
        self.run_until(deadline, |mesh| {
            waiting.retain_mut(|(observer, from)| !mesh.counts_match(*observer, from, &all));
            if waiting.is_empty() {
                // An inventory that matched early may have changed since.
                waiting = observers.iter().map(|observer| (*observer, 0)).collect();
                waiting.retain_mut(|(observer, from)| !mesh.counts_match(*observer, from, &all));
            }
            waiting.is_empty()
        })
    }

    /// The first mismatch of an inventory, for a failed assertion.
    pub(crate) fn first_difference(&self) -> String {
        for observer in self.running() {
            let Some(agent) = &self.nodes[observer].agent else { continue };
            for (other, node) in self.nodes.iter().enumerate().filter(|(other, _)| *other != observer) {
                let expected = if node.agent.is_some() { node.items.len() } else { 0 };
                let known = agent.inventory.items_of(node.peer.id);
                if known != expected {
                    let views = [self.view(observer, other), self.view(other, observer)];
                    return format!("node {observer} has {known} of {expected} items of node {other}: {views:#?}");
                }
            }
        }
        "no difference".into()
    }

    /// Number of items that a node's inventory has of another node.
    pub(crate) fn known_items(&self, observer: NodeNumber, other: NodeNumber) -> usize {
        let agent = self.nodes[observer].agent.as_ref();
        agent.map_or(0, |agent| agent.inventory.items_of(self.nodes[other].peer.id))
    }

    /// The status of a running agent.
    pub(crate) fn status(&self, node: NodeNumber) -> MeshStatus {
        let agent = self.nodes[node].agent.as_ref().expect("the agent runs");
        agent.protocol.status(&agent.inventory, self.instant())
    }

    /// The key of a node.
    pub(crate) fn key(&self, node: NodeNumber) -> SimulatedKey {
        SimulatedKey(self.nodes[node].peer.id)
    }

    /// Number of nodes with a connection to this node.
    pub(crate) fn neighbors(&self, node: NodeNumber) -> usize {
        self.nodes[node].agent.as_ref().map_or(0, |agent| agent.neighbors.len())
    }

    /// The member status of one node at another.
    fn view(&self, observer: NodeNumber, other: NodeNumber) -> Option<MemberStatus> {
        self.nodes[observer].agent.as_ref()?;
        self.status(observer).members.into_iter().find(|member| member.peer_id == self.nodes[other].peer.id.to_string())
    }

    /// Asserts that inventories have exactly the real content, node by node and item by item.
    pub(crate) fn assert_inventories_exact(&self, observers: &[NodeNumber]) {
        for observer in observers {
            let Some(agent) = &self.nodes[*observer].agent else { continue };
            for (number, node) in self.nodes.iter().enumerate().filter(|(number, _)| number != observer) {
                let runs = node.agent.is_some();
                assert_eq!(agent.inventory.node_of(node.peer.id).is_some(), runs, "node {observer} of node {number}");
            }
            for (number, expected) in self.expected_providers(*observer) {
                let found = providers_in(&agent.inventory, self.catalogue.item(number));
                assert_eq!(found, expected, "node {observer} of {:?}", self.catalogue.item(number));
            }
        }
    }

    /// The providers of each item, except the observer.
    fn expected_providers(&self, observer: NodeNumber) -> BTreeMap<ItemNumber, BTreeSet<PeerId>> {
        let mut expected: BTreeMap<_, BTreeSet<_>> =
            (0..self.catalogue.items()).map(|item| (item, BTreeSet::new())).collect();
        for (number, node) in self.nodes.iter().enumerate() {
            if number != observer && node.agent.is_some() {
                for item in &node.items {
                    expected.entry(*item).or_default().insert(node.peer.id);
                }
            }
        }
        // A tag counts only if its provider has the index. Nodes here have complete images or none,
        // so every tag counts.
        expected
    }

    /// Asserts that no inventory has an item that its provider never had.
    pub(crate) fn assert_nothing_invented(&self) {
        self.assert_nothing_invented_about(&self.running());
    }

    /// As `assert_nothing_invented`, for these nodes only.
    pub(crate) fn assert_nothing_invented_about(&self, honest: &[NodeNumber]) {
        for observer in honest.iter().copied() {
            let Some(agent) = &self.nodes[observer].agent else { continue };
            for item in 0..self.catalogue.items() {
                for peer in providers_in(&agent.inventory, self.catalogue.item(item)) {
                    let provider = self.number(peer).expect("a node of the simulation");
                    let had = !honest.contains(&provider) || self.nodes[provider].past_items.contains(&item);
                    assert!(had, "node {observer} has node {provider} as provider of {:?}", self.catalogue.item(item));
                }
            }
        }
    }

    /// Traffic of all links, by node.
    pub(crate) fn traffic(&self) -> Vec<Traffic> {
        self.nodes.iter().map(|node| node.traffic).collect()
    }

    /// Changes a reply so that the reply still decodes and is wrong.
    pub(super) fn falsify(&mut self, reply: SyncReply) -> SyncReply {
        let invented = || InventoryItem::Blob(Digest::of(b"nobody has this"));
        match reply {
            SyncReply::Entries(mut entries) => {
                entries.iter_mut().for_each(|entry| entry.changes.push(InventoryChange::Added(invented())));
                SyncReply::Entries(entries)
            }
            SyncReply::Snapshot(InventorySnapshot { heads, mut items }) => {
                let mut all = Bits::default();
                (0..heads.len()).for_each(|head| all.set(head));
                items.push((invented(), all));
                items.sort_by(|one, other| one.0.cmp(&other.0));
                SyncReply::Snapshot(InventorySnapshot { heads, items })
            }
            SyncReply::Introductions(mut introductions, refutations) => {
                introductions.iter_mut().for_each(|one| one.profile.version += 1);
                SyncReply::Introductions(introductions, refutations)
            }
            SyncReply::Summaries(mut summaries) => {
                summaries.iter_mut().for_each(|summary| summary.sequence += 3);
                SyncReply::Summaries(summaries)
            }
            SyncReply::Busy => SyncReply::Busy,
        }
    }
}

/// The providers of an item in an inventory.
fn providers_in(inventory: &Inventory, item: &InventoryItem) -> BTreeSet<PeerId> {
    match item {
        InventoryItem::Blob(digest) => inventory.blob_providers(*digest).into_iter().collect(),
        InventoryItem::Image(repository, Some(tag), digest) => {
            inventory.tag(repository, tag).remove(digest).unwrap_or_default().into_iter().collect()
        }
        InventoryItem::Image(repository, None, digest) => {
            inventory.image_providers(repository, *digest).into_iter().collect()
        }
        InventoryItem::Fetching(digest) => inventory.partial_providers(*digest).into_iter().collect(),
        InventoryItem::Outage(_) => BTreeSet::new(),
    }
}

/// The share of each kind in the received bytes.
pub(crate) fn shares(traffic: &[Traffic]) -> String {
    let sum = |kind: TrafficKind| traffic.iter().map(|one| one.received[kind as usize]).sum::<u64>() as f64;
    let all: f64 = TrafficKind::ALL.iter().map(|kind| sum(*kind)).sum();
    let share = |kind: &TrafficKind| format!("{kind:?} {:.0} %", 100.0 * sum(*kind) / all.max(1.0)).to_lowercase();
    TrafficKind::ALL.iter().map(share).collect::<Vec<_>>().join(", ")
}
