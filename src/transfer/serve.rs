//! Serving: one request a stream, one answer, and for a blob its bytes as fast as the reader takes them.
//!
//! Here: what is asked, and whole blobs, which are small as a rule. Beneath: pieces, lists of states, telling which pieces there are, and
//! ranges for requests that came over the mesh.

mod list;
mod pieces;
mod ranges;
mod telling;

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

use self::pieces::Welcome;
use super::Shared;
use super::codes::{GONE, MALFORMED, OTHER_MAJOR, STORE_FAILED, TOO_SLOW};
use super::tuning::{MAX_FOLLOWED, MAX_STREAMS, READ};
use super::uploads::NoPlace;
use crate::decide::bucket::CHUNK;
use crate::model::PeerId;
use crate::oci::Digest;
use crate::ports::{BlobReader, StoreError};
use crate::wire::{self, Answer, Format, Request, Versions, WireError};

/// The way of one answer.
struct Stream {
    send: SendStream,
    /// Tells how much is on its way.
    connection: Connection,
    /// Of the connection's messages.
    format: Format,
    /// For as many as may be followed on this connection.
    followed: Arc<Semaphore>,
    /// The agent stops.
    stop: CancellationToken,
}

/// Why a request was not served to its end.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("not one request: {0}")]
    Malformed(String),
    #[error("the request needs equal MAJORs of the transfer protocol")]
    OtherMajor,
    #[error("the content store: {0}")]
    Store(#[from] StoreError),
    #[error("the reader does not take it")]
    TooSlow,
    #[error("the reader left: {0}")]
    Left(String),
}

impl ServeError {
    /// With what the stream is reset.
    fn code(&self) -> VarInt {
        match self {
            Self::Malformed(_) => MALFORMED,
            Self::OtherMajor => OTHER_MAJOR,
            Self::Store(StoreError::Absent(_)) => GONE,
            Self::Store(_) => STORE_FAILED,
            Self::TooSlow | Self::Left(_) => TOO_SLOW,
        }
    }
}

impl From<NoPlace> for ServeError {
    fn from(_: NoPlace) -> Self {
        Self::TooSlow
    }
}

impl From<WriteError> for ServeError {
    fn from(error: WriteError) -> Self {
        Self::Left(error.to_string())
    }
}

