//! Answers to requests that came over another authenticated connection than QUIC. Content, places
//! and rates are those of QUIC.

use bytes::{Bytes, BytesMut};

use crate::decide::bucket::CHUNK;
use crate::decide::way::{MAX_BLOB, RANGE};
use crate::model::PeerId;
use crate::oci::{Cut, Digest};
use crate::ports::{BlobReader, StoreError};
use crate::transfer::chains::Listed;
use crate::transfer::{Shared, Transfer};
use crate::wire::{Answer, Request};

impl Transfer {
    /// Answers a request of an admitted peer, with at most [`RANGE`] bytes of a blob of at most
    /// [`MAX_BLOB`] bytes. The caller has admitted the peer and bounds the number of requests.
    pub async fn answer_range(&self, peer: PeerId, request: Request) -> (Answer, Bytes) {
        let served = match request {
            Request::Have(digest) => self.0.size_for(digest).await.map(|answer| (answer, Bytes::new())),
            Request::Get { digest, offset, length } => self.0.read_range(digest, offset, length).await,
            Request::Chain(digest) => self.0.read_chain(digest).await,
            Request::Pieces { .. } | Request::Follow(_) => Ok((Answer::Absent, Bytes::new())),
        };
        served.unwrap_or_else(|error| match error {
            StoreError::Absent(_) => (Answer::Absent, Bytes::new()),
            error => {
                tracing::warn!(%peer, %error, "a range was not served");
                (Answer::Failed, Bytes::new())
            }
        })
    }

    /// Counts bytes of a blob that came another way, and waits until the download rate lets as many
    /// pass.
    pub async fn took(&self, bytes: u64) {
        self.0.down.pass(bytes).await;
        self.0.metrics.fetched(bytes);
    }

    /// Whether a connection to this peer is open.
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.0.peers.find(peer).is_some_and(|(_, outbound)| outbound.line().is_some())
    }
}

impl Shared {
    async fn size_for(&self, digest: Digest) -> Result<Answer, StoreError> {
        let blob = self.asked_of_the_store(self.store.blob(digest)).await?;
        Ok(blob.map_or(Answer::Absent, |blob| Answer::Blob { size: blob.size }))
    }

    async fn read_range(&self, digest: Digest, offset: u64, length: u64) -> Result<(Answer, Bytes), StoreError> {
        let serving = self.serving.try_acquire().ok();
        let place = if length > CHUNK { self.up.try_place().map(Some) } else { Some(None) };
        let (Some(_serving), Some(_place)) = (serving, place) else { return Ok((Answer::Busy, Bytes::new())) };
        let mut reader = self.asked_of_the_store(self.store.open(digest)).await?;
        let size = reader.size();
        let is_inside = offset.checked_add(length).is_some_and(|end| end <= size);
        if !is_inside || length > RANGE || size > MAX_BLOB {
            return Ok((Answer::Invalid { size }, Bytes::new()));
        }
        let bytes = self.asked_of_the_store(read_exactly(&mut *reader, offset, length)).await?;
        self.up.pass(length).await;
        self.metrics.served(length);
        Ok((Answer::Blob { size }, bytes))
    }

    /// All states of the chain; made now where the blob was never hashed here.
    async fn read_chain(&self, digest: Digest) -> Result<(Answer, Bytes), StoreError> {
        let size = match self.size_for(digest).await? {
            Answer::Blob { size } if size <= MAX_BLOB => size,
            Answer::Blob { size } => return Ok((Answer::Invalid { size }, Bytes::new())),
            absent => return Ok((absent, Bytes::new())),
        };
        let states = match self.chains.of(digest, Cut::usual(size)) {
            None => return Ok((Answer::Busy, Bytes::new())),
            Some(Listed::Known(chain)) => chain.states().to_vec(),
            Some(Listed::Making(making)) => {
                let mut states = Vec::new();
                loop {
                    let more = self.chains.more(&making, states.len(), &*self.store).await?;
                    states.extend(more.states);
                    if more.is_end {
                        break states;
                    }
                }
            }
        };
        let bytes = states.into_iter().flat_map(|state| state.to_bytes()).collect();
        Ok((Answer::Blob { size }, bytes))
    }
}

/// A read may bring less than it was asked for.
async fn read_exactly(reader: &mut dyn BlobReader, offset: u64, length: u64) -> Result<Bytes, StoreError> {
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    let mut bytes = reader.read_at(offset, length).await?;
    if bytes.len() < length {
        let mut whole = BytesMut::from(&bytes[..]);
        while whole.len() < length && !bytes.is_empty() {
            bytes = reader.read_at(offset + whole.len() as u64, length - whole.len()).await?;
            whole.extend_from_slice(&bytes);
        }
        bytes = whole.freeze();
    }
    match bytes.len() == length {
        true => Ok(bytes),
        false => Err(StoreError::Other(format!("read {} bytes at {offset} where {length} are left", bytes.len()))),
    }
}
