//! How a snapshot is asked for and answered on a stream of its own.
//!
//! The answer is kept encoded, so that all who ask share the same bytes; [`crate::wire`] encodes and decodes.

use std::io;

use bytes::Bytes;
use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::request_response;

use crate::wire::{self, Message, Snapshot, SnapshotRequest, WireError};

/// The stream's protocol. The frames carry the version of what is in them.
pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/lighterman/snapshot/1");

/// More than a frame's header; what lies between is refused when the frame is decoded.
const HEADER: usize = 64;

/// Reads to the end of the stream, which the other side closes after its message, but never more than the largest one.
#[derive(Clone, Default)]
pub(super) struct SnapshotCodec;

impl request_response::Codec for SnapshotCodec {
    type Protocol = StreamProtocol;
    type Request = SnapshotRequest;
    type Response = Bytes;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<SnapshotRequest>
    where
        T: AsyncRead + Unpin + Send,
    {
        let frame = read_frame(io, SnapshotRequest::LIMIT).await?;
        wire::decode(&frame).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Bytes>
    where
        T: AsyncRead + Unpin + Send,
    {
        Ok(read_frame(io, Snapshot::LIMIT).await?.into())
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, request: SnapshotRequest) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&wire::encode(&request).map_err(io::Error::other)?).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, response: Bytes) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&response).await
    }
}

/// The buffer grows with what arrives, so a length that was only claimed allocates nothing.
async fn read_frame(io: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<Vec<u8>> {
    let most = limit + HEADER;
    let mut frame = Vec::new();
    io.take(most as u64 + 1).read_to_end(&mut frame).await?;
    if frame.len() > most {
        let error = WireError::TooLong { length: frame.len(), limit };
        return Err(io::Error::new(io::ErrorKind::InvalidData, error));
    }
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use libp2p::request_response::Codec;

    use super::*;

    #[tokio::test]
    async fn a_request_and_an_answer_pass() {
        let mut stream = Cursor::new(Vec::new());
        SnapshotCodec.write_request(&PROTOCOL, &mut stream, SnapshotRequest).await.unwrap();
        let request = SnapshotCodec.read_request(&PROTOCOL, &mut Cursor::new(stream.into_inner())).await.unwrap();
        assert_eq!(request, SnapshotRequest);

        let snapshot = Snapshot { epoch: 1, sequence: 2, items: vec![] };
        let mut stream = Cursor::new(Vec::new());
        let encoded = Bytes::from(wire::encode(&snapshot).unwrap());
        SnapshotCodec.write_response(&PROTOCOL, &mut stream, encoded).await.unwrap();
        let answer = SnapshotCodec.read_response(&PROTOCOL, &mut Cursor::new(stream.into_inner())).await.unwrap();
        assert_eq!(wire::decode::<Snapshot>(&answer).unwrap(), snapshot);
    }

    #[tokio::test]
    async fn neither_side_reads_more_than_its_message_may_have() {
        let mut endless = futures::io::repeat(0);
        assert!(SnapshotCodec.read_request(&PROTOCOL, &mut endless).await.is_err());
        assert!(SnapshotCodec.read_response(&PROTOCOL, &mut endless).await.is_err());
    }
}
