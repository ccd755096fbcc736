//! The response of a neighbour to a request for a range: an answer, and the bytes after the answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lighterman::wire::{self, Answer, HEADER, Message};

fuzz_target!(|response: &[u8]| {
    let Ok((answer, rest)) = wire::split::<Answer>(response) else { return };
    let begin = response.len() - rest.len();
    assert!(begin <= HEADER + Answer::LIMIT, "an answer longer than its kind may be");
    assert_eq!(rest, &response[begin..], "other bytes than came");
    assert_eq!(wire::decode::<Answer>(&response[..begin]).expect("it was read"), answer);
});
