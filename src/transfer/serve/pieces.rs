//! Serving pieces: of those that are welcome and here the ones that were sent the least.

use std::collections::HashSet;
use std::mem::take;
use std::sync::Arc;

use bytes::Bytes;
use futures::future::join;
use quinn::SendStream;
use tokio::time::{Instant, timeout};

use super::{ServeError, Stream, slow_store};
use crate::decide::bucket::CHUNK;
use crate::model::{MAX_CHOICE, PeerId};
use crate::oci::{Cut, Digest};
use crate::ports::{BlobReader, Partial, StoreError};
use crate::transfer::Shared;
use crate::transfer::tuning::{MOVES, READ};
use crate::transfer::uploads::{NoPlace, Upload};
use crate::wire::Answer;

/// Where the bytes are.
enum Source {
    Whole(Box<dyn BlobReader>),
    Part(Arc<dyn Partial>),
}

impl Source {
    fn size(&self) -> u64 {
        match self {
            Self::Whole(reader) => reader.size(),
            Self::Part(partial) => partial.chain().cut().size(),
        }
    }

    /// Exactly so many bytes.
    async fn read(&mut self, offset: u64, length: usize) -> Result<Bytes, StoreError> {
        let read = match self {
            Self::Whole(reader) => reader.read_at(offset, length).await?,
            Self::Part(partial) => partial.read_at(offset, length).await?,
        };
        if read.len() == length {
            return Ok(read);
        }
        Err(StoreError::Other(format!("read {} bytes at {offset} where {length} are left", read.len())))
    }
}

/// Which pieces of what are welcome.
pub(super) struct Welcome {
    pub(super) digest: Digest,
    pub(super) choice: Vec<u32>,
    pub(super) most: u8,
}

impl Welcome {
    /// What no honest agent asks, whatever it believes of the blob.
    fn check(&self) -> Result<(), ServeError> {
        let (choice, most) = (&self.choice, self.most);
        let distinct = choice.iter().collect::<HashSet<_>>().len();
        if choice.is_empty() || choice.len() > MAX_CHOICE || most == 0 || distinct < choice.len() {
            let asked = format!("{most} of {} pieces, {distinct} of them different", choice.len());
            return Err(ServeError::Malformed(asked));
        }
        Ok(())
    }
}

/// A stretch of a piece, as it is read and sent: the number goes before the first one.
#[derive(Clone, Copy)]
struct Stretch {
    piece: Option<u32>,
    offset: u64,
    length: usize,
}

/// All the stretches of these pieces, in order. An empty piece is one of no bytes.
fn stretches(cut: Cut, pieces: &[u32]) -> impl Iterator<Item = Stretch> {
    pieces.iter().flat_map(move |piece| {
        let (from, length) = (cut.offset(*piece as usize), cut.length(*piece as usize));
        (0..length.max(1)).step_by(READ).map(move |at| Stretch {
            piece: Some(*piece).filter(|_| at == 0),
            offset: from + at,
            length: usize::try_from(length - at).unwrap_or(READ).min(READ),
        })
    })
}

