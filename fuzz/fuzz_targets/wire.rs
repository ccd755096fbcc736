//! Every message that a peer can send, before and after admission: frames of any bytes, and bodies
//! of any bytes in a valid frame.
//!
//! The first byte selects the kind of message, so that one corpus serves all kinds.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use lighterman::model::{Gossip, PieceMapUpdate, SyncReply, SyncRequest};
use lighterman::wire::{self, Answer, Hello, Message, Request, Welcome};

fuzz_target!(|input: &[u8]| {
    let Some((kind, body)) = input.split_first() else { return };
    // `Hello` and `Welcome` come before admission. Only admitted peers send the other messages.
    match kind % 8 {
        0 => check::<Hello>(body),
        1 => check::<Welcome>(body),
        2 => check::<Request>(body),
        3 => check::<Answer>(body),
        4 => check::<Gossip>(body),
        5 => check::<SyncRequest>(body),
        6 => check::<PieceMapUpdate>(body),
        _ => check::<SyncReply>(body),
    }
});

fn check<M: Message + Debug + PartialEq>(bytes: &[u8]) {
    // The input as a whole frame, with the header of an unauthenticated peer.
    let _ = wire::decode::<M>(bytes);
    let length = u32::try_from(bytes.len()).expect("inputs are short");
    let current = M::VERSIONS.current().version();
    let framed = |minor: u8| [&length.to_be_bytes()[..], &[current.major, minor], bytes].concat();
    // The frame of a later release.
    let _ = wire::decode::<M>(&framed(current.minor + 1));
    let frame = framed(current.minor);
    let Ok(message) = wire::decode::<M>(&frame) else { return };
    assert!(bytes.len() <= M::LIMIT, "the message is within its limit");
    let again = wire::encode(&message).expect("an accepted message can be encoded");
    // bincode accepts an integer in more bytes than necessary, so the bytes may differ. The message
    // must not differ, and an encoded message must have only one form.
    assert!(again.len() <= frame.len(), "the encoding does not grow; {} became {} bytes", frame.len(), again.len());
    let twice = wire::decode::<M>(&again).expect("an encoded message can be decoded");
    assert_eq!(twice, message);
    assert_eq!(wire::encode(&twice).expect("the message can be encoded again"), again);
    if again.len() == frame.len() {
        assert_eq!(again, frame, "one message has one form of this length");
    }
}
