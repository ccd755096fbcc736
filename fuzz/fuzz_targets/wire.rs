//! Every message that a peer can send, admitted or not: frames of any bytes, and bodies of any bytes in a frame that is right.
//!
//! The first byte chooses the kind, so that one corpus serves all of them.
#![no_main]

use std::fmt::Debug;

use libfuzzer_sys::fuzz_target;
use lighterman::model::{Availability, Gossip, Question, Reply};
use lighterman::wire::{self, Answer, Hello, Message, Request, Welcome};

fuzz_target!(|input: &[u8]| {
    let Some((kind, body)) = input.split_first() else { return };
    // Before admission: the first three. After it: all of them.
    match kind % 8 {
        0 => check::<Hello>(body),
        1 => check::<Welcome>(body),
        2 => check::<Request>(body),
        3 => check::<Answer>(body),
        4 => check::<Gossip>(body),
        5 => check::<Question>(body),
        6 => check::<Availability>(body),
        _ => check::<Reply>(body),
    }
});

fn check<M: Message + Debug + PartialEq>(bytes: &[u8]) {
    // As it stands: the header is the stranger's as well.
    let _ = wire::decode::<M>(bytes);
    let length = u32::try_from(bytes.len()).expect("inputs are short");
    let current = M::VERSIONS.current().version();
    let framed = |minor: u8| [&length.to_be_bytes()[..], &[current.major, minor], bytes].concat();
    // From a later release.
    let _ = wire::decode::<M>(&framed(current.minor + 1));
    let frame = framed(current.minor);
    let Ok(message) = wire::decode::<M>(&frame) else { return };
    assert!(bytes.len() <= M::LIMIT, "longer than its kind may be");
    let again = wire::encode(&message).expect("what was accepted can be sent on");
    // bincode accepts an integer in more bytes than it needs, so the bytes may differ; the message must not, and the form that we
    // write is the only one that we write.
    assert!(again.len() <= frame.len(), "it grew from {} to {} bytes", frame.len(), again.len());
    let twice = wire::decode::<M>(&again).expect("what we write can be read");
    assert_eq!(twice, message);
    assert_eq!(wire::encode(&twice).expect("as before"), again);
    if again.len() == frame.len() {
        assert_eq!(again, frame, "two forms of one message, of the same length");
    }
}
