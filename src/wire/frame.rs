//! Splits a buffer into a message and the raw bytes after the message.

use std::io::{Error, ErrorKind};

use super::{HEADER, Message, WireError, decode};

/// The message at the beginning of a buffer, and the bytes after the message.
///
/// # Errors
/// [`WireError::Io`] when the buffer ends within the message; otherwise as [`decode`].
pub fn split<M: Message>(bytes: &[u8]) -> Result<(M, &[u8]), WireError> {
    let truncated = || WireError::Io(Error::from(ErrorKind::UnexpectedEof));
    let length = bytes.first_chunk::<4>().map(|length| u32::from_be_bytes(*length) as usize).ok_or_else(truncated)?;
    if length > M::LIMIT {
        return Err(WireError::TooLong { length, limit: M::LIMIT });
    }
    let (frame, rest) = bytes.split_at_checked(HEADER + length).ok_or_else(truncated)?;
    Ok((decode(frame)?, rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Answer, encode};

    #[test]
    fn a_message_is_split_from_the_bytes_after_it() {
        let answer = Answer::Blob { size: 5 };
        let mut bytes = encode(&answer).unwrap();
        bytes.extend_from_slice(b"bytes");
        assert_eq!(split::<Answer>(&bytes).unwrap(), (answer, &b"bytes"[..]));
    }

    #[test]
    fn a_truncated_message_is_distinguished_from_a_malformed_message() {
        let bytes = encode(&Answer::Absent).unwrap();
        for end in 0..bytes.len() {
            assert!(matches!(split::<Answer>(&bytes[..end]), Err(WireError::Io(_))), "{end} bytes");
        }
        assert!(matches!(split::<Answer>(&[0xff; 20]), Err(WireError::TooLong { .. })));
        let mut malformed = bytes;
        malformed[HEADER] = 0xff;
        assert!(matches!(split::<Answer>(&malformed), Err(WireError::Malformed(_))));
    }
}
