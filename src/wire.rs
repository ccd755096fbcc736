//! Every message that crosses the network between agents, and the only place that encodes or decodes one.
//!
//! A frame is a length (u32, big endian), the protocol's version (major and minor, a byte each) and the message in bincode. The
//! length is checked against the message's own limit before anything is allocated, and decoding is limited again by bincode
//! itself. Blob bytes follow raw after their answer and are never copied into a message.
//! Another codec would be a change of this file alone.
//!
//! # Two releases side by side
//!
//! Gossip and transfer have a version each ([`Versions`]). A release that says more than the one before raises the MINOR of the
//! protocol. It may append fields to the end of a message, which an older agent passes over, and it may add variants, which an
//! older agent tells apart from nonsense ([`WireError::Unknown`]) and lets be. Who decodes a message of an older MINOR has to do
//! without the fields that it lacks; as long as the MINOR is 0 there is no older one.
//!
//! Any other change raises the MAJOR of the protocol. Agents of neighbouring MAJORs exchange `Hello`, `Welcome`, `Have` and `Get`
//! over QUIC, and all gossip, in the older format. `Pieces`, `Chain` and `Follow` need equal MAJORs; the fetcher replaces them by
//! `Have` and `Get` (`transfer::fetch::ranges`). The change costs its author three things, and no other file:
//!
//! 1. in [`Versions`] the new MAJOR as `current`, and the MAJOR before as `previous`;
//! 2. a module with the messages as they were, and their conversions (`From` one way, `TryFrom` the other);
//! 3. the old type as [`Message::Previous`] of the message that changed.
//!
//! Signatures are over bytes that no codec makes (`crate::model`, `signed`), so a relay in another format keeps them valid.

mod error;
mod frame;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
mod version;

use std::fmt::Display;
use std::net::IpAddr;

use bincode::error::DecodeError;
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use self::error::WireError;
pub use self::version::{FIRST_MAJOR, Format, ProtocolKind, Version, Versions};
use crate::model::{Credential, Gossip, MAX_ITEMS, PieceMapUpdate, SyncReply, SyncRequest};
use crate::oci::{Digest, MAX_PIECES};
pub use frame::split;

/// What an agent sends to another in one frame.
pub trait Message: Clone + Serialize + DeserializeOwned {
    /// The largest encoding accepted or sent, in bytes, without the frame's [`HEADER`].
    const LIMIT: usize;

    /// Of the protocol that the message belongs to.
    const VERSIONS: Versions;

    /// The message as the previous MAJOR has it; `Self` where the two do not differ.
    type Previous: Serialize + DeserializeOwned + From<Self> + TryInto<Self, Error: Display>;
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
    pub observed_address: IpAddr,
}

/// The answer to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum Welcome {
    /// Admitted; the listener introduces itself in turn.
    Admitted(Hello),
    /// Not admitted; the connection is closed after this.
    Rejected(String),
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
        pieces: Vec<u32>,
        /// How many of them.
        limit: u8,
    },
    /// Send the states between its pieces.
    HashChain(Digest),
    /// Tell which pieces of it are there, and go on telling as they come.
    Follow(Digest),
}

