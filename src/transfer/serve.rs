//! Serving: one request a stream, one answer, and for a blob its bytes as fast as the reader takes them.

use std::future::ready;
use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::{Either, join};
use quinn::{Connection, RecvStream, SendStream, VarInt, WriteError};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::Shared;
use super::codes::{GONE, MALFORMED, STORE_FAILED, TOO_SLOW};
use super::tuning::{MAX_STREAMS, READ};
use crate::model::PeerId;
use crate::oci::Digest;
use crate::ports::{BlobReader, StoreError};
use crate::wire::{self, Answer, Request, WireError};

/// Why a request was not served to its end.
#[derive(Debug, thiserror::Error)]
enum ServeError {
    #[error("not one request: {0}")]
    Malformed(String),
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
            Self::Store(StoreError::Absent(_)) => GONE,
            Self::Store(_) => STORE_FAILED,
            Self::TooSlow | Self::Left(_) => TOO_SLOW,
        }
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
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                accepted = connection.accept_bi(), if streams.len() < MAX_STREAMS as usize => match accepted {
                    Ok((send, recv)) => drop(streams.spawn(self.clone().serve(peer, send, recv))),
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

    async fn serve(self: Arc<Self>, peer: PeerId, mut send: SendStream, mut recv: RecvStream) {
        let served = match timeout(self.limits.hello, read_request(&mut recv)).await {
            Ok(Ok(Request::Have(digest))) => self.tell(digest, &mut send).await,
            Ok(Ok(Request::Get { digest, offset, length })) => self.send(digest, offset, length, &mut send).await,
            Ok(Err(error)) => Err(error),
            Err(_) => Err(ServeError::Malformed(format!("not in {:?}", self.limits.hello))),
        };
        let Err(error) = served else { return };
        // Either may have ended already.
        let _ = (send.reset(error.code()), recv.stop(error.code()));
        match error {
            ServeError::Store(StoreError::Absent(digest)) => {
                tracing::debug!(%peer, %digest, "collected while being served")
            }
            ServeError::Store(_) | ServeError::Malformed(_) => tracing::warn!(%peer, %error, "request not served"),
            ServeError::TooSlow | ServeError::Left(_) => {
                tracing::debug!(%peer, %error, "request not served to its end")
            }
        }
    }

    async fn tell(&self, digest: Digest, send: &mut SendStream) -> Result<(), ServeError> {
        let known = timeout(self.limits.answer, self.store.blob(digest)).await.map_err(|_| slow_store())??;
        answer(send, &known.map_or(Answer::Absent, |blob| Answer::Blob { size: blob.size })).await?;
        self.finish(send).await
    }

    async fn send(&self, digest: Digest, offset: u64, length: u64, send: &mut SendStream) -> Result<(), ServeError> {
        // Taken before the store is asked, held until the reader has everything.
        let Ok(_serving) = self.serving.try_acquire() else {
            answer(send, &Answer::Busy).await?;
            return self.finish(send).await;
        };
        let opened = timeout(self.limits.answer, self.store.open(digest)).await.map_err(|_| slow_store())?;
        let reader = match opened {
            Err(StoreError::Absent(_)) => {
                answer(send, &Answer::Absent).await?;
                return self.finish(send).await;
            }
            other => other?,
        };
        let size = reader.size();
        let Some(end) = offset.checked_add(length).filter(|end| *end <= size) else {
            answer(send, &Answer::Invalid).await?;
            return self.finish(send).await;
        };
        answer(send, &Answer::Blob { size }).await?;
        self.pump(reader, offset, end, send).await?;
        self.finish(send).await
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
            let both = timeout(self.limits.reader, join(send.write_chunk(chunk), ahead));
            let (written, read) = both.await.map_err(|_| ServeError::TooSlow)?;
            written?;
            self.metrics.served(length);
            chunk = read?;
        }
        Ok(())
    }

    /// Waits until the reader has it all.
    async fn finish(&self, send: &mut SendStream) -> Result<(), ServeError> {
        send.finish().map_err(|error| ServeError::Left(error.to_string()))?;
        let delivered = timeout(self.limits.reader, send.stopped()).await.map_err(|_| ServeError::TooSlow)?;
        delivered.map(drop).map_err(|error| ServeError::Left(error.to_string()))
    }
}

fn slow_store() -> StoreError {
    StoreError::Unavailable("no answer in time".into())
}

/// A request, and nothing after it.
async fn read_request(recv: &mut RecvStream) -> Result<Request, ServeError> {
    let request = wire::read(recv).await.map_err(broken)?;
    match recv.read_chunk(1, true).await {
        Ok(None) => Ok(request),
        Ok(Some(_)) => Err(ServeError::Malformed("something follows the request".into())),
        Err(error) => Err(ServeError::Left(error.to_string())),
    }
}

async fn answer(send: &mut SendStream, answer: &Answer) -> Result<(), ServeError> {
    wire::write(send, answer).await.map_err(broken)
}

fn broken(error: WireError) -> ServeError {
    match error {
        WireError::Io(io) if io.kind() != ErrorKind::UnexpectedEof => ServeError::Left(io.to_string()),
        other => ServeError::Malformed(other.to_string()),
    }
}
