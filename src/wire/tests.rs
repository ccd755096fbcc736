use serde::Deserialize;

use super::*;
use crate::model::{
    Bits, Credential, Introduction, InventoryChange, InventoryItem, InventorySnapshot, LeaveNotice, LogEntry, LogHead,
    MAX_CHANGES, MemberSummary, PeerId, PieceMapUpdate, Profile, Signature,
};
use crate::oci::{Digest, Repository};

const MAJOR: u8 = Versions::TRANSFER.current().version().major;
const MINOR: u8 = Versions::TRANSFER.current().version().minor;

fn peer(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

fn blob(number: usize) -> InventoryItem {
    InventoryItem::Blob(Digest::of(&number.to_le_bytes()))
}

fn head(number: u8) -> LogHead {
    let digest = Digest::of(b"");
    let signature = Signature([7; 32], [8; 32]);
    LogHead { publisher: peer(number), epoch: u64::MAX, sequence: u64::MAX, changes: digest, state: digest, signature }
}

fn entry(changes: usize) -> Gossip {
    Gossip::Entry(LogEntry { head: head(1), changes: (0..changes).map(|n| InventoryChange::Added(blob(n))).collect() })
}

#[test]
fn a_message_reads_back_as_it_was_written() {
    let leave = Gossip::Leave(LeaveNotice { peer: peer(1), epoch: 3, signature: Signature([1; 32], [2; 32]) });
    for message in [entry(3), leave] {
        assert_eq!(decode::<Gossip>(&encode(&message).unwrap()).unwrap(), message);
    }
    let request = SyncRequest::Entries { publisher: peer(1), epoch: 1, after: 2 };
    assert_eq!(decode::<SyncRequest>(&encode(&request).unwrap()).unwrap(), request);
    assert_eq!(decode::<SyncReply>(&encode(&SyncReply::Busy).unwrap()).unwrap(), SyncReply::Busy);
}

#[test]
fn the_largest_entry_and_introduction_fit_into_one_gossip_message() {
    let repository = Repository { registry: "r".repeat(120), path: "p".repeat(134) };
    let change = InventoryChange::Added(InventoryItem::Image(repository, Some("t".repeat(128)), Digest::of(b"")));
    encode(&Gossip::Entry(LogEntry { head: head(1), changes: vec![change; MAX_CHANGES] })).unwrap();
    let address = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535".parse().unwrap();
    let profile = Profile {
        peer: peer(1),
        epoch: u64::MAX,
        version: u64::MAX,
        node: "n".repeat(253).parse().unwrap(),
        zone: Some("z".repeat(63).parse().unwrap()),
        release: "r".repeat(32).parse().unwrap(),
        transfer: address,
        gossip: address,
    };
    let credential = Credential::new("c".repeat(12 << 10));
    encode(&Gossip::Introduction(Introduction { profile, credential, signature: head(1).signature })).unwrap();
}

#[test]
fn the_largest_piece_request_and_piece_maps_fit() {
    let pieces = vec![u32::MAX; crate::model::MAX_REQUEST_PIECES];
    encode(&Request::Pieces { digest: Digest::of(b""), pieces, limit: u8::MAX }).unwrap();
    encode(&PieceMapUpdate::Have(vec![u32::MAX; crate::model::MAX_HAVE_PIECES])).unwrap();
    encode(&PieceMapUpdate::Map(Bits::none_of(crate::oci::MAX_PIECES as usize))).unwrap();
}

#[test]
fn a_truncated_message_is_rejected_at_every_length() {
    let frame = encode(&entry(2)).unwrap();
    for length in 0..frame.len() {
        assert!(decode::<Gossip>(&frame[..length]).is_err(), "{length} bytes");
    }
    let mut longer = frame;
    longer.push(0);
    assert!(decode::<Gossip>(&longer).is_err(), "one byte too many");
}

#[test]
fn an_unsupported_major_is_named_with_its_protocol_both_versions_and_the_remedy() {
    let mut frame = encode(&Answer::Absent).unwrap();
    (frame[4], frame[5]) = (MAJOR + 1, 9);
    let error = decode::<Answer>(&frame).unwrap_err().to_string();
    let expected =
        format!("version {}.9 of the transfer protocol and this agent {MAJOR}.{MINOR}; upgrade this agent", MAJOR + 1);
    assert!(error.contains(&expected), "{error}");

    let ours = Versions::GOSSIP.after_next_major();
    let mut frame = encode_in(&SyncRequest::Disconnect, ours.current()).unwrap();
    (frame[4], frame[5]) = (1, 2);
    let error = decode_in::<SyncRequest>(&frame, ours).unwrap_err().to_string();
    let expected = format!("version 1.2 of the gossip protocol and this agent {ours}; upgrade that peer");
    assert!(error.contains(&expected), "{error}");
    assert!(ours.to_string().contains(" and "), "both MAJORs are named: {ours}");
}

/// [`Answer`] after a change of MAJOR that moves a variant and adds one.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum AnswerOfNextMajor {
    Absent,
    Blob { size: u64 },
    Elsewhere(PeerId),
}