impl Request {
    /// Whether it is served to peers of the same MAJOR only. What it asks for is the most likely to change with a MAJOR, and can be
    /// had with the others.
    pub fn needs_equal_majors(&self) -> bool {
        match self {
            Self::Have(_) | Self::Get { .. } => false,
            Self::Pieces { .. } | Self::HashChain(_) | Self::Follow(_) => true,
        }
    }
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

/// Bytes of a frame before its message.
pub const HEADER: usize = 6;

/// Encodes a message with its frame, for peers of the same MAJOR.
///
/// # Errors
/// [`WireError::TooLong`] when it exceeds its own limit, which is a bug of the sender or an inventory beyond all bounds.
pub fn encode<M: Message>(message: &M) -> Result<Vec<u8>, WireError> {
    encode_in(message, M::VERSIONS.current())
}

/// Encodes a message with its frame, in this format.
///
/// # Errors
/// As [`encode`].
pub fn encode_in<M: Message>(message: &M, format: Format) -> Result<Vec<u8>, WireError> {
    let mut frame = vec![0; HEADER];
    let config = bincode::config::standard();
    let written = match format.is_previous() {
        false => bincode::serde::encode_into_std_write(message, &mut frame, config),
        true => bincode::serde::encode_into_std_write(M::Previous::from(message.clone()), &mut frame, config),
    };
    written.map_err(|error| WireError::Malformed(error.to_string()))?;
    let length = frame.len() - HEADER;
    let checked = u32::try_from(length).ok().filter(|_| length <= M::LIMIT);
    let prefix = checked.ok_or(WireError::TooLong { length, limit: M::LIMIT })?;
    let Version { major, minor } = format.version();
    frame[..4].copy_from_slice(&prefix.to_be_bytes());
    frame[4..HEADER].copy_from_slice(&[major, minor]);
    Ok(frame)
}

/// Decodes a whole frame of a peer of the same MAJOR, or of the one before; nothing may follow the frame.
///
/// # Errors
/// Any [`WireError`] but [`WireError::Io`].
pub fn decode<M: Message>(frame: &[u8]) -> Result<M, WireError> {
    decode_in(frame, M::VERSIONS)
}

/// Decodes a whole frame in one of these versions; nothing may follow the frame.
///
/// # Errors
/// As [`decode`].
pub fn decode_in<M: Message>(frame: &[u8], versions: Versions) -> Result<M, WireError> {
    Ok(decode_whole(frame, versions)?.0)
}

/// Decodes a frame that will be passed on, and says whether a later release has made it.
///
/// One of this release must be encoded as this release does it: numbers can be written in several ways, and each would be a message
/// of its own to those who only compare the bytes.
///
/// # Errors
/// As [`decode`].
pub fn decode_for_relay<M: Message>(frame: &[u8], versions: Versions) -> Result<(M, bool), WireError> {
    let (message, header) = decode_whole::<M>(frame, versions)?;
    if !header.is_newer() && encode_in(&message, header.format)? != frame {
        return Err(WireError::Malformed("not in its shortest form".into()));
    }
    Ok((message, header.is_newer()))
}

fn decode_whole<M: Message>(frame: &[u8], versions: Versions) -> Result<(M, Header), WireError> {
    let truncated = || WireError::Malformed("truncated".into());
    let bytes: [u8; HEADER] = frame.get(..HEADER).and_then(|h| h.try_into().ok()).ok_or_else(truncated)?;
    let header = Header::check::<M>(bytes, versions)?;
    let (body, length) = (&frame[HEADER..], header.length);
    if body.len() != length {
        return Err(WireError::Malformed(format!("{} bytes where {length} were announced", body.len())));
    }
    Ok((header.decode_body(body)?, header))
}

/// Reads one message of a peer of the same MAJOR, or of the one before, from a stream.
///
/// # Errors
/// Any [`WireError`].
#[cfg(test)]
pub(crate) async fn read<M: Message>(stream: &mut (impl AsyncRead + Unpin)) -> Result<M, WireError> {
    read_in(stream, M::VERSIONS).await
}

/// Reads one message in one of these versions from a stream.
///
/// # Errors
/// Any [`WireError`].
pub async fn read_in<M: Message>(stream: &mut (impl AsyncRead + Unpin), versions: Versions) -> Result<M, WireError> {
    let mut bytes = [0; HEADER];
    stream.read_exact(&mut bytes).await?;
    let header = Header::check::<M>(bytes, versions)?;
    let mut body = vec![0; header.length];
    stream.read_exact(&mut body).await?;
    header.decode_body(&body)
}

/// Writes one message to a stream, for a peer of the same MAJOR.
///
/// # Errors
/// Any [`WireError`].
#[cfg(test)]
pub(crate) async fn write<M: Message>(stream: &mut (impl AsyncWrite + Unpin), message: &M) -> Result<(), WireError> {
    write_in(stream, message, M::VERSIONS.current()).await
}

/// Writes one message to a stream, in this format.
///
/// # Errors
/// Any [`WireError`].
pub async fn write_in<M: Message>(
    stream: &mut (impl AsyncWrite + Unpin),
    message: &M,
    format: Format,
) -> Result<(), WireError> {
    stream.write_all(&encode_in(message, format)?).await?;
    Ok(())
}

/// What one decode may allocate, over all kinds of message: twice the largest limit below. bincode counts what it reads as it is in
/// memory, so a length inside a message cannot ask for more either; an integer that was sent in one byte counts eight. The worst
/// message that is honest consists of [`crate::model::Mark`]s, at 65 counted for 37 sent.
const MAX_DECODE: usize = 2 * SyncReply::LIMIT;

/// What later releases may append to a message; what is longer is padding.
const MAX_APPENDED: usize = 256;

/// A frame's header that was checked.
struct Header {
    /// Of the message, in bytes; within its limit.
    length: usize,
    /// What the sender wrote; the MAJOR is that of the format.
    theirs: Version,
    format: Format,
    ours: Versions,
}

impl Header {
    fn check<M: Message>(bytes: [u8; HEADER], ours: Versions) -> Result<Self, WireError> {
        let [a, b, c, d, major, minor] = bytes;
        let theirs = Version { major, minor };
        let format = ours.format(major).ok_or(WireError::Version { theirs, ours })?;
        let length = u32::from_be_bytes([a, b, c, d]) as usize;
        if length > M::LIMIT {
            return Err(WireError::TooLong { length, limit: M::LIMIT });
        }
        Ok(Self { length, theirs, format, ours })
    }

