//! Every message that crosses the network between agents, and the only place that encodes or decodes one.
//!
//! A frame is a length (u32, big endian), the protocol's version (u16, big endian) and the message in bincode. The length is
//! checked against the message's own limit before anything is allocated, and decoding is limited again by bincode
//! itself. Blob bytes follow raw after their answer and are never copied into a message.
//! Another codec would be a change of this file alone.

use std::io;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::model::{ContentChange, Credential, MAX_ITEMS};
use crate::oci::Digest;

/// Changes when a message changes. Agents refuse other versions by name instead of misreading them.
pub const VERSION: u16 = 2;

/// Most changes in one announcement: at 35 to 330 bytes each they stay under gossipsub's 64 KiB (a repository's
/// name is at most 255 bytes and a tag 128).
pub const MAX_CHANGES: usize = 128;

/// Messages know their limit.
pub trait Message: Serialize + DeserializeOwned {
    /// The largest encoding accepted or sent, in bytes, without the frame's six.
    const LIMIT: usize;
}

/// The first message on a connection, from the one who dialled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Why the dialler should be admitted.
    pub credential: Credential,
    /// Its node's name, for logs and status; a credential that names a node wins.
    pub node: String,
    /// The TCP port where it gossips; the address is the connection's.
    pub gossip_port: u16,
}

/// The answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// Admitted; the listener introduces itself in turn.
    Admitted(Hello),
    /// Not admitted; the connection is closed after this.
    Refused(String),
}

/// What may be asked on a stream of an admitted connection. One request a stream.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Request {
    /// Is this blob there, and how long is it?
    Have(Digest),
    /// Send this part of it.
    Get {
        /// Which blob.
        digest: Digest,
        /// The first byte wanted.
        offset: u64,
        /// How many bytes.
        length: u64,
    },
}

/// What is answered; after [`Answer::Blob`] to a `Get`, exactly the bytes asked for follow.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is there.
    Blob {
        /// The whole blob's length in bytes.
        size: u64,
    },
    /// It is not there.
    Absent,
    /// As many are being served as this agent serves; ask again or elsewhere.
    Busy,
    /// A range outside the blob.
    Invalid {
        /// The whole blob's length in bytes, so that the asker sees who was wrong about it.
        size: u64,
    },
    /// The content store failed; ask elsewhere.
    Failed,
}

/// Gossip: what changed at its publisher.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Announcement {
    /// Chosen at the publisher's start; a new one makes everything before void.
    pub epoch: u64,
    /// Counts announcements within the epoch, from 1; a gap means that something was missed.
    pub sequence: u64,
    /// At most [`MAX_CHANGES`].
    pub changes: Vec<ContentChange>,
}

/// Asked of the publisher itself, by request and response.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotRequest;

/// All that the publisher holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// As in [`Announcement`].
    pub epoch: u64,
    /// The last announcement that this includes.
    pub sequence: u64,
    /// At most [`MAX_ITEMS`], all of them additions.
    pub items: Vec<ContentChange>,
}

/// A message that cannot be used, or a stream that ended in the middle of one.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The sender speaks another version.
    #[error("protocol version {0} (this agent speaks {VERSION})")]
    Version(u16),
    /// Longer than its kind may be.
    #[error("a message of {length} bytes is over its limit of {limit}")]
    TooLong {
        /// The length that was announced.
        length: usize,
        /// The limit of this kind of message.
        limit: usize,
    },
    /// Not a message of this kind.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// The connection failed, or ended too early.
    #[error("the stream failed: {0}")]
    Io(#[from] io::Error),
}

const HEADER: usize = 6;

/// Encodes a message with its frame.
///
/// # Errors
/// [`WireError::TooLong`] when it exceeds its own limit, which is a bug of the sender or an inventory beyond all bounds.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; HEADER];
    bincode::serde::encode_into_std_write(message, &mut frame, bincode::config::standard())
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    let length = frame.len() - HEADER;
    let checked = u32::try_from(length).ok().filter(|_| length <= M::LIMIT);
    let prefix = checked.ok_or(WireError::TooLong { length, limit: M::LIMIT })?;
    frame[..4].copy_from_slice(&prefix.to_be_bytes());
    frame[4..HEADER].copy_from_slice(&VERSION.to_be_bytes());
    Ok(frame)
}

/// Decodes a whole frame; nothing may follow it.
///
/// # Errors
/// Any [`WireError`] but [`WireError::Io`].
pub fn decode<M: Message>(frame: &[u8]) -> Result<M, WireError> {
    let truncated = || WireError::Malformed("truncated".into());
    let header: [u8; HEADER] = frame.get(..HEADER).and_then(|h| h.try_into().ok()).ok_or_else(truncated)?;
    let length = check_header::<M>(header)?;
    let body = &frame[HEADER..];
    if body.len() != length {
        return Err(WireError::Malformed(format!("{} bytes where {length} were announced", body.len())));
    }
    decode_body(body)
}

/// Reads one message from a stream.
///
/// # Errors
/// Any [`WireError`].
pub async fn read<M: Message>(stream: &mut (impl AsyncRead + Unpin)) -> Result<M, WireError> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await?;
    let mut body = vec![0; check_header::<M>(header)?];
    stream.read_exact(&mut body).await?;
    decode_body(&body)
}

/// Writes one message to a stream.
///
/// # Errors
/// Any [`WireError`].
pub async fn write<M: Message>(stream: &mut (impl AsyncWrite + Unpin), message: &M) -> Result<(), WireError> {
    stream.write_all(&encode(message)?).await?;
    Ok(())
}

