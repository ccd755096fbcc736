//! Reading and writing of sync requests and replies on streams; [`crate::wire`] encodes and
//! decodes.
//!
//! A request reaches the task undecoded, so the task counts the request before decoding. A reply,
//! which may be long, is encoded and decoded here, in the connection's task, and delays no other
//! connection.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::request_response;
use tracing::error;

use crate::model::{SyncReply, SyncRequest};
use crate::wire::{self, FIRST_MAJOR, Format, HEADER, Message, Versions, WireError};

/// The stream's protocol: a MAJOR of gossip. libp2p negotiates the agent's first version that the
/// other side supports.
#[derive(Debug, Clone)]
pub(super) struct MeshProtocol {
    name: String,
    format: Format,
}

impl MeshProtocol {
    /// The protocol for messages in this format.
    pub(super) fn of(format: Format) -> Self {
        let name = match format.version().major {
            FIRST_MAJOR => "/lighterman/mesh/2".to_owned(),
            major => format!("/lighterman/mesh/{major}"),
        };
        Self { name, format }
    }
}

impl AsRef<str> for MeshProtocol {
    fn as_ref(&self) -> &str {
        &self.name
    }
}

/// Reads to the end of the stream, which the other side closes after its message, but never more
/// than the longest message.
#[derive(Clone)]
pub(super) struct MeshCodec(pub(super) Versions);

impl request_response::Codec for MeshCodec {
    type Protocol = MeshProtocol;
    /// A frame with a [`SyncRequest`]. An outgoing frame is in the current format here;
    /// `write_request` encodes the request again for a peer of the previous MAJOR.
    type Request = Vec<u8>;
    type Response = SyncReply;

    async fn read_request<T>(&mut self, _: &MeshProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        // libp2p does not report a failed read, so a prefix of an oversized frame goes to the task,
        // which rejects the frame.
        read_frame(io, SyncRequest::LIMIT).await
    }

    async fn read_response<T>(&mut self, _: &MeshProtocol, io: &mut T) -> io::Result<SyncReply>
    where
        T: AsyncRead + Unpin + Send,
    {
        let frame = read_frame(io, SyncReply::LIMIT).await?;
        wire::decode_in(&frame, self.0).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    async fn write_request<T>(&mut self, protocol: &MeshProtocol, io: &mut T, request: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        if !protocol.format.is_previous() {
            return io.write_all(&request).await;
        }
        let request = wire::decode_in::<SyncRequest>(&request, self.0).map_err(io::Error::other)?;
        io.write_all(&wire::encode_in(&request, protocol.format).map_err(io::Error::other)?).await
    }

    async fn write_response<T>(&mut self, protocol: &MeshProtocol, io: &mut T, reply: SyncReply) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let encoded = wire::encode_in(&reply, protocol.format).or_else(|error| {
            error!(%error, "a reply cannot be sent");
            wire::encode_in(&SyncReply::Busy, protocol.format)
        });
        io.write_all(&encoded.map_err(io::Error::other)?).await
    }
}

/// The wire error behind an I/O error of a stream, if any.
pub(super) fn wire_error(error: &io::Error) -> Option<&WireError> {
    error.get_ref()?.downcast_ref()
}

/// Reads at most one byte more than a message with this limit can have. The buffer grows with the
/// bytes that arrive, so a claimed length allocates nothing.
pub(super) async fn read_frame(io: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<Vec<u8>> {
    let mut frame = Vec::new();
    io.take((HEADER + limit + 1) as u64).read_to_end(&mut frame).await?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use libp2p::request_response::Codec;

    use super::*;

    const CURRENT: MeshCodec = MeshCodec(Versions::GOSSIP);

    fn protocol() -> MeshProtocol {
        MeshProtocol::of(Versions::GOSSIP.current())
    }

    async fn assert_passes(from: &mut MeshCodec, to: &mut MeshCodec, sent: &MeshProtocol, received: &MeshProtocol) {
        let request = SyncRequest::Compare(vec![1, 2, 3]);
        let encoded = wire::encode_in(&request, from.0.current()).unwrap();
        let mut stream = Cursor::new(Vec::new());
        from.write_request(sent, &mut stream, encoded).await.unwrap();
        let decoded = to.read_request(received, &mut Cursor::new(stream.into_inner())).await.unwrap();
        assert_eq!(wire::decode_in::<SyncRequest>(&decoded, to.0).unwrap(), request);

        let reply = SyncReply::Entries(Vec::new());
        let mut stream = Cursor::new(Vec::new());
        from.write_response(sent, &mut stream, reply.clone()).await.unwrap();
        let answer = to.read_response(received, &mut Cursor::new(stream.into_inner())).await.unwrap();
        assert_eq!(answer, reply);
    }

    #[tokio::test]
    async fn a_sync_request_and_a_reply_pass() {
        assert_passes(&mut CURRENT.clone(), &mut CURRENT.clone(), &protocol(), &protocol()).await;
    }

    #[tokio::test]
    async fn a_sync_request_and_a_reply_pass_between_neighboring_majors() {
        let versions = Versions::GOSSIP.after_next_major();
        let (mut next, previous) = (MeshCodec(versions), MeshProtocol::of(versions.previous().unwrap()));
        assert_eq!(previous.as_ref(), protocol().as_ref());
        assert_passes(&mut next, &mut CURRENT.clone(), &previous, &protocol()).await;
        assert_passes(&mut CURRENT.clone(), &mut next, &protocol(), &previous).await;
    }

    #[tokio::test]
    async fn a_request_and_a_response_are_read_up_to_their_limits() {
        let mut endless = futures::io::repeat(0);
        let frame = CURRENT.clone().read_request(&protocol(), &mut endless).await.unwrap();
        assert_eq!(frame.len(), HEADER + SyncRequest::LIMIT + 1);
        assert!(CURRENT.clone().read_response(&protocol(), &mut endless).await.is_err());
    }

    #[tokio::test]
    async fn a_malformed_message_is_distinguished_from_a_broken_stream() {
        let mut malformed = Cursor::new(vec![0xff; 20]);
        let error = CURRENT.clone().read_response(&protocol(), &mut malformed).await.unwrap_err();
        assert!(matches!(wire_error(&error), Some(WireError::Version { .. })), "{error}");
        assert!(wire_error(&io::Error::from(io::ErrorKind::ConnectionReset)).is_none());
    }
}
