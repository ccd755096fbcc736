//! Every message that crosses the network between agents, and the only place that encodes or decodes one.
//!
//! A frame is a length (u32, big endian), the protocol's version (major and minor, a byte each) and the message in bincode. The
//! length is checked against the message's own limit before anything is allocated, and decoding is limited again by bincode
//! itself. Blob bytes follow raw after their answer and are never copied into a message.
//! Another codec would be a change of this file alone.
//!
//! # Two releases side by side
//!
//! A release that says more than the one before raises the minor. It may append fields to the end of a message, which an
//! older agent passes over, and it may add variants, which an older agent tells apart from nonsense ([`WireError::Unknown`]) and lets
//! be. Anything else needs another major, and agents of different majors refuse each other by name. Who decodes a message of an older
//! minor has to do without the fields that it lacks; as long as the minor is 0 there is no older one.

#[cfg(test)]
mod tests;

use std::io;
use std::net::IpAddr;

use bincode::error::DecodeError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::model::{Availability, Credential, Gossip, MAX_ITEMS, Question, Reply};
use crate::oci::{Digest, MAX_PIECES};

/// Changes when an older agent could no longer read what it has to. Agents refuse other majors by name instead of misreading them.
pub const MAJOR: u8 = 4;

/// Changes when a message gains a field at its end or a variant.
pub const MINOR: u8 = 0;

/// Both, as a frame carries them in big endian.
pub const VERSION: u16 = u16::from_be_bytes([MAJOR, MINOR]);

/// Messages know their limit.
pub trait Message: Serialize + DeserializeOwned {
    /// The largest encoding accepted or sent, in bytes, without the frame's [`HEADER`].
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
    /// The address that it sees the other side at.
    pub seen: IpAddr,
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
    /// Send some of these pieces of it. The blob is cut as [`crate::oci::Cut::usual`] cuts one of its size.
    Pieces {
        /// Which blob.
        digest: Digest,
        /// Those that are welcome, the most welcome first; at most [`crate::model::MAX_CHOICE`].
        choice: Vec<u32>,
        /// How many of them.
        most: u8,
    },
    /// Send the states between its pieces.
    Chain(Digest),
    /// Tell which pieces of it are there, and go on telling as they come.
    Follow(Digest),
}

/// What is answered. After [`Answer::Blob`] exactly what was asked for follows:
///
/// - to a `Get` the bytes;
/// - to a `Chain` the states, 32 bytes each, one fewer than pieces;
/// - to a `Follow` nothing, as all of it is there.
///
/// After [`Answer::Partial`] to a `Chain` the states follow too, and to a `Follow` [`Availability`] messages until the end of the stream. After either
/// of them to `Pieces` come pieces until the end of the stream: the number of each in four bytes, big endian, and its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Answer {
    /// It is there.
    Blob {
        /// The whole blob's length in bytes.
        size: u64,
    },
    /// Some of it is there, the rest is being fetched.
    Partial {
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

/// A message that cannot be used, or a stream that ended in the middle of one.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The sender speaks another major.
    #[error("protocol version {major}.{minor} (this agent speaks {MAJOR}.{MINOR})")]
    Version {
        /// Its major.
        major: u8,
        /// Its minor.
        minor: u8,
    },
    /// The sender is of a later release and says what this one has no words for. Nobody is to blame: it is as if it had said nothing.
    #[error("a message of protocol version {MAJOR}.{minor} means nothing to this agent ({MAJOR}.{MINOR}): {reason}")]
    Unknown {
        /// Its minor.
        minor: u8,
        /// What could not be read.
        reason: String,
    },
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

/// Bytes of a frame before its message.
pub const HEADER: usize = 6;

/// Encodes a message with its frame.
///
/// # Errors
/// [`WireError::TooLong`] when it exceeds its own limit, which is a bug of the sender or an inventory beyond all bounds.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, WireError> {
    encode_as(message, MINOR)
}

fn encode_as<M: Message>(message: &M, minor: u8) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; HEADER];
    bincode::serde::encode_into_std_write(message, &mut frame, bincode::config::standard())
        .map_err(|error| WireError::Malformed(error.to_string()))?;
    let length = frame.len() - HEADER;
    let checked = u32::try_from(length).ok().filter(|_| length <= M::LIMIT);
    let prefix = checked.ok_or(WireError::TooLong { length, limit: M::LIMIT })?;
    frame[..4].copy_from_slice(&prefix.to_be_bytes());
    frame[4..HEADER].copy_from_slice(&[MAJOR, minor]);
    Ok(frame)
}

/// Decodes a whole frame; nothing may follow it.
///
/// # Errors
/// Any [`WireError`] but [`WireError::Io`].
pub fn decode<M: Message>(frame: &[u8]) -> Result<M, WireError> {
    let truncated = || WireError::Malformed("truncated".into());
    let header: [u8; HEADER] = frame.get(..HEADER).and_then(|h| h.try_into().ok()).ok_or_else(truncated)?;
    let Header { length, minor } = check_header::<M>(header)?;
    let body = &frame[HEADER..];
    if body.len() != length {
        return Err(WireError::Malformed(format!("{} bytes where {length} were announced", body.len())));
    }
    decode_body(body, minor)
}