impl Message for AnswerOfNextMajor {
    const LIMIT: usize = Answer::LIMIT;
    const VERSIONS: Versions = Versions::TRANSFER.after_next_major();
    type Previous = Answer;
}

impl From<AnswerOfNextMajor> for Answer {
    fn from(answer: AnswerOfNextMajor) -> Self {
        match answer {
            AnswerOfNextMajor::Blob { size } => Self::Blob { size },
            AnswerOfNextMajor::Absent | AnswerOfNextMajor::Elsewhere(_) => Self::Absent,
        }
    }
}

impl TryFrom<Answer> for AnswerOfNextMajor {
    type Error = String;

    fn try_from(answer: Answer) -> Result<Self, String> {
        match answer {
            Answer::Blob { size } => Ok(Self::Blob { size }),
            Answer::Absent => Ok(Self::Absent),
            other => Err(format!("{other:?} is gone")),
        }
    }
}

#[test]
fn a_message_of_the_previous_major_is_converted_both_ways() {
    let previous = AnswerOfNextMajor::VERSIONS.previous().unwrap();
    let sent = encode_in(&AnswerOfNextMajor::Elsewhere(peer(1)), previous).unwrap();
    assert_eq!(decode::<Answer>(&sent).unwrap(), Answer::Absent, "an agent of the previous MAJOR reads the message");
    let received = encode(&Answer::Blob { size: 5 }).unwrap();
    assert_eq!(decode::<AnswerOfNextMajor>(&received).unwrap(), AnswerOfNextMajor::Blob { size: 5 });
    let (relayed, is_newer) = decode_for_relay::<AnswerOfNextMajor>(&received, AnswerOfNextMajor::VERSIONS).unwrap();
    assert_eq!((encode_in(&relayed, previous).unwrap(), is_newer), (received, false), "a relay keeps the bytes");
}

#[test]
fn a_message_without_a_counterpart_in_the_next_major_is_no_fault() {
    let received = encode(&Answer::Busy).unwrap();
    let error = decode::<AnswerOfNextMajor>(&received).unwrap_err();
    assert!(matches!(error, WireError::Unknown { theirs: Version { major: MAJOR, .. }, .. }), "{error}");
}

/// [`Answer`] of a later release, with one more field and one more variant.
#[derive(Debug, Clone, Serialize, Deserialize)]
enum NextAnswer {
    Blob { size: u64, modified: u64 },
    _Partial { size: u64 },
    _Absent,
    _Busy,
    _Invalid { size: u64 },
    _Failed,
    Elsewhere(PeerId),
}

