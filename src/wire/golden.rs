//! The bodies of all messages as released agents write them, byte for byte. A line of
//! `golden/PROTOCOL-MAJOR` has a message's name and the hexadecimal digits of its body.
//!
//! A change that fails here is visible to released agents, so the change needs a MINOR or a MAJOR.
//! After a new MAJOR the file of the MAJOR before stays, and [`Message::Previous`] reads its
//! messages.

use std::collections::BTreeMap;
use std::fmt::{Debug, Write};
use std::path::{Path, PathBuf};

use super::*;
use crate::model::{
    Bits, Credential, Introduction, InventoryChange, InventoryItem, InventorySnapshot, LeaveNotice, LogEntry, LogHead,
    MemberSummary, Outage, OutageKind, PeerId, PieceMapUpdate, Profile, Refutation, Signature, Suspicion,
};
use crate::oci::{Digest, Repository};

/// The lines of the files, without the lines that were compared.
#[derive(Default)]
struct Golden {
    lines: BTreeMap<PathBuf, BTreeMap<String, String>>,
    mismatches: Vec<String>,
}

fn file(protocol: ProtocolKind, format: Format) -> PathBuf {
    let name = format!("src/wire/golden/{protocol}-{}", format.version().major);
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}

fn read_lines(path: &Path) -> BTreeMap<String, String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let lines = text.lines().filter_map(|line| line.split_once(' '));
    lines.map(|(name, digits)| (name.to_owned(), digits.to_owned())).collect()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut digits, byte| {
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}

impl Golden {
    fn compare<M: Message + PartialEq + Debug>(&mut self, name: &str, message: &M) {
        for format in M::VERSIONS.formats() {
            let path = file(M::VERSIONS.protocol(), format);
            let lines = self.lines.entry(path.clone()).or_insert_with(|| read_lines(&path));
            let recorded = lines.remove(name);
            let frame = encode_in(message, format).unwrap();
            let written = hexadecimal(&frame[HEADER..]);
            // A message that the current MAJOR adds has no line in the file of the MAJOR before.
            if recorded.as_ref() != Some(&written) && !(format.is_previous() && recorded.is_none()) {
                self.mismatches.push(format!("{}: {name} {written}", path.display()));
            }
            let read = decode::<M>(&frame).unwrap();
            assert!(format.is_previous() || read == *message, "{name} reads back as {read:?}");
        }
    }
}

