//! Serves requests: one request a stream, one answer, and the bytes of a blob as fast as the reader
//! reads.
//!
//! Here: dispatch, and whole blobs, which are small as a rule. Beneath: pieces, hash chains, piece
//! maps, and ranges for requests that came over the mesh.

mod hash_chain;
mod mesh_ranges;
mod piece_map;
mod pieces;

use std::future::ready;
use std::io::ErrorKind;
use std::mem::take;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::{Either, join};
use quinn::{Connection, RecvStream, SendStream, VarInt, WriteError};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use self::pieces::RequestedPieces;
use super::Shared;
use super::close_codes::{BLOB_REMOVED, MALFORMED, OTHER_MAJOR, STORE_FAILED, TOO_SLOW};
use super::tuning::{MAX_FOLLOWED, MAX_STREAMS, READ_BYTES};
use super::upload_queue::NoUploadSlot;
use crate::decide::byte_bucket::CHUNK;
use crate::model::PeerId;
use crate::oci::Digest;
use crate::ports::{BlobReader, StoreError};
use crate::wire::{self, Answer, Format, Request, Versions, WireError};

/// The stream of one answer, and the state of its connection.
struct ResponseStream {
    send: SendStream,
    /// Counts the bytes that were sent.
    connection: Connection,
    /// The format of the connection's messages.
    format: Format,
    /// Permits for the blobs that are followed on this connection.
    follow_permits: Arc<Semaphore>,
    /// Cancelled when the agent stops.
    stop: CancellationToken,
}

/// Why a request was not served to its end.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("malformed request: {0}")]
    Malformed(String),
    #[error("the request needs equal MAJORs of the transfer protocol")]
    OtherMajor,
    #[error("the content store failed: {0}")]
    Store(#[from] StoreError),
    #[error("the reader reads too slowly")]
    TooSlow,
    #[error("the reader closed the stream: {0}")]
    Left(String),
}

impl ServeError {
    /// The code with which the stream is reset.
    fn code(&self) -> VarInt {
        match self {
            Self::Malformed(_) => MALFORMED,
            Self::OtherMajor => OTHER_MAJOR,
            Self::Store(StoreError::Absent(_)) => BLOB_REMOVED,
            Self::Store(_) => STORE_FAILED,
            Self::TooSlow | Self::Left(_) => TOO_SLOW,
        }
    }
}

impl From<NoUploadSlot> for ServeError {
    fn from(_: NoUploadSlot) -> Self {
        Self::TooSlow
    }
}

impl From<WriteError> for ServeError {
    fn from(error: WriteError) -> Self {
        Self::Left(error.to_string())
    }
}

