//! What the table answers, and that it is the same whichever way the news came.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::*;

fn id(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

fn peer(number: u8) -> Peer {
    let address = ([127, 0, 0, 1], 4000 + u16::from(number)).into();
    Peer { id: id(number), node: format!("node-{number}").parse().unwrap(), transfer: address, gossip: address }
}

fn blob(text: &str) -> Digest {
    Digest::of(text.as_bytes())
}

fn repository(path: &str) -> Repository {
    Repository { registry: "registry.test".into(), path: path.into() }
}

fn tagged(path: &str, tag: &str, digest: Digest) -> ContentChange {
    ContentChange::Tagged(repository(path), Some(tag.into()), digest)
}

fn inventory(of: impl IntoIterator<Item = (u8, Vec<ContentChange>)>) -> Inventory {
    let mut inventory = Inventory::default();
    for (number, items) in of {
        inventory.apply(MeshEvent::Up(peer(number)));
        inventory.apply(MeshEvent::Snapshot(id(number), items));
    }
    inventory
}

#[test]
fn a_blob_is_held_by_whoever_says_so() {
    let mut inventory = inventory([
        (1, vec![ContentChange::BlobAdded(blob("a"))]),
        (2, vec![ContentChange::BlobAdded(blob("a")), ContentChange::BlobAdded(blob("b"))]),
    ]);
    assert_eq!(inventory.holders(blob("a")), [id(1), id(2)]);
    assert_eq!(inventory.holders(blob("b")), [id(2)]);
    assert_eq!((inventory.blobs(), inventory.items_of(id(2))), (2, 2));
    assert_eq!(inventory.node_of(id(2)).unwrap().as_str(), "node-2");
    inventory.apply(MeshEvent::Changed(id(2), vec![ContentChange::BlobRemoved(blob("a"))]));
    assert_eq!(inventory.holders(blob("a")), [id(1)]);
}

#[test]
fn a_provider_holds_the_image_and_knows_it_by_the_same_repository() {
    let root = blob("index");
    let inventory = inventory([
        (1, vec![ContentChange::BlobAdded(root), tagged("team/app", "v1", root)]),
        (2, vec![ContentChange::BlobAdded(root), tagged("other/app", "v1", root)]),
        (3, vec![tagged("team/app", "v1", root)]),
        (4, vec![ContentChange::BlobAdded(root), ContentChange::Tagged(repository("team/app"), None, root)]),
        (5, vec![ContentChange::BlobAdded(root), tagged("team/app", "v1", blob("another"))]),
    ]);
    assert_eq!(inventory.providers(&repository("team/app"), root), [id(1), id(4)]);
    assert_eq!(inventory.providers(&repository("other/app"), root), [id(2)]);
    let elsewhere = Repository { registry: "invented.test".into(), path: "team/app".into() };
    assert_eq!(inventory.providers(&elsewhere, root), [], "a registry that somebody invented");
}

#[test]
fn a_tag_that_peers_disagree_about_shows_every_side() {
    let (old, new) = (blob("old"), blob("new"));
    let inventory = inventory([
        (1, vec![ContentChange::BlobAdded(new), tagged("app", "v1", new)]),
        (2, vec![ContentChange::BlobAdded(new), tagged("app", "v1", new), tagged("app", "v0", old)]),
        (3, vec![ContentChange::BlobAdded(old), tagged("app", "v1", old)]),
        (4, vec![tagged("app", "v1", blob("not held by the one who names it"))]),
    ]);
    let sides = inventory.tag(&repository("app"), "v1");
    assert_eq!(sides, BTreeMap::from([(new, vec![id(1), id(2)]), (old, vec![id(3)])]));
    assert!(inventory.tag(&repository("app"), "v2").is_empty());
}

#[test]
fn a_peer_that_is_down_holds_nothing() {
    let items = vec![ContentChange::BlobAdded(blob("a")), tagged("app", "v1", blob("a"))];
    let mut inventory = inventory([(1, items.clone()), (2, items)]);
    inventory.apply(MeshEvent::Down(id(1)));
    assert_eq!(inventory.holders(blob("a")), [id(2)]);
    assert_eq!(inventory.peers(), [&peer(2)]);
    inventory.apply(MeshEvent::Down(id(2)));
    assert_eq!((inventory.blobs(), inventory.images.len(), inventory.items_of(id(2))), (0, 0, 0));
    // A number is given out again; nothing of its former owner may show.
    inventory.apply(MeshEvent::Up(peer(3)));
    assert_eq!((inventory.peers.len(), inventory.items_of(id(3))), (2, 0));
}

#[test]
fn news_of_a_peer_that_is_not_up_is_ignored() {
    let mut inventory = Inventory::default();
    inventory.apply(MeshEvent::Changed(id(1), vec![ContentChange::BlobAdded(blob("a"))]));
    inventory.apply(MeshEvent::Snapshot(id(1), vec![ContentChange::BlobAdded(blob("a"))]));
    inventory.apply(MeshEvent::Down(id(1)));
    assert_eq!((inventory.blobs(), inventory.peers().len()), (0, 0));
}

#[test]
fn a_peer_that_moves_keeps_its_content() {
    let mut inventory = inventory([(1, vec![ContentChange::BlobAdded(blob("a"))])]);
    let moved = Peer { gossip: ([127, 0, 0, 2], 1).into(), ..peer(1) };
    inventory.apply(MeshEvent::Up(moved.clone()));
    assert_eq!(inventory.peers(), [&moved]);
    assert_eq!(inventory.holders(blob("a")), [id(1)]);
}

#[test]
fn no_peer_makes_us_keep_more_than_the_limit() {
    let numbered = |number: usize| ContentChange::BlobAdded(Digest::of(&number.to_le_bytes()));
    let mut inventory = inventory([(1, (0..MAX_ITEMS).map(numbered).collect())]);
    let more = vec![numbered(0), numbered(MAX_ITEMS), tagged("app", "v1", blob("a"))];
    assert_eq!(inventory.apply(MeshEvent::Changed(id(1), more)), 2, "what it holds already is not dropped again");
    assert_eq!((inventory.items_of(id(1)), inventory.blobs()), (MAX_ITEMS, MAX_ITEMS));
    let swap = vec![ContentChange::BlobRemoved(Digest::of(&0usize.to_le_bytes())), numbered(MAX_ITEMS)];
    assert_eq!(inventory.apply(MeshEvent::Changed(id(1), swap)), 0, "there is room again");
    assert_eq!(inventory.holders(Digest::of(&MAX_ITEMS.to_le_bytes())), [id(1)]);
}

fn any_change() -> impl Strategy<Value = ContentChange> {
    (0..4u8, 0..3u8, 0..2u8, proptest::option::of(0..2u8)).prop_map(|(kind, digest, path, tag)| {
        let digest = Digest::of(&[digest]);
        let repository = repository(&format!("app-{path}"));
        let tag = tag.map(|tag| format!("v{tag}"));
        match kind {
            0 => ContentChange::BlobAdded(digest),
            1 => ContentChange::BlobRemoved(digest),
            2 => ContentChange::Tagged(repository, tag, digest),
            _ => ContentChange::Untagged(repository, tag, digest),
        }
    })
}

fn any_event() -> impl Strategy<Value = MeshEvent> {
    let changes = || proptest::collection::vec(any_change(), 0..6);
    prop_oneof![
        1 => (0..3u8).prop_map(|number| MeshEvent::Up(peer(number))),
        1 => (0..3u8).prop_map(|number| MeshEvent::Down(id(number))),
        2 => (0..3u8, changes()).prop_map(|(number, items)| MeshEvent::Snapshot(id(number), items)),
        6 => (0..3u8, changes()).prop_map(|(number, changes)| MeshEvent::Changed(id(number), changes)),
    ]
}

/// The same in the plainest form: a set of items for each peer that is up.
fn plain(events: &[MeshEvent]) -> BTreeMap<PeerId, BTreeSet<ContentChange>> {
    let mut up: BTreeMap<PeerId, BTreeSet<ContentChange>> = BTreeMap::new();
    for event in events {
        let (peer, changes) = match event {
            MeshEvent::Up(peer) => (peer.id, Vec::new()),
            MeshEvent::Down(peer) => (*peer, Vec::new()),
            MeshEvent::Snapshot(peer, changes) | MeshEvent::Changed(peer, changes) => (*peer, changes.clone()),
        };
        match event {
            MeshEvent::Up(_) => drop(up.entry(peer).or_default()),
            MeshEvent::Down(_) => drop(up.remove(&peer)),
            MeshEvent::Snapshot(..) => drop(up.get_mut(&peer).map(BTreeSet::clear)),
            MeshEvent::Changed(..) => {}
        }
        let Some(items) = up.get_mut(&peer) else { continue };
        for change in changes {
            match change {
                ContentChange::BlobRemoved(digest) => items.remove(&ContentChange::BlobAdded(digest)),
                ContentChange::Untagged(repository, tag, digest) => {
                    items.remove(&ContentChange::Tagged(repository, tag, digest))
                }
                ContentChange::RegistryUp(outage) => items.remove(&ContentChange::RegistryDown(outage)),
                added => items.insert(added),
            };
        }
    }
    up
}

/// All that can be asked, by the names of the peers.
fn answers(inventory: &Inventory) -> impl PartialEq + std::fmt::Debug {
    let sorted = |mut peers: Vec<PeerId>| {
        peers.sort();
        peers
    };
    let mut lines = Vec::new();
    for digest in (0..3u8).map(|digest| Digest::of(&[digest])) {
        lines.push((digest.to_string(), sorted(inventory.holders(digest))));
        for path in ["app-0", "app-1"] {
            lines.push((format!("{path}@{digest}"), sorted(inventory.providers(&repository(path), digest))));
            for tag in ["v0", "v1"] {
                let side = inventory.tag(&repository(path), tag).remove(&digest).unwrap_or_default();
                lines.push((format!("{path}:{tag}@{digest}"), sorted(side)));
            }
        }
    }
    let counts: BTreeMap<PeerId, usize> =
        inventory.peers().iter().map(|peer| (peer.id, inventory.items_of(peer.id))).collect();
    // Entries too, since an empty one left behind answers like none.
    let images = inventory.images.values().flat_map(BTreeMap::values).map(BTreeMap::len).collect::<Vec<_>>();
    (lines, counts, inventory.blobs(), images.len(), images.iter().sum::<usize>())
}

proptest! {
    #[test]
    fn changes_end_where_a_snapshot_of_the_end_begins(events in proptest::collection::vec(any_event(), 0..40)) {
        let mut through_changes = Inventory::default();
        for event in &events {
            through_changes.apply(event.clone());
        }
        let mut at_once = Inventory::default();
        for (id, items) in plain(&events) {
            let number = id.public_key()[0];
            prop_assert_eq!(through_changes.items_of(id), items.len());
            at_once.apply(MeshEvent::Up(peer(number)));
            at_once.apply(MeshEvent::Snapshot(id, items.into_iter().collect()));
        }
        prop_assert_eq!(answers(&through_changes), answers(&at_once));
        for down in (0..3u8).map(id) {
            through_changes.apply(MeshEvent::Down(down));
        }
        prop_assert!(through_changes.blobs.is_empty() && through_changes.images.is_empty(), "nothing is left behind");
    }
}
