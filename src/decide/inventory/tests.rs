//! The answers of the inventory, compared with the answers of plain sets.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use rand::{SeedableRng, rngs::SmallRng};

use super::*;

pub(super) fn id(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

fn peer(number: u8) -> Peer {
    let address = ([127, 0, 0, 1], 4000 + u16::from(number)).into();
    Peer {
        id: id(number),
        node: format!("node-{number}").parse().unwrap(),
        zone: None,
        transfer: address,
        gossip: address,
    }
}

pub(super) fn blob(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

pub(super) fn repository(path: &str) -> Repository {
    Repository { registry: "registry.test".into(), path: path.into() }
}

pub(super) fn tagged(path: &str, tag: &str, digest: Digest) -> InventoryItem {
    InventoryItem::Image(repository(path), Some(tag.into()), digest)
}

fn outage(registry: &str, since: u64) -> InventoryItem {
    InventoryItem::Outage(Outage { registry: registry.into(), kind: OutageKind::TimedOut, since })
}

pub(super) fn inventory(contents: impl IntoIterator<Item = (u8, Vec<InventoryItem>)>) -> Inventory {
    let mut inventory = Inventory::default();
    for (number, items) in contents {
        inventory.apply(MeshEvent::Up(peer(number)));
        inventory.apply(MeshEvent::Snapshot(id(number), items));
    }
    inventory
}

#[test]
fn a_blob_has_the_providers_that_announced_the_blob() {
    let mut inventory = inventory([
        (1, vec![InventoryItem::Blob(blob("a"))]),
        (2, vec![InventoryItem::Blob(blob("a")), InventoryItem::Blob(blob("b"))]),
    ]);
    assert_eq!(inventory.blob_providers(blob("a")), [id(1), id(2)]);
    assert_eq!(inventory.blob_providers(blob("b")), [id(2)]);
    assert_eq!((inventory.blobs(), inventory.items_of(id(2))), (2, 2));
    assert_eq!(inventory.node_of(id(2)).unwrap().as_str(), "node-2");
    inventory.apply(MeshEvent::Changed(id(2), vec![InventoryChange::Removed(InventoryItem::Blob(blob("a")))]));
    assert_eq!(inventory.blob_providers(blob("a")), [id(1)]);
}

#[test]
fn a_tag_that_peers_disagree_about_has_every_digest() {
    let (old, new) = (blob("old"), blob("new"));
    let inventory = inventory([
        (1, vec![InventoryItem::Blob(new), tagged("app", "v1", new)]),
        (2, vec![InventoryItem::Blob(new), tagged("app", "v1", new), tagged("app", "v0", old)]),
        (3, vec![InventoryItem::Blob(old), tagged("app", "v1", old)]),
        (4, vec![tagged("app", "v1", blob("absent from the peer that names it"))]),
    ]);
    let digests = inventory.tag(&repository("app"), "v1");
    assert_eq!(digests, BTreeMap::from([(new, vec![id(1), id(2)]), (old, vec![id(3)])]));
    assert!(inventory.tag(&repository("app"), "v2").is_empty());
}

#[test]
fn a_down_peer_provides_nothing_until_its_return() {
    let items = vec![InventoryItem::Blob(blob("a")), tagged("app", "v1", blob("a"))];
    let mut inventory = inventory([(1, items.clone()), (2, items)]);
    inventory.apply(MeshEvent::Down(id(1)));
    assert_eq!(inventory.blob_providers(blob("a")), [id(2)]);
    assert_eq!(inventory.peers(), [&peer(2)]);
    inventory.apply(MeshEvent::Down(id(2)));
    assert_eq!((inventory.blobs(), inventory.items_of(id(2)), inventory.node_of(id(2))), (0, 0, None));
    assert_eq!(inventory.items(), 2, "the items of hidden peers are kept");
    inventory.apply(MeshEvent::Up(peer(2)));
    assert_eq!(inventory.image_providers(&repository("app"), blob("a")), [id(2)]);
    assert_eq!((inventory.blobs(), inventory.items_of(id(2))), (1, 2));
}

#[test]
fn a_forgotten_peer_leaves_nothing_to_the_next_peer_with_its_number() {
    let items = vec![InventoryItem::Blob(blob("a")), tagged("app", "v1", blob("a")), outage("r.test", 5)];
    let mut inventory = inventory([(1, items), (2, vec![])]);
    inventory.forget(id(1));
    assert_eq!((inventory.items(), inventory.peers()), (0, vec![&peer(2)]));
    inventory.apply(MeshEvent::Up(peer(3)));
    assert_eq!((inventory.peers.number_of(id(3)), inventory.items_of(id(3))), (Some(0), 0));
    inventory.forget(id(2));
    inventory.forget(id(3));
    assert_eq!((inventory.peers.number_of(id(2)), inventory.peers()), (None, vec![]));
}

#[test]
fn changes_of_a_down_peer_count_once_the_peer_is_up() {
    let mut inventory = Inventory::default();
    inventory.apply(MeshEvent::Snapshot(id(1), vec![InventoryItem::Blob(blob("a"))]));
    inventory.apply(MeshEvent::Changed(id(1), vec![InventoryChange::Added(InventoryItem::Blob(blob("b")))]));
    inventory.apply(MeshEvent::Down(id(2)));
    assert_eq!((inventory.blobs(), inventory.peers().len(), inventory.items()), (0, 0, 2));
    inventory.apply(MeshEvent::Up(peer(1)));
    assert_eq!((inventory.blob_providers(blob("a")), inventory.blob_providers(blob("b"))), (vec![id(1)], vec![id(1)]));
}

#[test]
fn a_peer_that_moves_keeps_its_content() {
    let mut inventory = inventory([(1, vec![InventoryItem::Blob(blob("a"))])]);
    let moved = Peer { gossip: ([127, 0, 0, 2], 1).into(), ..peer(1) };
    inventory.apply(MeshEvent::Up(moved.clone()));
    assert_eq!(inventory.peers(), [&moved]);
    assert_eq!(inventory.blob_providers(blob("a")), [id(1)]);
}

#[test]
fn a_peer_has_at_most_the_maximum_number_of_items() {
    let numbered = |number: usize| InventoryItem::Blob(Digest::of(&number.to_le_bytes()));
    let mut inventory = inventory([(1, (0..MAX_ITEMS).map(numbered).collect())]);
    let more = [numbered(0), numbered(MAX_ITEMS), tagged("app", "v1", blob("a"))].map(InventoryChange::Added).to_vec();
    assert_eq!(inventory.apply(MeshEvent::Changed(id(1), more)), 2, "an item that is present is not dropped");
    assert_eq!((inventory.items_of(id(1)), inventory.blobs()), (MAX_ITEMS, MAX_ITEMS));
    let swap = vec![InventoryChange::Removed(numbered(0)), InventoryChange::Added(numbered(MAX_ITEMS))];
    assert_eq!(inventory.apply(MeshEvent::Changed(id(1), swap)), 0, "the removed item makes room");
    assert_eq!(inventory.blob_providers(Digest::of(&MAX_ITEMS.to_le_bytes())), [id(1)]);
}

#[test]
fn shared_items_have_a_bit_for_each_peer_in_the_requested_order() {
    let mut inventory = inventory([
        (1, vec![InventoryItem::Blob(blob("a")), outage("r.test", 5)]),
        (2, vec![InventoryItem::Blob(blob("a")), tagged("app", "v1", blob("a"))]),
        (3, vec![InventoryItem::Blob(blob("b"))]),
    ]);
    inventory.hide(id(1));
    let shared = inventory.shared_items(&[id(2), id(9), id(1)]);
    let expected = [
        (InventoryItem::Blob(blob("a")), Bits(vec![0b101])),
        (tagged("app", "v1", blob("a")), Bits(vec![0b001])),
        (outage("r.test", 5), Bits(vec![0b100])),
    ];
    assert_eq!(shared, expected);
    let many: Vec<_> = [id(9); MAX_SHARED].into_iter().chain([id(3)]).collect();
    assert_eq!(inventory.shared_items(&many), [], "peers beyond the limit are left out");
    assert_eq!(inventory.shared_items(&many[1..])[0].1, Bits([vec![0; 31], vec![0x80]].concat()));
}

/// The size that the inventory is made for: 300 of 2000 images on each of 1000 nodes, ten blobs per
/// image.
#[test]
fn a_thousand_nodes_of_three_hundred_images_need_little_memory() {
    let image = |image: usize| {
        let blobs = (0..10).map(move |layer| Digest::of(&(image * 10 + layer).to_le_bytes()));
        let name = tagged(&format!("team-{}/application-{image}", image % 40), "v1.2.3", blobs.clone().next().unwrap());
        blobs.map(InventoryItem::Blob).chain([name]).collect::<Vec<_>>()
    };
    let images: Vec<_> = (0..2000).map(image).collect();
    let mut random = SmallRng::seed_from_u64(4);
    let mut inventory = Inventory::default();
    for node in 0..1000u16 {
        let mut key = [0; 32];
        key[..2].copy_from_slice(&node.to_le_bytes());
        let chosen = rand::seq::index::sample(&mut random, images.len(), 300);
        let items = chosen.into_iter().flat_map(|image| images[image].iter().cloned());
        inventory.replace(PeerId::from_public_key(key), items);
    }
    assert_eq!(inventory.items(), 22_000);
    assert!(inventory.bytes() < 40 << 20, "{} bytes", inventory.bytes());
}

fn any_item() -> impl Strategy<Value = InventoryItem> {
    (0..5u8, 0..3u8, 0..2u8, proptest::option::of(0..2u8)).prop_map(|(kind, digest, path, tag)| {
        let named = repository(&format!("app-{path}"));
        match kind {
            0 | 1 => InventoryItem::Blob(Digest::of(&[digest])),
            2 | 3 => InventoryItem::Image(named, tag.map(|tag| format!("v{tag}")), Digest::of(&[digest])),
            _ => outage(&format!("r-{path}.test"), digest.into()),
        }
    })
}

fn any_change() -> impl Strategy<Value = InventoryChange> {
    prop_oneof![2 => any_item().prop_map(InventoryChange::Added), 1 => any_item().prop_map(InventoryChange::Removed)]
}

/// Enough peers for both forms of a provider set.
const PEERS: u8 = 6;

#[derive(Debug, Clone)]
enum InventoryStep {
    Up(u8),
    Hide(u8),
    Forget(u8),
    Replace(u8, Vec<InventoryItem>),
    Change(u8, Vec<InventoryChange>),
}

fn any_step() -> impl Strategy<Value = InventoryStep> {
    let items = || proptest::collection::vec(any_item(), 0..8);
    let changes = || proptest::collection::vec(any_change(), 0..8);
    prop_oneof![
        2 => (0..PEERS).prop_map(InventoryStep::Up),
        1 => (0..PEERS).prop_map(InventoryStep::Hide),
        1 => (0..PEERS).prop_map(InventoryStep::Forget),
        2 => (0..PEERS, items()).prop_map(|(number, items)| InventoryStep::Replace(number, items)),
        4 => (0..PEERS, changes()).prop_map(|(number, changes)| InventoryStep::Change(number, changes)),
    ]
}

/// The inventory in the plainest form: a set of items per peer, and the peers that are up.
#[derive(Default)]
struct PlainInventory {
    items: BTreeMap<PeerId, BTreeSet<InventoryItem>>,
    up: BTreeSet<PeerId>,
}

impl PlainInventory {
    fn step(&mut self, step: InventoryStep) {
        match step {
            InventoryStep::Up(number) => {
                self.up.insert(id(number));
            }
            InventoryStep::Hide(number) => {
                self.up.remove(&id(number));
            }
            InventoryStep::Forget(number) => {
                self.up.remove(&id(number));
                self.items.remove(&id(number));
            }
            InventoryStep::Replace(number, items) => drop(self.items.insert(id(number), items.into_iter().collect())),
            InventoryStep::Change(number, changes) => {
                let items = self.items.entry(id(number)).or_default();
                for change in changes {
                    match change {
                        InventoryChange::Added(item) => items.insert(item),
                        InventoryChange::Removed(item) => items.remove(&item),
                    };
                }
            }
        }
    }

    fn has(&self, peer: PeerId, item: &InventoryItem) -> bool {
        self.items.get(&peer).is_some_and(|items| items.contains(item))
    }

    /// The peers that are up and meet the condition.
    fn up_peers_where(&self, is_counted: impl Fn(PeerId) -> bool) -> BTreeSet<PeerId> {
        self.up.iter().copied().filter(|peer| is_counted(*peer)).collect()
    }

    fn all(&self, counting: impl Fn(&PeerId) -> bool) -> BTreeSet<InventoryItem> {
        let counted = self.items.iter().filter(|(peer, _)| counting(peer));
        counted.flat_map(|(_, items)| items.iter().cloned()).collect()
    }
}

fn set(peers: Vec<PeerId>) -> BTreeSet<PeerId> {
    let count = peers.len();
    let set: BTreeSet<_> = peers.into_iter().collect();
    assert_eq!(set.len(), count, "a peer is named once");
    set
}

fn assert_same_answers(inventory: &Inventory, plain: &PlainInventory) {
    let digests = [0u8, 1, 2].map(|digest| Digest::of(&[digest]));
    for digest in digests {
        let blob = InventoryItem::Blob(digest);
        assert_eq!(set(inventory.blob_providers(digest)), plain.up_peers_where(|peer| plain.has(peer, &blob)));
        for named in ["app-0", "app-1"].map(repository) {
            let names = [None, Some("v0"), Some("v1")]
                .map(|tag| InventoryItem::Image(named.clone(), tag.map(str::to_owned), digest));
            let is_provider = |peer| plain.has(peer, &blob) && names.iter().any(|name| plain.has(peer, name));
            assert_eq!(set(inventory.image_providers(&named, digest)), plain.up_peers_where(is_provider));
            for (tag, name) in ["v0", "v1"].into_iter().zip(&names[1..]) {
                let peers = inventory.tag(&named, tag).remove(&digest);
                let providers = plain.up_peers_where(|peer| plain.has(peer, &blob) && plain.has(peer, name));
                assert_eq!(peers.map(set), (!providers.is_empty()).then_some(providers));
            }
        }
    }
    let counting = plain.all(|peer| plain.up.contains(peer));
    assert_eq!(inventory.blobs(), counting.iter().filter(|item| matches!(item, InventoryItem::Blob(_))).count());
    let outages: Vec<_> = counting.into_iter().filter(|item| matches!(item, InventoryItem::Outage(_))).collect();
    let reported = |(outage, peers): (&Outage, _)| (InventoryItem::Outage(outage.clone()), set(peers));
    let expected: Vec<_> =
        outages.into_iter().map(|item| (item.clone(), plain.up_peers_where(|peer| plain.has(peer, &item)))).collect();
    assert_eq!(inventory.all_outages().map(reported).collect::<Vec<_>>(), expected);
    let of_each: Vec<_> =
        ["r-0.test", "r-1.test"].into_iter().flat_map(|r| inventory.outages(r)).map(reported).collect();
    assert_eq!(of_each, expected);
}

fn assert_same_content(inventory: &Inventory, plain: &PlainInventory) {
    let empty = BTreeSet::new();
    assert_eq!(set(inventory.peers().iter().map(|peer| peer.id).collect()), plain.up);
    for id in (0..PEERS).map(id) {
        let items = plain.items.get(&id).unwrap_or(&empty);
        let is_up = plain.up.contains(&id);
        assert_eq!(inventory.items_of(id), if is_up { items.len() } else { 0 });
        assert_eq!(inventory.node_of(id).is_some(), is_up);
    }
    assert_eq!(inventory.items(), plain.all(|_| true).len());
    let requested = [4, 2, 0, 5].map(id);
    let bits = |item: &InventoryItem| {
        let mut bits = Bits::none_of(requested.len());
        requested
            .iter()
            .enumerate()
            .filter(|(_, peer)| plain.has(**peer, item))
            .for_each(|(position, _)| bits.set(position));
        bits
    };
    let expected = plain.all(|peer| requested.contains(peer)).into_iter().map(|item| (item.clone(), bits(&item)));
    assert_eq!(inventory.shared_items(&requested), expected.collect::<Vec<_>>());
}

proptest! {
    #[test]
    fn every_answer_after_any_order_of_steps_equals_that_of_plain_sets(steps in proptest::collection::vec(any_step(), 0..60)) {
        let (mut inventory, mut plain) = (Inventory::default(), PlainInventory::default());
        for step in steps {
            plain.step(step.clone());
            match step {
                InventoryStep::Up(number) => inventory.up(peer(number)),
                InventoryStep::Hide(number) => inventory.hide(id(number)),
                InventoryStep::Forget(number) => inventory.forget(id(number)),
                InventoryStep::Replace(number, items) => prop_assert_eq!(inventory.replace(id(number), items), 0),
                InventoryStep::Change(number, changes) => prop_assert_eq!(inventory.change(id(number), changes), 0),
            }
            assert_same_answers(&inventory, &plain);
            assert_same_content(&inventory, &plain);
        }
        (0..PEERS).for_each(|number| inventory.forget(id(number)));
        prop_assert_eq!((inventory.items(), inventory.peers().len()), (0, 0), "no item and no peer is left");
    }
}
