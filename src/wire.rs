//! All messages that agents send each other. Only this module encodes or decodes a message.
//! `model::gossip` defines the gossip messages.
//!
//! A frame is a length (u32, big endian), the protocol's version (major and minor, a byte each) and
//! the message in bincode. The length is checked against the limit of the message before anything
//! is allocated, and bincode limits the decoding again. The bytes of a blob follow raw after the
//! answer, and are never copied into a message. Another codec would change this file alone.
//!
//! # Two releases side by side
//!
//! Gossip and transfer have a version each ([`Versions`]). A release that sends more than the
//! release before raises the MINOR of the protocol. Such a release may append fields to the end of
//! a message, which an older agent ignores. Such a release may also add variants, which an older
//! agent tells from malformed messages ([`WireError::Unknown`]) and ignores. A decoder has to do
//! without the fields that a message of an older MINOR lacks; while the MINOR is 0, no older MINOR
//! exists.
//!
//! Any other change raises the MAJOR of the protocol. Agents of neighboring MAJORs exchange
//! `Hello`, `Welcome`, `Have` and `Get` over QUIC, and all gossip, in the older format. `Pieces`,
//! `HashChain` and `Follow` need equal MAJORs; the fetcher replaces these by `Have` and `Get`
//! (`transfer::fetch::other_major`). Such a change has three parts, and touches no other file:
//!
//! 1. in [`Versions`] the new MAJOR as `current`, and the MAJOR before as `previous`;
//! 2. a module with the old messages, and their conversions (`From` one way, `TryFrom` the other);
//! 3. the old type as [`Message::Previous`] of the message that changed.
//!
//! Signatures cover bytes that no codec makes (`crate::model`, `signed`), so a relay in another
//! format keeps the signatures valid.

mod error;
mod frame;
#[cfg(test)]
mod golden;
#[cfg(test)]
mod tests;
mod transfer_messages;
mod version;

use std::fmt::Display;

use bincode::error::DecodeError;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

pub use self::error::WireError;
pub use self::transfer_messages::{Answer, Hello, Request, Welcome};
pub use self::version::{FIRST_MAJOR, Format, ProtocolKind, Version, Versions};
use crate::model::{Gossip, MAX_ITEMS, SyncReply, SyncRequest};
pub use frame::split;

/// A message that an agent sends to another in one frame.
pub trait Message: Clone + Serialize + DeserializeOwned {
    /// The largest encoding that is accepted or sent, in bytes, without the frame's [`HEADER`].
    const LIMIT: usize;

    /// The versions of the message's protocol.
    const VERSIONS: Versions;

    /// The message in the previous MAJOR; `Self` where the two MAJORs do not differ.
    type Previous: Serialize + DeserializeOwned + From<Self> + TryInto<Self, Error: Display>;
}

/// The length of a frame's header, in bytes.
pub const HEADER: usize = 6;

/// Encodes a message with its frame, for peers of the same MAJOR.
///
/// # Errors
/// [`WireError::TooLong`] when the message exceeds its limit: a bug of the sender, or an inventory
/// beyond all bounds.
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

/// Decodes a whole frame of a peer of the same MAJOR, or of the one before; nothing may follow the
/// frame.
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

/// Decodes a frame for a relay. `true` when a later release has written the frame.
///
/// A frame of this release must equal the encoding of this release. bincode reads a number in
/// several encodings, and each would be a message of its own where only bytes are compared.
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
        return Err(WireError::Malformed(format!("{} bytes instead of the announced {length}", body.len())));
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

/// Bytes that one decode may allocate, for all messages: twice the largest limit below. bincode
/// counts values at their size in memory, so a length inside a message cannot exceed this bound
/// either. An integer that was sent in one byte counts eight. The worst honest message consists of
/// [`crate::model::MemberSummary`]s, with 65 bytes counted for 37 sent.
const MAX_DECODE: usize = 2 * SyncReply::LIMIT;

/// Bytes that later releases may append to a message; a longer tail is malformed.
const MAX_APPENDED: usize = 256;

/// The checked header of a frame.
struct Header {
    /// The length of the message in bytes, within its limit.
    length: usize,
    /// The version in the frame; the MAJOR is that of the format.
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

    /// Whether a later release than this one has written the frame.
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
            // The body was read, but has no meaning here: a variant of that release, or a name in a
            // form that is allowed there.
            Err(DecodeError::OtherString(reason)) if is_newer => Err(self.unknown(reason)),
            Err(error) => Err(WireError::Malformed(error.to_string())),
        }
    }

    fn unknown(&self, reason: String) -> WireError {
        WireError::Unknown { theirs: self.theirs, ours: self.ours, reason }
    }
}

impl Message for Gossip {
    /// The limit of gossipsub, less its own framing of some 50 bytes and this one. An entry has at
    /// most 54 KiB ([`crate::model::MAX_CHANGES`] of the longest names), an introduction 13 KiB.
    const LIMIT: usize = MAX_GOSSIP - 512;
    const VERSIONS: Versions = Versions::GOSSIP;
    type Previous = Self;
}

/// The largest message of gossipsub, its framing included: libp2p's default.
pub const MAX_GOSSIP: usize = 64 << 10;

impl Message for SyncRequest {
    /// The keys of 5000 members, as many as Kubernetes supports nodes; a list of hashes is shorter.
    const LIMIT: usize = 5000 * 32 + 64;
    const VERSIONS: Versions = Versions::GOSSIP;
    type Previous = Self;
}

impl Message for SyncReply {
    /// [`MAX_ITEMS`] of 128 bytes on average: a blob's item has 34 bytes and its providers, an
    /// image's rarely over 120.
    const LIMIT: usize = MAX_ITEMS * 128;
    const VERSIONS: Versions = Versions::GOSSIP;
    type Previous = Self;
}