impl Shared {
    /// Answers at once, and sends when it is this stream's turn; what is chosen then is what is best then.
    pub(super) async fn send_pieces(
        &self,
        peer: PeerId,
        welcome: Welcome,
        stream: &mut Stream,
    ) -> Result<(), ServeError> {
        welcome.check()?;
        let digest = welcome.digest;
        let source = match self.source(digest).await {
            Ok(source) => source,
            Err(StoreError::Absent(_)) => return self.answer_only(stream, &Answer::Absent).await,
            Err(error) => return self.admit_failure(stream, error).await,
        };
        let size = source.size();
        let cut = Cut::usual(size);
        if welcome.choice.iter().any(|piece| *piece as usize >= cut.pieces()) {
            return self.answer_only(stream, &Answer::Invalid { size }).await;
        }
        let Ok(mut upload) = self.uploads.queue(peer, digest, cut.pieces()) else {
            return self.answer_only(stream, &Answer::Busy).await;
        };
        let granted = match source {
            Source::Whole(_) => Answer::Blob { size },
            Source::Part(_) => Answer::Partial { size },
        };
        // It may have its slot already.
        let answered = timeout(MOVES, self.answer(stream, &granted)).await;
        answered.map_err(|_| ServeError::TooSlow)??;
        let turn = async {
            upload.turn().await?;
            // A small blob waits for nobody, as in `Shared::send`.
            Ok::<_, NoPlace>(if size > CHUNK { Some(self.up.place().await) } else { None })
        };
        let _place = tokio::select! {
            biased;
            place = turn => place?,
            _ = stream.send.stopped() => return Err(ServeError::Left("before its turn came".into())),
        };
        let pieces = self.choose(&welcome, &source);
        self.pour(source, stretches(cut, &pieces), &mut upload, &mut stream.send).await?;
        // What the connection has is on its way; for a moment more that is being sent.
        upload.moving(self.finish(stream)).await?
    }

    /// Where the blob can be read. One that is being fetched may be in the store in the next moment, so that is asked last.
    async fn source(&self, digest: Digest) -> Result<Source, StoreError> {
        match self.partials.partial(digest) {
            Some(partial) => Ok(Source::Part(partial)),
            None => self.asked_of_the_store(self.store.open(digest)).await.map(Source::Whole),
        }
    }

    fn choose(&self, Welcome { digest, choice, most }: &Welcome, source: &Source) -> Vec<u32> {
        match source {
            Source::Whole(_) => self.uploads.choose(*digest, choice, *most, |_| true),
            Source::Part(partial) => {
                let held = partial.held();
                self.uploads.choose(*digest, choice, *most, |piece| held.get(piece as usize))
            }
        }
    }

    /// The stretches, one read ahead of the writing, so that disk and network work at the same time.
    async fn pour(
        &self,
        mut source: Source,
        mut stretches: impl Iterator<Item = Stretch>,
        upload: &mut Upload<'_>,
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        let Some(mut stretch) = stretches.next() else { return Ok(()) };
        let mut bytes = self.read(&mut source, stretch).await?;
        loop {
            let next = stretches.next();
            let ahead = async {
                match next {
                    Some(next) => self.read(&mut source, next).await.map(|bytes| Some((next, bytes))),
                    None => Ok(None),
                }
            };
            let (written, read) = join(self.write_stretch(stretch, bytes, upload, send), ahead).await;
            written?;
            match read? {
                Some(ahead) => (stretch, bytes) = ahead,
                None => return Ok(()),
            }
        }
    }

    async fn read(&self, source: &mut Source, Stretch { offset, length, .. }: Stretch) -> Result<Bytes, StoreError> {
        timeout(self.limits.reader, source.read(offset, length)).await.unwrap_or_else(|_| Err(slow_store()))
    }

    async fn write_stretch(
        &self,
        stretch: Stretch,
        mut bytes: Bytes,
        upload: &mut Upload<'_>,
        send: &mut SendStream,
    ) -> Result<(), ServeError> {
        let mut number = stretch.piece.map(|piece| Bytes::copy_from_slice(&piece.to_be_bytes())).unwrap_or_default();
        let mut patience = self.limits.reader;
        loop {
            let most = if self.up.is_limited() { CHUNK as usize } else { READ };
            let chunk = bytes.split_to(bytes.len().min(most));
            let length = chunk.len() as u64;
            self.up.pass(length).await;
            let began = Instant::now();
            let mut parts = [take(&mut number), chunk];
            let written = timeout(patience, upload.moving(send.write_all_chunks(&mut parts)));
            written.await.map_err(|_| ServeError::TooSlow)???;
            patience = patience.saturating_sub(began.elapsed());
            upload.turn().await?;
            upload.sent(length);
            self.metrics.served(length);
            if bytes.is_empty() {
                return Ok(());
            }
        }
    }
}
