//! What is so, and whether the agents' inventories say it.

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
    /// What a node holds changes, and its agent learns of it.
    pub(crate) fn change(&mut self, node: NodeNumber, come: &[ItemNumber], gone: &[ItemNumber]) {
        let held = &mut self.nodes[node].items;
        held.extend(come);
        held.retain(|item| !gone.contains(item));
        self.nodes[node].past_items.extend(come);
        self.announce(node, come, gone);
    }

    pub(super) fn announce(&mut self, node: NodeNumber, come: &[ItemNumber], gone: &[ItemNumber]) {
        let item = |number: &ItemNumber| self.catalogue.item(*number).clone();
        let come = come.iter().map(item).map(InventoryChange::Added);
        let gone = gone.iter().map(item).map(InventoryChange::Removed);
        let changes = come.chain(gone).collect();
        let left_out = self.with_protocol(node, |protocol, _, _| protocol.announce(changes));
        assert!(left_out.is_none_or(|count| count == 0), "node {node} holds more than it may announce");
    }

    /// The nodes whose agents run.
    pub(crate) fn running(&self) -> Vec<NodeNumber> {
        (0..self.nodes.len()).filter(|node| self.nodes[*node].agent.is_some()).collect()
    }

    /// Whether one node would fetch from another.
    pub(crate) fn considers_alive(&self, observer: NodeNumber, other: NodeNumber) -> bool {
        let agent = self.nodes[observer].agent.as_ref();
        agent.is_some_and(|agent| agent.inventory.node_of(self.nodes[other].peer.id).is_some())
    }

    /// Whether a node's inventory has as many items of everyone as there are; of those that do not run, none.
    ///
    /// `from` is where it failed the last time: it goes on there, which makes asking often cheap.
    fn counts_match(&self, observer: NodeNumber, from: &mut NodeNumber, of: &[NodeNumber]) -> bool {
        let Some(agent) = &self.nodes[observer].agent else { return true };
        let matches = |other: NodeNumber| {
            let node = &self.nodes[other];
            let expected = if node.agent.is_some() { node.items.len() } else { 0 };
            other == observer || agent.inventory.items_of(node.peer.id) == expected
        };
        for step in 0..of.len() {
            let place = (*from + step) % of.len();
            if !matches(of[place]) {
                *from = place;
                return false;
            }
        }
        true
    }

    /// Lets time pass until all inventories of `observers` have as much as there is.
    pub(crate) fn wait_converged(&mut self, deadline: Duration, observers: &[NodeNumber]) -> Option<Duration> {
        let all: Vec<_> = (0..self.nodes.len()).collect();
        let mut waiting: Vec<_> = observers.iter().map(|observer| (*observer, 0)).collect();
        self.run_until(deadline, |mesh| {
            waiting.retain_mut(|(observer, from)| !mesh.counts_match(*observer, from, &all));
            if waiting.is_empty() {
                // Who was right early may have been wrong later.
                waiting = observers.iter().map(|observer| (*observer, 0)).collect();
                waiting.retain_mut(|(observer, from)| !mesh.counts_match(*observer, from, &all));
            }
            waiting.is_empty()
        })
    }

    /// Why inventories have not settled, for a failed assertion.
    pub(crate) fn first_difference(&self) -> String {
        for observer in self.running() {
            let Some(agent) = &self.nodes[observer].agent else { continue };
            for (other, node) in self.nodes.iter().enumerate().filter(|(other, _)| *other != observer) {
                let expected = if node.agent.is_some() { node.items.len() } else { 0 };
                let known = agent.inventory.items_of(node.peer.id);
                if known != expected {
                    let views = [self.view(observer, other), self.view(other, observer)];
                    return format!("node {observer} knows {known} of {expected} items of node {other}: {views:#?}");
                }
            }
        }
        "no difference".into()
    }

    /// How many items a node's inventory has of another.
    pub(crate) fn known_items(&self, observer: NodeNumber, other: NodeNumber) -> usize {
        let agent = self.nodes[observer].agent.as_ref();
        agent.map_or(0, |agent| agent.inventory.items_of(self.nodes[other].peer.id))
    }

    /// What a running agent says of itself.
    pub(crate) fn status(&self, node: NodeNumber) -> MeshStatus {
        let agent = self.nodes[node].agent.as_ref().expect("it runs");
        agent.protocol.status(&agent.inventory, self.instant())
    }

    /// What a node signs with.
    pub(crate) fn key(&self, node: NodeNumber) -> SimulatedKey {
        SimulatedKey(self.nodes[node].peer.id)
    }

    /// How many others a node is connected to.
    pub(crate) fn neighbours(&self, node: NodeNumber) -> usize {
        self.nodes[node].agent.as_ref().map_or(0, |agent| agent.neighbours.len())
    }

    /// What one node's agent says of another.
    fn view(&self, observer: NodeNumber, other: NodeNumber) -> Option<MemberStatus> {
        self.nodes[observer].agent.as_ref()?;
        self.status(observer).members.into_iter().find(|member| member.peer_id == self.nodes[other].peer.id.to_string())
    }

    /// Asserts that inventories hold exactly what is there, of everyone and item by item.
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

    /// Who holds what, but for the one who asks.
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
        // A tag that points at what nobody holds is no voice, and images here are whole or not there.
        expected
    }

    /// Asserts that nobody believes in content that its holder never had.
    pub(crate) fn assert_nothing_invented(&self) {
        self.assert_nothing_invented_about(&self.running());
    }

    /// The same for these nodes alone.
    pub(crate) fn assert_nothing_invented_about(&self, honest: &[NodeNumber]) {
        for observer in honest.iter().copied() {
            let Some(agent) = &self.nodes[observer].agent else { continue };
            for item in 0..self.catalogue.items() {
                for peer in providers_in(&agent.inventory, self.catalogue.item(item)) {
                    let holder = self.number(peer).expect("a node of the simulation");
                    let had = !honest.contains(&holder) || self.nodes[holder].past_items.contains(&item);
                    assert!(had, "node {observer} believes that node {holder} has {:?}", self.catalogue.item(item));
                }
            }
        }
    }

    /// What all links carried, by node.
    pub(crate) fn traffic(&self) -> Vec<Traffic> {
        self.nodes.iter().map(|node| node.traffic).collect()
    }

    /// Something that decodes and is wrong.
    pub(super) fn falsify(&mut self, reply: SyncReply) -> SyncReply {
        let nonsense = || InventoryItem::Blob(Digest::of(b"nobody has this"));
        match reply {
            SyncReply::Entries(mut entries) => {
                entries.iter_mut().for_each(|entry| entry.changes.push(InventoryChange::Added(nonsense())));
                SyncReply::Entries(entries)
            }
            SyncReply::Snapshot(InventorySnapshot { heads, mut items }) => {
                let mut all = Bits::default();
                (0..heads.len()).for_each(|head| all.set(head));
                items.push((nonsense(), all));
                items.sort_by(|one, other| one.0.cmp(&other.0));
                SyncReply::Snapshot(InventorySnapshot { heads, items })
            }
            SyncReply::Introductions(mut introductions, refutations) => {
                introductions.iter_mut().for_each(|one| one.profile.version += 1);
                SyncReply::Introductions(introductions, refutations)
            }
            SyncReply::Summaries(mut marks) => {
                marks.iter_mut().for_each(|mark| mark.sequence += 3);
                SyncReply::Summaries(marks)
            }
            SyncReply::Busy => SyncReply::Busy,
        }
    }
}

/// Who holds it, as a table says.
fn providers_in(table: &Inventory, item: &InventoryItem) -> BTreeSet<PeerId> {
    match item {
        InventoryItem::Blob(digest) => table.blob_providers(*digest).into_iter().collect(),
        InventoryItem::Image(repository, Some(tag), root) => {
            table.tag(repository, tag).remove(root).unwrap_or_default().into_iter().collect()
        }
        InventoryItem::Image(repository, None, root) => table.image_providers(repository, *root).into_iter().collect(),
        InventoryItem::Fetching(digest) => table.partial_providers(*digest).into_iter().collect(),
        InventoryItem::Outage(_) => BTreeSet::new(),
    }
}

/// Bytes received, by what they were for.
pub(crate) fn shares(traffic: &[Traffic]) -> String {
    let sum = |kind: TrafficKind| traffic.iter().map(|one| one.received[kind as usize]).sum::<u64>() as f64;
    let all: f64 = TrafficKind::ALL.iter().map(|kind| sum(*kind)).sum();
    let share = |kind: &TrafficKind| format!("{kind:?} {:.0} %", 100.0 * sum(*kind) / all.max(1.0)).to_lowercase();
    TrafficKind::ALL.iter().map(share).collect::<Vec<_>>().join(", ")
}
