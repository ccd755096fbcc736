//! The canonical form, byte for byte, and its uniqueness.

use proptest::prelude::*;

use super::*;

/// In the order of their canonical bytes.
const KINDS: [OutageKind; 5] =
    [OutageKind::NoSuchHost, OutageKind::Refused, OutageKind::TimedOut, OutageKind::Tls, OutageKind::ServerError];

fn digest(byte: u8) -> Digest {
    Digest::from_bytes([byte; 32])
}

fn image(tag: Option<&str>) -> InventoryItem {
    let repository = Repository { registry: "r.test:5000".into(), path: "team/app".into() };
    InventoryItem::Image(repository, tag.map(str::to_owned), digest(2))
}

fn outage() -> InventoryItem {
    InventoryItem::Outage(Outage { registry: "r.test".into(), kind: OutageKind::TimedOut, since: 1_700_000_000 })
}

fn canonical_bytes(items: &[InventoryItem]) -> Vec<u8> {
    let mut bytes = Vec::new();
    items.iter().for_each(|item| item.write_canonical(&mut |part| bytes.extend_from_slice(part)));
    bytes
}

#[test]
fn the_canonical_form_is_stable() {
    let blob = [&[0][..], &[1; 32]].concat();
    assert_eq!(canonical_bytes(&[InventoryItem::Blob(digest(1))]), blob);
    let tagged = [b"\x01\x00\x0br.test:5000\x00\x08team/app\x01\x00\x02v1", &[2; 32][..]].concat();
    assert_eq!(canonical_bytes(&[image(Some("v1"))]), tagged);
    let untagged = [b"\x01\x00\x0br.test:5000\x00\x08team/app\x00", &[2; 32][..]].concat();
    assert_eq!(canonical_bytes(&[image(None)]), untagged);
    assert_eq!(canonical_bytes(&[outage()]), b"\x02\x00\x06r.test\x02\x00\x00\x00\x00\x65\x53\xf1\x00");
    assert_eq!(KINDS.map(outage_kind_byte), [0, 1, 2, 3, 4]);
    assert!(KINDS.is_sorted(), "the order of kinds is part of the form");
}

/// An independent program computed the digests.
#[test]
fn state_and_change_digests_are_stable() {
    let blob = InventoryItem::Blob(digest(1));
    let state = "sha256:0a9056951067538353393ac945577e0f2155d94eb297cc84360be6102840ef81";
    let items = [blob.clone(), image(None), image(Some("v1")), outage()];
    assert_eq!(state_digest(&items).to_string(), state);
    assert_eq!(state_digest(items.iter().rev().chain(&items)).to_string(), state, "order and repetition do not count");
    let changes = [InventoryChange::Added(image(Some("v1"))), InventoryChange::Removed(blob)];
    let digest = "sha256:ff3c0e2b99fd3adeef71fbc3ab2466aee29712c014ad2101c056851f7dada062";
    assert_eq!(changes_digest(&changes).to_string(), digest);
    let [added, removed] = changes;
    assert_ne!(changes_digest(&[removed, added]).to_string(), digest, "the order of changes counts");
}

#[test]
fn texts_of_any_length_have_distinct_canonical_forms() {
    for length in [0xfffe, 0xffff, 0x1_0000, 0x1_0001] {
        let repository = Repository { registry: "x".repeat(length), path: "x".into() };
        let item = InventoryItem::Image(repository, None, digest(0));
        assert_eq!(read(&canonical_bytes(std::slice::from_ref(&item))), [item], "{length} bytes");
    }
}

/// Parses a canonical form. A form that parses back to its items belongs to no other items.
fn read(mut bytes: &[u8]) -> Vec<InventoryItem> {
    fn part<'a>(bytes: &mut &'a [u8], length: usize) -> &'a [u8] {
        let (part, rest) = bytes.split_at(length);
        *bytes = rest;
        part
    }
    fn number(bytes: &mut &[u8], length: usize) -> u64 {
        part(bytes, length).iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }
    fn text(bytes: &mut &[u8]) -> String {
        let length = match number(bytes, 2) {
            0xffff => number(bytes, 8),
            length => length,
        };
        String::from_utf8(part(bytes, usize::try_from(length).unwrap()).to_vec()).unwrap()
    }
    fn digest(bytes: &mut &[u8]) -> Digest {
        Digest::from_bytes(part(bytes, 32).try_into().unwrap())
    }
    let mut items = Vec::new();
    while !bytes.is_empty() {
        items.push(match number(&mut bytes, 1) {
            0 => InventoryItem::Blob(digest(&mut bytes)),
            1 => {
                let repository = Repository { registry: text(&mut bytes), path: text(&mut bytes) };
                let tag = (number(&mut bytes, 1) == 1).then(|| text(&mut bytes));
                InventoryItem::Image(repository, tag, digest(&mut bytes))
            }
            _ => InventoryItem::Outage(Outage {
                registry: text(&mut bytes),
                kind: KINDS[usize::try_from(number(&mut bytes, 1)).unwrap()],
                since: number(&mut bytes, 8),
            }),
        });
    }
    items
}

fn any_item() -> impl Strategy<Value = InventoryItem> {
    // Few different letters, so one text is often the beginning of another.
    let text = || "[ab\0]{0,3}";
    let digest = || any::<[u8; 32]>().prop_map(Digest::from_bytes);
    prop_oneof![
        digest().prop_map(InventoryItem::Blob),
        (text(), text(), proptest::option::of(text()), digest())
            .prop_map(|(registry, path, tag, digest)| InventoryItem::Image(Repository { registry, path }, tag, digest)),
        (text(), 0..KINDS.len(), any::<u64>()).prop_map(|(registry, kind, since)| InventoryItem::Outage(Outage {
            registry,
            kind: KINDS[kind],
            since
        })),
    ]
}

proptest! {
    #[test]
    fn different_item_lists_have_different_canonical_forms(items in proptest::collection::vec(any_item(), 0..6)) {
        prop_assert_eq!(read(&canonical_bytes(&items)), items);
    }
}
