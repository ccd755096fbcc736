//! The contents of the address book, and damaged or foreign files.

use std::os::unix::fs::{PermissionsExt, symlink};

use proptest::prelude::*;

use super::*;

const NOW: u64 = 1_800_000_000;

fn known_peer(number: u16, zone: Option<&str>, last_seen: u64) -> KnownPeer {
    let mut key = [1; 32];
    key[..2].copy_from_slice(&number.to_be_bytes());
    let [high, low] = number.to_be_bytes();
    KnownPeer {
        peer_id: PeerId::from_public_key(key),
        node: format!("node-{number:05}").parse().unwrap(),
        zone: zone.map(|zone| zone.parse().unwrap()),
        release: Some("0.1.0".parse().unwrap()),
        transfer: SocketAddr::from(([10, 0, high, low], 4701)),
        gossip: SocketAddr::from(([10, 0, high, low], 4701)),
        last_seen,
    }
}

fn rank_by_number(peer: &PeerId) -> u64 {
    let key = peer.public_key();
    u16::from_be_bytes([key[0], key[1]]).into()
}

fn text(peers: &[KnownPeer]) -> Vec<u8> {
    serde_json::to_vec_pretty(&AddressBookFile { version: VERSION, peers: peers.to_vec() }).unwrap()
}

fn open_address_book(path: &Path) -> AddressBook {
    AddressBook::open(path.to_owned())
}

#[test]
fn peers_are_found_again_after_a_restart() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peers.json");
    let mut first = open_address_book(&path);
    let peers: Vec<_> = (1..4).map(|number| known_peer(number, Some("z"), now())).collect();
    let (to, written) = first.update(peers.clone()).expect("the address book changed");
    write_file(&to, &written);
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    let second = open_address_book(&path);
    assert_eq!(second.peers, peers);
    let addresses: BTreeSet<_> = second.addresses().into_iter().collect();
    assert_eq!(addresses, peers.iter().map(|peer| peer.transfer).collect());
    assert!(open_address_book(&folder.path().join("none")).peers.is_empty());
}

#[test]
fn the_file_is_written_when_something_changed() {
    let folder = tempfile::tempdir().unwrap();
    let mut book = open_address_book(&folder.path().join("peers.json"));
    let at = now();
    assert!(book.update(Vec::new()).is_none());
    assert!(book.update(vec![known_peer(1, None, at)]).is_some());
    assert!(book.update(vec![known_peer(1, None, at + 60)]).is_none(), "seen again");
    assert!(book.update(Vec::new()).is_none(), "a dead peer stays in the book");
    assert!(book.update(vec![known_peer(1, None, at + REWRITE_AFTER.as_secs())]).is_some());
    let moved = KnownPeer {
        transfer: SocketAddr::from(([10, 9, 9, 9], 1)),
        ..known_peer(1, None, at + REWRITE_AFTER.as_secs())
    };
    assert!(book.update(vec![moved]).is_some());
}

#[test]
fn the_zones_share_the_address_book() {
    let large = (0..5000).map(|number| known_peer(number, Some("large"), NOW));
    let small = (5000..5010).map(|number| known_peer(number, Some("small"), NOW));
    let none = (6000..6300).map(|number| known_peer(number, None, NOW));
    let selected = select_peers(large.chain(small).chain(none).collect(), Vec::new(), NOW, rank_by_number);
    let count_in_zone =
        |zone: Option<&str>| selected.iter().filter(|peer| peer.zone.as_ref().map(Zone::as_str) == zone).count();
    assert_eq!(
        (count_in_zone(Some("large")), count_in_zone(Some("small")), count_in_zone(None), selected.len()),
        (123, 10, 123, MAX_PEERS)
    );
}

#[test]
fn a_dead_peer_stays_in_the_file_for_a_week_if_there_is_room() {
    let week = RETENTION.as_secs();
    let saved_peers =
        vec![known_peer(1, None, NOW - week), known_peer(2, None, NOW - week - 1), known_peer(3, None, NOW - 5)];
    let selected = select_peers(vec![known_peer(3, None, NOW)], saved_peers.clone(), NOW, rank_by_number);
    assert_eq!(selected, [known_peer(1, None, NOW - week), known_peer(3, None, NOW)]);
    let full = (100..1000).map(|number| known_peer(number, None, NOW)).collect();
    let selected = select_peers(full, saved_peers, NOW, rank_by_number);
    assert!(selected.len() == MAX_PEERS && selected.iter().all(|peer| peer.last_seen == NOW), "live peers come first");
}

#[test]
fn the_saved_peers_of_a_cluster_hardly_change_when_a_node_joins() {
    let rank = RandomState::new();
    let select = |count| {
        let live_peers = (0..count).map(|number| known_peer(number, None, NOW)).collect();
        let selected = select_peers(live_peers, Vec::new(), NOW, |peer| rank.hash_one(peer));
        selected.into_iter().map(|peer| peer.peer_id).collect::<BTreeSet<_>>()
    };
    assert!(select(3000).difference(&select(3001)).count() <= 1);
}