impl Shared {
    /// Serves an admitted peer until the connection closes. When the agent stops, open streams may
    /// end first; the caller bounds the wait.
    pub(super) async fn serve_connection(
        self: &Arc<Self>,
        peer: PeerId,
        connection: &Connection,
        stop: CancellationToken,
    ) {
        let mut streams = JoinSet::new();
        let follow_permits = Arc::new(Semaphore::new(MAX_FOLLOWED));
        let format = self.format_on(connection);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                accepted = connection.accept_bi(), if streams.len() < MAX_STREAMS as usize => match accepted {
                    Ok((send, recv)) => {
                        let (connection, follow_permits, stop) = (connection.clone(), follow_permits.clone(), stop.clone());
                        let stream = ResponseStream { send, connection, format, follow_permits, stop };
                        drop(streams.spawn(self.clone().serve(peer, stream, recv)));
                    }
                    // The connection is closed. Dropping the set aborts the open streams.
                    Err(_) => return,
                },
                Some(ended) = streams.join_next() => super::report_panic(ended),
            }
        }
        while let Some(ended) = streams.join_next().await {
            super::report_panic(ended);
        }
    }

    async fn serve(self: Arc<Self>, peer: PeerId, mut stream: ResponseStream, mut recv: RecvStream) {
        let served = match timeout(self.timeouts.hello, read_request(&mut recv, self.versions)).await {
            Ok(Ok(request)) if stream.format.is_previous() && request.needs_equal_majors() => {
                Err(ServeError::OtherMajor)
            }
            Ok(Ok(Request::Have(digest))) => self.serve_have(digest, &mut stream).await,
            Ok(Ok(Request::Get { digest, offset, length })) => {
                self.serve_get(digest, offset, length, &mut stream).await
            }
            Ok(Ok(Request::Pieces { digest, pieces, limit })) => {
                self.serve_pieces(peer, RequestedPieces { digest, pieces, limit }, &mut stream).await
            }
            Ok(Ok(Request::HashChain(digest))) => self.serve_hash_chain(digest, &mut stream).await,
            Ok(Ok(Request::Follow(digest))) => self.serve_follow(digest, &mut stream).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ServeError::Malformed(format!("timed out after {:?}", self.timeouts.hello))),
        };
        let Err(error) = served else { return };
        // The calls fail on a closed stream, which is no error here.
        let _ = (stream.send.reset(error.code()), recv.stop(error.code()));
        match error {
            ServeError::Store(StoreError::Absent(digest)) => {
                tracing::debug!(%peer, %digest, "blob removed during the upload")
            }
            ServeError::Store(_) | ServeError::Malformed(_) => tracing::warn!(%peer, %error, "request not served"),
            ServeError::TooSlow | ServeError::Left(_) | ServeError::OtherMajor => {
                tracing::debug!(%peer, %error, "request not served to its end")
            }
        }
    }

    async fn serve_have(&self, digest: Digest, stream: &mut ResponseStream) -> Result<(), ServeError> {
        match self.with_store_timeout(self.store.blob(digest)).await {
            Ok(Some(blob)) => self.answer_and_finish(stream, &Answer::Blob { size: blob.size }).await,
            Ok(None) => self.answer_and_finish(stream, &Answer::Absent).await,
            Err(error) => self.answer_store_failure(stream, error).await,
        }
    }

    async fn serve_get(
        &self,
        digest: Digest,
        offset: u64,
        length: u64,
        stream: &mut ResponseStream,
    ) -> Result<(), ServeError> {
        // Acquired before the store is read, and held until the reader has everything.
        let serve_permit = self.serve_permits.try_acquire().ok();
        let permit = if length > CHUNK { self.upload_limiter.try_acquire_permit().map(Some) } else { Some(None) };
        let (Some(_serve_permit), Some(_permit)) = (serve_permit, permit) else {
            return self.answer_and_finish(stream, &Answer::Busy).await;
        };
        let reader = match self.with_store_timeout(self.store.open(digest)).await {
            Ok(reader) => reader,
            Err(StoreError::Absent(_)) => return self.answer_and_finish(stream, &Answer::Absent).await,
            Err(error) => return self.answer_store_failure(stream, error).await,
        };
        let size = reader.size();
        let Some(end) = offset.checked_add(length).filter(|end| *end <= size) else {
            return self.answer_and_finish(stream, &Answer::Invalid { size }).await;
        };
        self.answer(stream, &Answer::Blob { size }).await?;
        self.send_range(reader, offset, end, &mut stream.send).await?;
        self.finish(stream).await
    }

    /// Sends the bytes from `at` to `end`. One read runs ahead of the write, so that disk and
    /// network work at the same time.
    async fn send_range(
        &self,
        mut reader: Box<dyn BlobReader>,
        mut at: u64,
        end: u64,
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        let limit = |at: u64| usize::try_from(end - at).unwrap_or(READ_BYTES).min(READ_BYTES);
        let mut chunk =
            timeout(self.timeouts.slow_reader, reader.read_at(at, limit(at))).await.map_err(|_| store_timeout())??;
        while at < end {
            let length = chunk.len() as u64;
            if length == 0 || length > end - at {
                return Err(
                    StoreError::Other(format!("read {length} bytes at {at} where {} are left", end - at)).into()
                );
            }
            at += length;
            let read_ahead = if at < end {
                Either::Left(reader.read_at(at, limit(at)))
            } else {
                Either::Right(ready(Ok(Bytes::new())))
            };
            let (written, read) =
                join(self.write_limited(chunk, send), timeout(self.timeouts.slow_reader, read_ahead)).await;
            written?;
            self.metrics.served(length);
            chunk = read.map_err(|_| store_timeout())??;
        }
        Ok(())
    }

    /// Writes the bytes of one read, in smaller chunks under a rate limit, so that the reader
    /// receives bytes all the time. Waits for the rate limiter do not count against the reader.
    async fn write_limited(&self, mut read: Bytes, send: &mut SendStream) -> Result<(), ServeError> {
        let mut time_left = self.timeouts.slow_reader;
        while !read.is_empty() {
            let chunk = if self.upload_limiter.is_limited() {
                read.split_to(read.len().min(CHUNK as usize))
            } else {
                take(&mut read)
            };
            self.upload_limiter.acquire_bytes(chunk.len() as u64).await;
            let began = Instant::now();
            timeout(time_left, send.write_chunk(chunk)).await.map_err(|_| ServeError::TooSlow)??;
            time_left = time_left.saturating_sub(began.elapsed());
        }
        Ok(())
    }

    async fn with_store_timeout<T>(
        &self,
        operation: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        timeout(self.timeouts.answer, operation).await.unwrap_or_else(|_| Err(store_timeout()))
    }

    /// Answers that the store failed, which is no fault of the peer. Returns the error for our log.
    async fn answer_store_failure(&self, stream: &mut ResponseStream, error: StoreError) -> Result<(), ServeError> {
        self.answer_and_finish(stream, &Answer::Failed).await?;
        Err(error.into())
    }

    /// Bounded by a timeout: the reader's window may have no room even for the answer.
    async fn answer(
        &self,
        ResponseStream { send, format, .. }: &mut ResponseStream,
        answer: &Answer,
    ) -> Result<(), ServeError> {
        let written = timeout(self.timeouts.slow_reader, wire::write_in(send, answer, *format)).await;
        written.map_err(|_| ServeError::TooSlow)?.map_err(wire_failure)
    }

    /// Sends an answer that no data follows.
    async fn answer_and_finish(&self, stream: &mut ResponseStream, message: &Answer) -> Result<(), ServeError> {
        self.answer(stream, message).await?;
        self.finish(stream).await
    }

    /// Waits until the reader has acknowledged the whole stream. A whole window may be
    /// unacknowledged, which takes a slow link minutes. The wait fails when the connection sends
    /// less than [`READ_BYTES`] in the time that a reader has for one read.
    async fn finish(&self, ResponseStream { send, connection, .. }: &mut ResponseStream) -> Result<(), ServeError> {
        send.finish().map_err(|error| ServeError::Left(error.to_string()))?;
        let sent = || connection.stats().udp_tx.bytes;
        loop {
            let before = sent();
            match timeout(self.timeouts.slow_reader, send.stopped()).await {
                Ok(delivered) => return delivered.map(drop).map_err(|error| ServeError::Left(error.to_string())),
                Err(_) if sent() - before < READ_BYTES as u64 => return Err(ServeError::TooSlow),
                Err(_) => {}
            }
        }
    }
}

fn store_timeout() -> StoreError {
    StoreError::Unavailable("no answer in time".into())
}

/// Reads a request, and requires the end of the stream after it.
async fn read_request(recv: &mut RecvStream, versions: Versions) -> Result<Request, ServeError> {
    let request = wire::read_in(recv, versions).await.map_err(wire_failure)?;
    match recv.read_chunk(1, true).await {
        Ok(None) => Ok(request),
        Ok(Some(_)) => Err(ServeError::Malformed("data follows the request".into())),
        Err(error) => Err(ServeError::Left(error.to_string())),
    }
}

fn wire_failure(error: WireError) -> ServeError {
    match error {
        WireError::Io(io) if io.kind() != ErrorKind::UnexpectedEof => ServeError::Left(io.to_string()),
        other => ServeError::Malformed(other.to_string()),
    }
}
