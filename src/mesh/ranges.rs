//! Ranges of small blobs over the mesh's connections, for nodes between which UDP is blocked.
//!
//! A request is a [`Request::Have`], a [`Request::Get`] of at most [`RANGE`] bytes, or a
//! [`Request::HashChain`]. The response is the frame of an [`Answer`], and then bytes until the end
//! of the stream. No request writes, deletes or pushes. The mesh has no access to the content
//! store: a [`RangeServer`] answers.

use std::io;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::{StreamProtocol, request_response};

use super::codec::read_frame;
use crate::decide::transport_choice::RANGE;
use crate::model::PeerId;
use crate::wire::{self, Answer, HEADER, Message, Request, WireError};

/// The stream's protocol, with transfer's MAJOR: agents of two MAJORs have no ranges in common, and
/// need UDP.
pub(super) fn protocol() -> StreamProtocol {
    let major = Request::VERSIONS.current().version().major;
    // A protocol name must begin with a slash, and this name does.
    StreamProtocol::try_from_owned(format!("/lighterman/ranges/{major}"))
        .unwrap_or(StreamProtocol::new("/lighterman/ranges"))
}

/// An answer, and the bytes after the answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RangeResponse {
    /// The same answer as on QUIC.
    pub answer: Answer,
    /// The bytes of the range or of the hash chain; empty where the answer has none.
    pub bytes: Bytes,
}

impl From<Answer> for RangeResponse {
    fn from(answer: Answer) -> Self {
        Self { answer, bytes: Bytes::new() }
    }
}

/// Answers requests of admitted peers from this node's content store.
#[async_trait]
pub trait RangeServer: Send + Sync + 'static {
    /// Answers one request. At most [`RANGE`] bytes follow an answer.
    async fn serve(&self, peer: PeerId, request: Request) -> RangeResponse;
}

/// Why a range did not arrive.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// The peer is no neighbor: the mesh has no connection to the peer.
    #[error("the mesh has no connection to the peer")]
    NotConnected,
    /// The connection ended, the request timed out, or the peer's release has no ranges.
    #[error("no answer over the mesh: {0}")]
    NoAnswer(String),
    /// The response is no valid answer.
    #[error("malformed answer over the mesh: {0}")]
    Malformed(String),
}

/// Parses a complete response.
///
/// # Errors
/// [`WireError`] when the response does not begin with an answer, or is too long.
fn parse(response: Vec<u8>) -> Result<RangeResponse, WireError> {
    if response.len() > MAX_RESPONSE_BYTES {
        return Err(WireError::TooLong { length: response.len(), limit: MAX_RESPONSE_BYTES });
    }
    let (answer, rest) = wire::split::<Answer>(&response)?;
    let begin = response.len() - rest.len();
    let bytes = Bytes::from(response).slice(begin..);
    Ok(RangeResponse { answer, bytes })
}

/// Bytes of a response at most.
const MAX_RESPONSE_BYTES: usize = HEADER + Answer::LIMIT + RANGE as usize;

/// Reads to the end of the stream, but never more than the longest message.
#[derive(Clone, Default)]
pub(super) struct RangeCodec;

impl request_response::Codec for RangeCodec {
    type Protocol = StreamProtocol;
    /// A frame with a [`Request`]. The task counts requests before decoding.
    type Request = Vec<u8>;
    type Response = RangeResponse;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        read_frame(io, Request::LIMIT).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<RangeResponse>
    where
        T: AsyncRead + Unpin + Send,
    {
        let mut response = Vec::new();
        io.take(MAX_RESPONSE_BYTES as u64 + 1).read_to_end(&mut response).await?;
        parse(response).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, request: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&request).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, range: RangeResponse) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let RangeResponse { answer, bytes } = range;
        io.write_all(&wire::encode(&answer).map_err(io::Error::other)?).await?;
        io.write_all(&bytes).await
    }
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use libp2p::request_response::Codec;

    use super::*;

    async fn read(response: Vec<u8>) -> io::Result<RangeResponse> {
        RangeCodec.read_response(&protocol(), &mut Cursor::new(response)).await
    }

    async fn written(range: RangeResponse) -> Vec<u8> {
        let mut stream = Cursor::new(Vec::new());
        RangeCodec.write_response(&protocol(), &mut stream, range).await.unwrap();
        stream.into_inner()
    }

    #[tokio::test]
    async fn a_response_carries_an_answer_and_the_bytes_after_it() {
        for bytes in [Bytes::new(), Bytes::from_static(b"layer"), vec![7; RANGE as usize].into()] {
            let range = RangeResponse { answer: Answer::Blob { size: u64::MAX }, bytes };
            assert_eq!(read(written(range.clone()).await).await.unwrap(), range);
        }
    }

    #[tokio::test]
    async fn a_response_that_is_truncated_or_too_long_is_an_error() {
        let whole = written(Answer::Absent.into()).await;
        for end in 0..whole.len() {
            assert!(read(whole[..end].to_vec()).await.is_err(), "{end} bytes");
        }
        let mut long = written(Answer::Blob { size: 1 }.into()).await;
        long.resize(MAX_RESPONSE_BYTES + 1, 0);
        assert!(read(long).await.is_err());
        assert!(RangeCodec.read_response(&protocol(), &mut futures::io::repeat(0)).await.is_err());
    }

    #[tokio::test]
    async fn a_request_is_read_up_to_its_limit() {
        let read = RangeCodec.read_request(&protocol(), &mut futures::io::repeat(0)).await.unwrap();
        assert_eq!(read.len(), HEADER + Request::LIMIT + 1);
    }
}