#[test]
fn the_longest_names_fit_into_the_file() {
    let peers: Vec<_> = (0..MAX_PEERS as u16)
        .map(|number| KnownPeer {
            node: "n".repeat(253).parse().unwrap(),
            zone: Some("z".repeat(63).parse().unwrap()),
            release: Some("9".repeat(32).parse().unwrap()),
            transfer: SocketAddr::new([0xffff_u16; 8].into(), u16::MAX),
            gossip: SocketAddr::new([0xffff_u16; 8].into(), u16::MAX),
            ..known_peer(number, None, u64::MAX)
        })
        .collect();
    assert!(text(&peers).len() as u64 <= MAX_BYTES);
}

#[test]
fn a_file_that_other_users_may_have_written_is_not_used() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peers.json");
    let peers = [known_peer(1, None, now())];
    write_file(&path, &text(&peers));
    assert_eq!(open_address_book(&path).peers, peers);
    for mode in [0o640, 0o602, 0o666] {
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        assert!(open_address_book(&path).peers.is_empty(), "{mode:o}");
    }
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let link = folder.path().join("link");
    symlink(&path, &link).unwrap();
    assert!(open_address_book(&link).peers.is_empty(), "a link may lead anywhere");
    assert!(open_address_book(folder.path()).peers.is_empty(), "a folder");
    write_file(&path, &[text(&peers), vec![b' '; MAX_BYTES as usize]].concat());
    assert!(open_address_book(&path).peers.is_empty(), "too long");
}

#[test]
fn a_malformed_file_is_not_used() {
    let good = text(&[known_peer(1, Some("z"), NOW)]);
    assert_eq!(decode(&good, NOW).unwrap().len(), 1);
    for length in 0..good.len() {
        assert!(decode(&good[..length], NOW).is_err(), "the first {length} bytes");
    }
    let json = String::from_utf8(good).unwrap();
    for (from, to) in [
        ("12D3KooW", "12D3KooX"),
        ("10.0.0.1:4701", "10.0.0.1"),
        ("node-00001", "Node\\n"),
        ("\"z\"", "\"z z\""),
        ("0.1.0", ""),
    ] {
        assert!(json.contains(from), "{from}");
        assert!(decode(json.replace(from, to).as_bytes(), NOW).is_err(), "{to:?} for {from}");
    }
    let many: Vec<_> = (0..=MAX_PEERS as u16).map(|number| known_peer(number, None, NOW)).collect();
    assert!(decode(&text(&many), NOW).is_err());
}

/// The file as the first release wrote it.
const GOLDEN: &str = include_str!("../golden/peers-1.json");

#[test]
fn the_file_is_as_released_agents_read_and_write_it() {
    let peers = [known_peer(1, Some("z"), NOW), KnownPeer { release: None, ..known_peer(2, None, NOW) }];
    assert_eq!(String::from_utf8(text(&peers)).unwrap(), GOLDEN.trim_end(), "other builds read this file");
    assert_eq!(decode(GOLDEN.as_bytes(), NOW).unwrap(), peers);
    let newer = GOLDEN.replace("\"version\": 1", "\"version\": 1, \"added\": {\"later\": 1}");
    let newer = newer.replace("\"node\"", "\"added\": [\"later\"], \"node\"");
    assert_eq!(decode(newer.as_bytes(), NOW).unwrap(), peers, "fields of a later build are ignored");
}

#[test]
fn a_file_of_a_later_version_survives_a_rollback() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peers.json");
    let later = br#"{"version": 2, "peers": {"by": "zone"}}"#;
    write_file(&path, later);
    let mut rolled_back = open_address_book(&path);
    assert!(rolled_back.peers.is_empty());
    let (to, written) = rolled_back.update(vec![known_peer(1, None, now())]).expect("the address book changed");
    assert!(write_file(&to, &written));
    assert_eq!(open_address_book(&path).peers.len(), 1, "this build writes a file of its own");
    assert_eq!(std::fs::read(folder.path().join("peers.json.version-2")).unwrap(), later);
}

#[test]
fn a_clock_that_went_back_keeps_no_peer_for_ever() {
    assert_eq!(decode(&text(&[known_peer(1, None, NOW + 1_000_000)]), NOW).unwrap(), [known_peer(1, None, NOW)]);
    assert!(decode(&text(&[known_peer(1, None, NOW - RETENTION.as_secs() - 1)]), NOW).unwrap().is_empty());
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..512)) {
        let _ = decode(&bytes, NOW);
    }

    #[test]
    fn each_selected_peer_was_given_and_is_selected_once(
        alive in proptest::collection::btree_set(0u16..400, 0..400),
        remembered in proptest::collection::btree_set(0u16..400, 0..200),
    ) {
        let zones = [None, Some("a"), Some("b")];
        let peers = |numbers: &BTreeSet<u16>, at: u64| -> Vec<_> {
            numbers.iter().map(|number| known_peer(*number, zones[usize::from(*number) % 3], at)).collect()
        };
        let chosen = select_peers(peers(&alive, NOW), peers(&remembered, NOW - 9), NOW, rank_by_number);
        let numbers: BTreeSet<_> = chosen.iter().map(|peer| rank_by_number(&peer.peer_id) as u16).collect();
        prop_assert_eq!(numbers.len(), chosen.len());
        prop_assert!(numbers.is_subset(&alive.union(&remembered).copied().collect()));
        prop_assert_eq!(chosen.len(), alive.union(&remembered).count().min(MAX_PEERS));
    }
}