fn check_header<M: Message>(header: [u8; HEADER]) -> Result<usize, WireError> {
    let version = u16::from_be_bytes([header[4], header[5]]);
    if version != VERSION {
        return Err(WireError::Version(version));
    }
    let length = u32::from_be_bytes([header[0], header[1], header[2], header[3]]) as usize;
    if length > M::LIMIT { Err(WireError::TooLong { length, limit: M::LIMIT }) } else { Ok(length) }
}

/// What one decode may allocate, over all kinds of message: the largest limit below. bincode counts what it is about to allocate
/// against this, so a length inside a message cannot ask for more either.
const MAX_DECODE: usize = Snapshot::LIMIT;

fn decode_body<M: Message>(body: &[u8]) -> Result<M, WireError> {
    let config = bincode::config::standard().with_limit::<MAX_DECODE>();
    let (message, read) = bincode::serde::decode_from_slice::<M, _>(body, config)
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    if read != body.len() {
        return Err(WireError::Malformed(format!("{} bytes left over", body.len() - read)));
    }
    Ok(message)
}

impl Message for Hello {
    /// A ServiceAccount token is 1 to 2 KiB; room for a few extra claims.
    const LIMIT: usize = 16 << 10;
}

impl Message for Welcome {
    /// A [`Hello`] and its variant's tag.
    const LIMIT: usize = Hello::LIMIT + 16;
}

impl Message for Request {
    /// A digest and two integers of up to nine bytes, and the tag.
    const LIMIT: usize = 64;
}

impl Message for Answer {
    /// One integer and the tag.
    const LIMIT: usize = 16;
}

impl Message for Announcement {
    /// Gossipsub's default message limit, less its own framing and signature (under 512 bytes).
    const LIMIT: usize = (64 << 10) - 512;
}

impl Message for SnapshotRequest {
    const LIMIT: usize = 0;
}

impl Message for Snapshot {
    /// [`MAX_ITEMS`] of 128 bytes on average: a blob's entry has 33, an image's rarely over 120.
    const LIMIT: usize = MAX_ITEMS * 128;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Repository;

    fn announcement(changes: usize) -> Announcement {
        let change = |i: usize| ContentChange::BlobAdded(Digest::of(&i.to_le_bytes()));
        Announcement { epoch: 7, sequence: 1, changes: (0..changes).map(change).collect() }
    }

    #[test]
    fn a_message_reads_back_as_it_was_written() {
        let message = announcement(3);
        assert_eq!(decode::<Announcement>(&encode(&message).unwrap()).unwrap(), message);
        assert_eq!(decode::<SnapshotRequest>(&encode(&SnapshotRequest).unwrap()).unwrap(), SnapshotRequest);
    }

    #[test]
    fn the_largest_announcement_fits_into_one_gossip_message() {
        let repository = Repository { registry: "r".repeat(120), path: "p".repeat(134) };
        let change = ContentChange::Tagged(repository, Some("t".repeat(128)), Digest::of(b""));
        let message = Announcement { epoch: u64::MAX, sequence: u64::MAX, changes: vec![change; MAX_CHANGES] };
        assert!(encode(&message).unwrap().len() < 64 << 10);
    }

    #[test]
    fn a_truncated_message_is_refused_at_every_length() {
        let frame = encode(&announcement(2)).unwrap();
        for length in 0..frame.len() {
            assert!(decode::<Announcement>(&frame[..length]).is_err(), "{length} bytes");
        }
        let mut longer = frame;
        longer.push(0);
        assert!(decode::<Announcement>(&longer).is_err(), "one byte too many");
    }

    #[test]
    fn another_version_is_named() {
        let mut frame = encode(&SnapshotRequest).unwrap();
        frame[5] = 9;
        assert!(matches!(decode::<SnapshotRequest>(&frame), Err(WireError::Version(9))));
    }

    #[tokio::test]
    async fn an_oversized_message_is_refused_before_its_body_is_read() {
        let header = [[0xff; 4].as_slice(), &VERSION.to_be_bytes()].concat();
        let mut frame = header.as_slice();
        assert!(matches!(read::<Request>(&mut frame).await, Err(WireError::TooLong { .. })));
        let too_many = announcement(4096);
        assert!(matches!(encode(&too_many), Err(WireError::TooLong { .. })), "nor is one sent");
    }

    #[test]
    fn a_length_inside_a_message_allocates_nothing() {
        // Variant-length integer 0xfd announces eight bytes: a list of 2^63 changes.
        let mut frame = encode(&announcement(0)).unwrap();
        frame.truncate(HEADER + 2);
        frame.extend_from_slice(&[0xfd, 0, 0, 0, 0, 0, 0, 0, 0x80]);
        let length = u32::try_from(frame.len() - HEADER).unwrap();
        frame[..4].copy_from_slice(&length.to_be_bytes());
        assert!(matches!(decode::<Announcement>(&frame), Err(WireError::Malformed(_))));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(proptest::prelude::any::<u8>(), 0..256)) {
            let mut frame = bytes;
            if frame.len() >= HEADER {
                let length = u32::try_from(frame.len() - HEADER).unwrap();
                frame[..4].copy_from_slice(&length.to_be_bytes());
                frame[4..HEADER].copy_from_slice(&VERSION.to_be_bytes());
            }
            let _ = (decode::<Announcement>(&frame), decode::<Snapshot>(&frame), decode::<Welcome>(&frame));
            let _ = (decode::<Request>(&frame), decode::<Answer>(&frame), decode::<Hello>(&frame));
        }
    }
}