fn peer(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

fn hello() -> Hello {
    Hello {
        credential: Credential::new("e30.e30.c2ln".into()),
        node: "node-1".into(),
        gossip_port: 4701,
        observed_address: [10, 0, 0, 7].into(),
    }
}

fn transfer(golden: &mut Golden) {
    let digest = Digest::of(b"blob");
    golden.compare("hello", &hello());
    golden.compare("hello_ipv6", &Hello { observed_address: "fd00::7".parse().unwrap(), ..hello() });
    golden.compare("welcome_admitted", &Welcome::Admitted(hello()));
    golden.compare("welcome_refused", &Welcome::Rejected("no".into()));
    golden.compare("request_have", &Request::Have(digest));
    golden.compare("request_get", &Request::Get { digest, offset: 1 << 40, length: 300 });
    golden.compare("request_pieces", &Request::Pieces { digest, pieces: vec![511, 0, 7], limit: 2 });
    golden.compare("request_chain", &Request::HashChain(digest));
    golden.compare("request_follow", &Request::Follow(digest));
    golden.compare("answer_blob", &Answer::Blob { size: 1 << 33 });
    golden.compare("answer_partial", &Answer::Partial { size: 251 });
    golden.compare("answer_absent", &Answer::Absent);
    golden.compare("answer_busy", &Answer::Busy);
    golden.compare("answer_invalid", &Answer::Invalid { size: 1 });
    golden.compare("answer_failed", &Answer::Failed);
    golden.compare("availability_these", &PieceMapUpdate::Map(Bits(vec![0b101, 0xff])));
    golden.compare("availability_also", &PieceMapUpdate::Have(vec![3, 300]));
    golden.compare("availability_whole", &PieceMapUpdate::HaveAll);
}

fn signature() -> Signature {
    Signature([7; 32], [8; 32])
}

fn head() -> LogHead {
    let (changes, state) = (Digest::of(b"changes"), Digest::of(b"state"));
    LogHead { publisher: peer(1), epoch: 1 << 50, sequence: 300, changes, state, signature: signature() }
}

fn items() -> Vec<InventoryItem> {
    let repository = Repository { registry: "registry.example:5000".into(), path: "team/app".into() };
    let digest = Digest::of(b"image");
    let outage =
        |kind| InventoryItem::Outage(Outage { registry: "registry.example".into(), kind, since: 1_800_000_000 });
    let mut items = vec![
        InventoryItem::Blob(digest),
        InventoryItem::Image(repository.clone(), Some("v1".into()), digest),
        InventoryItem::Image(repository, None, digest),
        InventoryItem::Fetching(digest),
    ];
    items.extend(
        [OutageKind::NoSuchHost, OutageKind::Refused, OutageKind::TimedOut, OutageKind::Tls, OutageKind::ServerError]
            .map(outage),
    );
    items
}

fn entry() -> LogEntry {
    let changes = items().into_iter().map(InventoryChange::Added);
    LogEntry {
        head: head(),
        changes: changes.chain([InventoryChange::Removed(InventoryItem::Blob(Digest::of(b"old")))]).collect(),
    }
}

fn introduction() -> Introduction {
    let profile = Profile {
        peer: peer(1),
        epoch: 5,
        version: 2,
        node: "node-1".parse().unwrap(),
        zone: Some("zone-a".parse().unwrap()),
        release: "0.1.0".parse().unwrap(),
        transfer: "10.0.0.7:4701".parse().unwrap(),
        gossip: "[fd00::7]:4701".parse().unwrap(),
    };
    Introduction { profile, credential: hello().credential, signature: signature() }
}

fn refutation() -> Refutation {
    Refutation { peer: peer(2), epoch: 5, incarnation: 4, signature: signature() }
}

fn gossip(golden: &mut Golden) {
    let no_zone = Profile { zone: None, ..introduction().profile };
    golden.compare("gossip_entry", &Gossip::Entry(entry()));
    golden.compare("gossip_introduction", &Gossip::Introduction(introduction()));
    golden.compare(
        "gossip_introduction_no_zone",
        &Gossip::Introduction(Introduction { profile: no_zone, ..introduction() }),
    );
    let suspicion = Suspicion { suspect: peer(2), epoch: 5, incarnation: 3, witness: peer(1), signature: signature() };
    golden.compare("gossip_suspicion", &Gossip::Suspicion(suspicion));
    golden.compare("gossip_refutation", &Gossip::Refutation(refutation()));
    let leave = LeaveNotice { peer: peer(3), epoch: 9, signature: signature() };
    golden.compare("gossip_farewell", &Gossip::Leave(leave));

    golden.compare("question_compare", &SyncRequest::Compare(vec![1, u64::MAX]));
    golden.compare("question_introductions", &SyncRequest::Introductions(vec![peer(1), peer(2)]));
    golden.compare("question_entries", &SyncRequest::Entries { publisher: peer(1), epoch: 5, after: 299 });
    golden.compare("question_snapshot", &SyncRequest::Snapshot(vec![peer(1)]));
    golden.compare("question_part", &SyncRequest::Disconnect);

    let summary = MemberSummary { peer: peer(1), epoch: 5, version: 2, incarnation: 1, sequence: 300, is_dead: true };
    golden.compare("reply_marks", &SyncReply::Summaries(vec![summary]));
    golden.compare("reply_introductions", &SyncReply::Introductions(vec![introduction()], vec![refutation()]));
    golden.compare("reply_entries", &SyncReply::Entries(vec![entry()]));
    let items = items().into_iter().map(|item| (item, Bits(vec![1]))).collect();
    golden.compare("reply_snapshot", &SyncReply::Snapshot(InventorySnapshot { heads: vec![head()], items }));
    golden.compare("reply_busy", &SyncReply::Busy);
}

#[test]
fn every_message_encodes_as_released_agents_read_and_write_it() {
    let mut golden = Golden::default();
    transfer(&mut golden);
    gossip(&mut golden);
    let Golden { lines, mismatches: wrong } = golden;
    assert!(wrong.is_empty(), "these lines differ or are missing:\n{}", wrong.join("\n"));
    let unused: Vec<_> = lines.into_iter().filter(|(_, rest)| !rest.is_empty()).collect();
    assert!(unused.is_empty(), "these lines belong to no message: {unused:?}");
}