impl Message for NextAnswer {
    const LIMIT: usize = Answer::LIMIT;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

/// A frame as a release with the next MINOR writes it.
fn encode_next<M: Message>(message: &M) -> Vec<u8> {
    let mut frame = encode(message).unwrap();
    frame[5] = MINOR + 1;
    frame
}

#[test]
fn a_field_that_a_later_release_appends_is_ignored() {
    let frame = encode_next(&NextAnswer::Blob { size: 5, modified: u64::MAX });
    assert_eq!(decode::<Answer>(&frame).unwrap(), Answer::Blob { size: 5 });
    let mut ours = frame;
    ours[5] = MINOR;
    assert!(matches!(decode::<Answer>(&ours), Err(WireError::Malformed(_))), "our own release appends nothing");
}

#[test]
fn a_variant_that_a_later_release_adds_is_no_fault() {
    let frame = encode_next(&NextAnswer::Elsewhere(peer(1)));
    assert!(matches!(decode::<Answer>(&frame), Err(WireError::Unknown { theirs, .. }) if theirs.minor == MINOR + 1));
    let mut ours = frame.clone();
    ours[5] = MINOR;
    assert!(matches!(decode::<Answer>(&ours), Err(WireError::Malformed(_))), "our own release has no such variant");
}

#[test]
fn a_malformed_message_of_a_later_release_is_malformed() {
    let mut frame = encode_next(&entry(2));
    frame.pop();
    let length = u32::try_from(frame.len() - HEADER).unwrap();
    frame[..4].copy_from_slice(&length.to_be_bytes());
    assert!(matches!(decode::<Gossip>(&frame), Err(WireError::Malformed(_))));
}

#[tokio::test]
async fn a_message_of_a_later_release_is_read_from_a_stream() {
    let frame = encode_next(&NextAnswer::Blob { size: 5, modified: 1 });
    assert_eq!(read::<Answer>(&mut frame.as_slice()).await.unwrap(), Answer::Blob { size: 5 });
}

#[tokio::test]
async fn an_oversized_message_is_rejected_before_its_body_is_read() {
    let header = [[0xff; 4].as_slice(), &[MAJOR, MINOR]].concat();
    let mut frame = header.as_slice();
    assert!(matches!(read::<Request>(&mut frame).await, Err(WireError::TooLong { .. })));
    assert!(matches!(encode(&entry(4096)), Err(WireError::TooLong { .. })), "an oversized message is not sent");
}

#[test]
fn a_length_inside_a_message_allocates_nothing() {
    // Variant-length integer 0xfd announces eight bytes: a list of 2^63 summaries.
    let mut frame = encode(&SyncReply::Summaries(Vec::new())).unwrap();
    frame.truncate(HEADER + 1);
    frame.extend_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0x80]);
    let length = u32::try_from(frame.len() - HEADER).unwrap();
    frame[..4].copy_from_slice(&length.to_be_bytes());
    assert!(matches!(decode::<SyncReply>(&frame), Err(WireError::Malformed(_))));
}

#[test]
fn the_fullest_reply_of_the_smallest_parts_can_be_decoded() {
    let summary = MemberSummary { peer: peer(1), epoch: 0, version: 0, incarnation: 0, sequence: 0, is_dead: false };
    let count = (SyncReply::LIMIT - 16) / 37;
    let reply = SyncReply::Summaries(vec![summary; count]);
    assert_eq!(decode::<SyncReply>(&encode(&reply).unwrap()).unwrap(), reply);
}

#[test]
fn the_largest_inventory_fits_into_one_snapshot() {
    let tag = "t".repeat(40);
    let repository = Repository { registry: "registry.example.com".into(), path: "p".repeat(25) };
    let bits = Bits(vec![1]);
    let item = |number: usize| {
        (InventoryItem::Image(repository.clone(), Some(tag.clone()), Digest::of(&number.to_le_bytes())), bits.clone())
    };
    let items: Vec<_> = (0..MAX_ITEMS).map(item).collect();
    let reply = SyncReply::Snapshot(InventorySnapshot { heads: vec![head(0)], items });
    assert_eq!(decode::<SyncReply>(&encode(&reply).unwrap()).unwrap(), reply);
}

proptest::proptest! {
    #[test]
    fn decoding_never_panics(
        bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..256),
        minor in MINOR..=MINOR + 1,
    ) {
        let mut frame = bytes;
        if frame.len() >= HEADER {
            let length = u32::try_from(frame.len() - HEADER).unwrap();
            frame[..4].copy_from_slice(&length.to_be_bytes());
            frame[4..HEADER].copy_from_slice(&[MAJOR, minor]);
        }
        let _ = (decode::<Gossip>(&frame), decode::<SyncRequest>(&frame), decode::<SyncReply>(&frame));
        let _ = (decode::<Request>(&frame), decode::<Answer>(&frame), decode::<Hello>(&frame), decode::<Welcome>(&frame));
    }
}