impl Shared {
    /// Serves an admitted peer until its connection ends. When the agent stops, streams that are being served may end
    /// first; the caller bounds that.
    pub(super) async fn attend(self: &Arc<Self>, peer: PeerId, connection: &Connection, stop: CancellationToken) {
        let mut streams = JoinSet::new();
        let followed = Arc::new(Semaphore::new(MAX_FOLLOWED));
        let format = self.format_on(connection);
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                accepted = connection.accept_bi(), if streams.len() < MAX_STREAMS as usize => match accepted {
                    Ok((send, recv)) => {
                        let (connection, followed, stop) = (connection.clone(), followed.clone(), stop.clone());
                        let stream = Stream { send, connection, format, followed, stop };
                        drop(streams.spawn(self.clone().serve(peer, stream, recv)));
                    }
                    // Nobody is left to be served: the streams are aborted when the set is dropped.
                    Err(_) => return,
                },
                Some(ended) = streams.join_next() => super::report_panic(ended),
            }
        }
        while let Some(ended) = streams.join_next().await {
            super::report_panic(ended);
        }
    }

    async fn serve(self: Arc<Self>, peer: PeerId, mut stream: Stream, mut recv: RecvStream) {
        let served = match timeout(self.limits.hello, read_request(&mut recv, self.versions)).await {
            Ok(Ok(request)) if stream.format.is_previous() && request.needs_equal_majors() => {
                Err(ServeError::OtherMajor)
            }
            Ok(Ok(Request::Have(digest))) => self.tell(digest, &mut stream).await,
            Ok(Ok(Request::Get { digest, offset, length })) => self.send(digest, offset, length, &mut stream).await,
            Ok(Ok(Request::Pieces { digest, choice, most })) => {
                self.send_pieces(peer, Welcome { digest, choice, most }, &mut stream).await
            }
            Ok(Ok(Request::Chain(digest))) => self.send_list(digest, &mut stream).await,
            Ok(Ok(Request::Follow(digest))) => self.tell_pieces(digest, &mut stream).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ServeError::Malformed(format!("not in {:?}", self.limits.hello))),
        };
        let Err(error) = served else { return };
        // Either may have ended already.
        let _ = (stream.send.reset(error.code()), recv.stop(error.code()));
        match error {
            ServeError::Store(StoreError::Absent(digest)) => {
                tracing::debug!(%peer, %digest, "collected while being served")
            }
            ServeError::Store(_) | ServeError::Malformed(_) => tracing::warn!(%peer, %error, "request not served"),
            ServeError::TooSlow | ServeError::Left(_) | ServeError::OtherMajor => {
                tracing::debug!(%peer, %error, "request not served to its end")
            }
        }
    }

    async fn tell(&self, digest: Digest, stream: &mut Stream) -> Result<(), ServeError> {
        match self.asked_of_the_store(self.store.blob(digest)).await {
            Ok(Some(blob)) => self.answer_only(stream, &Answer::Blob { size: blob.size }).await,
            Ok(None) => self.answer_only(stream, &Answer::Absent).await,
            Err(error) => self.admit_failure(stream, error).await,
        }
    }

    async fn send(&self, digest: Digest, offset: u64, length: u64, stream: &mut Stream) -> Result<(), ServeError> {
        // Taken before the store is asked, held until the reader has everything.
        let serving = self.serving.try_acquire().ok();
        let place = if length > CHUNK { self.up.try_place().map(Some) } else { Some(None) };
        let (Some(_serving), Some(_place)) = (serving, place) else {
            return self.answer_only(stream, &Answer::Busy).await;
        };
        let reader = match self.asked_of_the_store(self.store.open(digest)).await {
            Ok(reader) => reader,
            Err(StoreError::Absent(_)) => return self.answer_only(stream, &Answer::Absent).await,
            Err(error) => return self.admit_failure(stream, error).await,
        };
        let size = reader.size();
        let Some(end) = offset.checked_add(length).filter(|end| *end <= size) else {
            return self.answer_only(stream, &Answer::Invalid { size }).await;
        };
        self.answer(stream, &Answer::Blob { size }).await?;
        self.pump(reader, offset, end, &mut stream.send).await?;
        self.finish(stream).await
    }

    /// Bytes from `at` to `end`, one read ahead of the writing, so that disk and network work at the same time.
    async fn pump(
        &self,
        mut reader: Box<dyn BlobReader>,
        mut at: u64,
        end: u64,
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        let most = |at: u64| usize::try_from(end - at).unwrap_or(READ).min(READ);
        let mut chunk = timeout(self.limits.reader, reader.read_at(at, most(at))).await.map_err(|_| slow_store())??;
        while at < end {
            let length = chunk.len() as u64;
            if length == 0 || length > end - at {
                return Err(
                    StoreError::Other(format!("read {length} bytes at {at} where {} are left", end - at)).into()
                );
            }
            at += length;
            let ahead = if at < end {
                Either::Left(reader.read_at(at, most(at)))
            } else {
                Either::Right(ready(Ok(Bytes::new())))
            };
            let (written, read) = join(self.write(chunk, send), timeout(self.limits.reader, ahead)).await;
            written?;
            self.metrics.served(length);
            chunk = read.map_err(|_| slow_store())??;
        }
        Ok(())
    }

    /// What was read at a time; in smaller chunks under a limit, so that the reader sees something all the while. The time that
    /// we wait ourselves is not the reader's.
    async fn write(&self, mut read: Bytes, send: &mut SendStream) -> Result<(), ServeError> {
        let mut patience = self.limits.reader;
        while !read.is_empty() {
            let chunk =
                if self.up.is_limited() { read.split_to(read.len().min(CHUNK as usize)) } else { take(&mut read) };
            self.up.pass(chunk.len() as u64).await;
            let began = Instant::now();
            timeout(patience, send.write_chunk(chunk)).await.map_err(|_| ServeError::TooSlow)??;
            patience = patience.saturating_sub(began.elapsed());
        }
        Ok(())
    }

    async fn asked_of_the_store<T>(&self, asked: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
        timeout(self.limits.answer, asked).await.unwrap_or_else(|_| Err(slow_store()))
    }

    /// The peer is told that it is not its fault, and our log why.
    async fn admit_failure(&self, stream: &mut Stream, error: StoreError) -> Result<(), ServeError> {
        self.answer_only(stream, &Answer::Failed).await?;
        Err(error.into())
    }

    /// Waited for, as a reader may leave no room even for this.
    async fn answer(&self, Stream { send, format, .. }: &mut Stream, answer: &Answer) -> Result<(), ServeError> {
        let written = timeout(self.limits.reader, wire::write_in(send, answer, *format)).await;
        written.map_err(|_| ServeError::TooSlow)?.map_err(broken)
    }

    /// An answer that nothing follows.
    async fn answer_only(&self, stream: &mut Stream, message: &Answer) -> Result<(), ServeError> {
        self.answer(stream, message).await?;
        self.finish(stream).await
    }

    /// Waits until the reader has it all. That is up to a whole window, which takes a slow link minutes: whoever takes a read's worth
    /// in the time that it has for one is waited for on.
    async fn finish(&self, Stream { send, connection, .. }: &mut Stream) -> Result<(), ServeError> {
        send.finish().map_err(|error| ServeError::Left(error.to_string()))?;
        let sent = || connection.stats().udp_tx.bytes;
        loop {
            let before = sent();
            match timeout(self.limits.reader, send.stopped()).await {
                Ok(delivered) => return delivered.map(drop).map_err(|error| ServeError::Left(error.to_string())),
                Err(_) if sent() - before < READ as u64 => return Err(ServeError::TooSlow),
                Err(_) => {}
            }
        }
    }
}

fn slow_store() -> StoreError {
    StoreError::Unavailable("no answer in time".into())
}

/// A request, and nothing after it.
async fn read_request(recv: &mut RecvStream, versions: Versions) -> Result<Request, ServeError> {
    let request = wire::read_in(recv, versions).await.map_err(broken)?;
    match recv.read_chunk(1, true).await {
        Ok(None) => Ok(request),
        Ok(Some(_)) => Err(ServeError::Malformed("something follows the request".into())),
        Err(error) => Err(ServeError::Left(error.to_string())),
    }
}

fn broken(error: WireError) -> ServeError {
    match error {
        WireError::Io(io) if io.kind() != ErrorKind::UnexpectedEof => ServeError::Left(io.to_string()),
        other => ServeError::Malformed(other.to_string()),
    }
}