    /// Whether a later release than this one knows of has written the frame.
    fn is_newer(&self) -> bool {
        self.theirs > self.format.version()
    }

    fn decode_body<M: Message>(&self, body: &[u8]) -> Result<M, WireError> {
        match self.format.is_previous() {
            false => self.decode_as(body),
            true => self.decode_as::<M::Previous>(body)?.try_into().map_err(|error| self.unknown(error.to_string())),
        }
    }

    fn decode_as<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, WireError> {
        let config = bincode::config::standard().with_limit::<MAX_DECODE>();
        let is_newer = self.is_newer();
        match bincode::serde::decode_from_slice::<T, _>(body, config) {
            Ok((message, read)) if is_newer && body.len() - read <= MAX_APPENDED => Ok(message),
            Ok((message, read)) if !is_newer && read == body.len() => Ok(message),
            Ok((_, read)) => Err(WireError::Malformed(format!("{} bytes left over", body.len() - read))),
            // It was read, and found to mean nothing: a variant of that release, or a name of a form that is allowed there.
            Err(DecodeError::OtherString(reason)) if is_newer => Err(self.unknown(reason)),
            Err(error) => Err(WireError::Malformed(error.to_string())),
        }
    }

    fn unknown(&self, reason: String) -> WireError {
        WireError::Unknown { theirs: self.theirs, ours: self.ours, reason }
    }
}

impl Message for Hello {
    /// A ServiceAccount token is 1 to 2 KiB, a chain of certificates up to 12 KiB; a name of 253 bytes, and room for more.
    const LIMIT: usize = 16 << 10;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for Welcome {
    /// A [`Hello`] and its variant's tag.
    const LIMIT: usize = Hello::LIMIT + 16;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for Request {
    /// A digest, [`crate::model::MAX_CHOICE`] numbers of up to five bytes, and some bytes around them: 360; the rest is for what later releases append.
    const LIMIT: usize = 512;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for PieceMapUpdate {
    /// A bit for each of [`MAX_PIECES`], or [`crate::model::MAX_NEWS`] numbers of up to five bytes.
    const LIMIT: usize = MAX_PIECES as usize / 8 + 64;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for Answer {
    /// One integer and the tag: 10 bytes; the rest is for what later releases append.
    const LIMIT: usize = 64;
    const VERSIONS: Versions = Versions::TRANSFER;
    type Previous = Self;
}

impl Message for Gossip {
    /// What gossipsub carries, less its own framing of some 50 bytes and this one. An entry has at most 54 KiB
    /// ([`crate::model::MAX_CHANGES`] of the longest names), an introduction 13 KiB.
    const LIMIT: usize = MAX_GOSSIP - 512;
    const VERSIONS: Versions = Versions::GOSSIP;
    type Previous = Self;
}

/// The largest message of gossipsub, its framing included: what libp2p sets by default.
pub const MAX_GOSSIP: usize = 64 << 10;

impl Message for SyncRequest {
    /// The keys of 5000 members, as many as Kubernetes supports nodes; a list of hashes is shorter.
    const LIMIT: usize = 5000 * 32 + 64;
    const VERSIONS: Versions = Versions::GOSSIP;
    type Previous = Self;
}

impl Message for SyncReply {
    /// [`MAX_ITEMS`] of 128 bytes on average: a blob's has 34 and its holders, an image's rarely over 120.
    const LIMIT: usize = MAX_ITEMS * 128;
    const VERSIONS: Versions = Versions::GOSSIP;
    type Previous = Self;
}
