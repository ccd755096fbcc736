//! How a question is asked and answered on a stream of its own; [`crate::wire`] encodes and decodes.
//!
//! A question is handed on as it came, so that it is counted before it is decoded. A reply, which may be long, is encoded and decoded
//! here, in its connection's task, and holds up no other.

use std::io;

use futures::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use libp2p::StreamProtocol;
use libp2p::request_response;
use tracing::error;

use crate::model::{Question, Reply};
use crate::wire::{self, HEADER, Message, WireError};

/// The stream's protocol. The frames carry the version of what is in them.
pub(super) const PROTOCOL: StreamProtocol = StreamProtocol::new("/lighterman/mesh/2");

/// Reads to the end of the stream, which the other side closes after its message, but never more than the largest one.
#[derive(Clone, Default)]
pub(super) struct MeshCodec;

impl request_response::Codec for MeshCodec {
    type Protocol = StreamProtocol;
    /// A [`Question`] in its frame.
    type Request = Vec<u8>;
    type Response = Reply;

    async fn read_request<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Vec<u8>>
    where
        T: AsyncRead + Unpin + Send,
    {
        // libp2p tells nobody that reading failed, so one that is too long is handed on as far as it was read, to be refused there.
        read_frame(io, Question::LIMIT).await
    }

    async fn read_response<T>(&mut self, _: &StreamProtocol, io: &mut T) -> io::Result<Reply>
    where
        T: AsyncRead + Unpin + Send,
    {
        let frame = read_frame(io, Reply::LIMIT).await?;
        wire::decode(&frame).map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))
    }

    async fn write_request<T>(&mut self, _: &StreamProtocol, io: &mut T, question: Vec<u8>) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        io.write_all(&question).await
    }

    async fn write_response<T>(&mut self, _: &StreamProtocol, io: &mut T, reply: Reply) -> io::Result<()>
    where
        T: AsyncWrite + Unpin + Send,
    {
        let encoded = wire::encode(&reply).or_else(|error| {
            error!(%error, "a reply cannot be sent");
            wire::encode(&Reply::Busy)
        });
        io.write_all(&encoded.map_err(io::Error::other)?).await
    }
}

/// What was wrong with a message, if that is what the stream failed of.
pub(super) fn wire_error(error: &io::Error) -> Option<&WireError> {
    error.get_ref()?.downcast_ref()
}

/// At most one byte more than a message of this limit can have. The buffer grows with what arrives, so a length that was only claimed
/// allocates nothing.
async fn read_frame(io: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<Vec<u8>> {
    let mut frame = Vec::new();
    io.take((HEADER + limit + 1) as u64).read_to_end(&mut frame).await?;
    Ok(frame)
}

#[cfg(test)]
mod tests {
    use futures::io::Cursor;
    use libp2p::request_response::Codec;

    use super::*;

    #[tokio::test]
    async fn a_question_and_a_reply_pass() {
        let question = Question::Compare(vec![1, 2, 3]);
        let mut stream = Cursor::new(Vec::new());
        MeshCodec.write_request(&PROTOCOL, &mut stream, wire::encode(&question).unwrap()).await.unwrap();
        let asked = MeshCodec.read_request(&PROTOCOL, &mut Cursor::new(stream.into_inner())).await.unwrap();
        assert_eq!(wire::decode::<Question>(&asked).unwrap(), question);

        let reply = Reply::Entries(Vec::new());
        let mut stream = Cursor::new(Vec::new());
        MeshCodec.write_response(&PROTOCOL, &mut stream, reply.clone()).await.unwrap();
        let answer = MeshCodec.read_response(&PROTOCOL, &mut Cursor::new(stream.into_inner())).await.unwrap();
        assert_eq!(answer, reply);
    }

    #[tokio::test]
    async fn neither_side_reads_more_than_its_message_may_have() {
        let mut endless = futures::io::repeat(0);
        let question = MeshCodec.read_request(&PROTOCOL, &mut endless).await.unwrap();
        assert_eq!(question.len(), HEADER + Question::LIMIT + 1);
        assert!(MeshCodec.read_response(&PROTOCOL, &mut endless).await.is_err());
    }

    #[tokio::test]
    async fn nonsense_is_told_apart_from_a_broken_stream() {
        let error = MeshCodec.read_response(&PROTOCOL, &mut Cursor::new(vec![0xff; 20])).await.unwrap_err();
        assert!(matches!(wire_error(&error), Some(WireError::Version { major: 0xff, .. })), "{error}");
        assert!(wire_error(&io::Error::from(io::ErrorKind::ConnectionReset)).is_none());
    }
}