/// Decodes a frame that will be passed on, and says whether a later release has made it.
///
/// One of this release must be encoded as this release does it: numbers can be written in several ways, and each would be a message
/// of its own to those who only compare the bytes.
///
/// # Errors
/// As [`decode`].
pub fn decode_for_relay<M: Message>(frame: &[u8]) -> Result<(M, bool), WireError> {
    let message: M = decode(frame)?;
    let is_newer = frame[HEADER - 1] > MINOR;
    if !is_newer && encode(&message)? != frame {
        return Err(WireError::Malformed("not in its shortest form".into()));
    }
    Ok((message, is_newer))
}

/// Reads one message from a stream.
///
/// # Errors
/// Any [`WireError`].
pub async fn read<M: Message>(stream: &mut (impl AsyncRead + Unpin)) -> Result<M, WireError> {
    let mut header = [0; HEADER];
    stream.read_exact(&mut header).await?;
    let Header { length, minor } = check_header::<M>(header)?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body).await?;
    decode_body(&body, minor)
}

/// Writes one message to a stream.
///
/// # Errors
/// Any [`WireError`].
pub async fn write<M: Message>(stream: &mut (impl AsyncWrite + Unpin), message: &M) -> Result<(), WireError> {
    stream.write_all(&encode(message)?).await?;
    Ok(())
}

/// What is left of a frame's header once it is checked.
struct Header {
    length: usize,
    minor: u8,
}

fn check_header<M: Message>(header: [u8; HEADER]) -> Result<Header, WireError> {
    let [a, b, c, d, major, minor] = header;
    if major != MAJOR {
        return Err(WireError::Version { major, minor });
    }
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    if length > M::LIMIT {
        return Err(WireError::TooLong { length, limit: M::LIMIT });
    }
    Ok(Header { length, minor })
}

/// What one decode may allocate, over all kinds of message: twice the largest limit below. bincode counts what it reads as it is in
/// memory, so a length inside a message cannot ask for more either; an integer that was sent in one byte counts eight. The worst
/// message that is honest consists of [`crate::model::Mark`]s, at 65 counted for 37 sent.
const MAX_DECODE: usize = 2 * Reply::LIMIT;

/// What later releases may append to a message; what is longer is padding.
const MAX_APPENDED: usize = 256;

fn decode_body<M: Message>(body: &[u8], minor: u8) -> Result<M, WireError> {
    let config = bincode::config::standard().with_limit::<MAX_DECODE>();
    let is_newer = minor > MINOR;
    match bincode::serde::decode_from_slice::<M, _>(body, config) {
        Ok((message, read)) if is_newer && body.len() - read <= MAX_APPENDED => Ok(message),
        Ok((message, read)) if !is_newer && read == body.len() => Ok(message),
        Ok((_, read)) => Err(WireError::Malformed(format!("{} bytes left over", body.len() - read))),
        // It was read, and found to mean nothing: a variant of that release, or a name of a form that is allowed there.
        Err(DecodeError::OtherString(reason)) if is_newer => Err(WireError::Unknown { minor, reason }),
        Err(error) => Err(WireError::Malformed(error.to_string())),
    }
}

impl Message for Hello {
    /// A ServiceAccount token is 1 to 2 KiB, a chain of certificates up to 12 KiB; a name of 253 bytes, and room for more.
    const LIMIT: usize = 16 << 10;
}

impl Message for Welcome {
    /// A [`Hello`] and its variant's tag.
    const LIMIT: usize = Hello::LIMIT + 16;
}

impl Message for Request {
    /// A digest, [`crate::model::MAX_CHOICE`] numbers of up to five bytes, and some bytes around them: 360; the rest is for what later releases append.
    const LIMIT: usize = 512;
}

impl Message for Availability {
    /// A bit for each of [`MAX_PIECES`], or [`crate::model::MAX_NEWS`] numbers of up to five bytes.
    const LIMIT: usize = MAX_PIECES as usize / 8 + 64;
}

impl Message for Answer {
    /// One integer and the tag: 10 bytes; the rest is for what later releases append.
    const LIMIT: usize = 64;
}

impl Message for Gossip {
    /// What gossipsub carries, less its own framing of some 50 bytes and this one. An entry has at most 54 KiB
    /// ([`crate::model::MAX_CHANGES`] of the longest names), an introduction 13 KiB.
    const LIMIT: usize = MAX_GOSSIP - 512;
}

/// The largest message of gossipsub, its framing included: what libp2p sets by default.
pub const MAX_GOSSIP: usize = 64 << 10;

impl Message for Question {
    /// The keys of 5000 members, as many as Kubernetes supports nodes; a list of hashes is shorter.
    const LIMIT: usize = 5000 * 32 + 64;
}

impl Message for Reply {
    /// [`MAX_ITEMS`] of 128 bytes on average: a blob's has 34 and its holders, an image's rarely over 120.
    const LIMIT: usize = MAX_ITEMS * 128;
}
