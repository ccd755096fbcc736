//! Response of a peer to a request for a range: an answer, and the bytes after the answer.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lighterman::wire::{self, Answer, HEADER, Message};

fuzz_target!(|response: &[u8]| {
    let Ok((answer, rest)) = wire::split::<Answer>(response) else { return };
    let begin = response.len() - rest.len();
    assert!(begin <= HEADER + Answer::LIMIT, "the answer is within its limit");
    assert_eq!(rest, &response[begin..], "the bytes after the answer are unchanged");
    assert_eq!(wire::decode::<Answer>(&response[..begin]).expect("the answer was decoded before"), answer);
});
