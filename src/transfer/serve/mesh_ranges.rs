//! Answers requests that came over another authenticated connection than QUIC. Content, permits and
//! rates are the same as over QUIC.

use bytes::{Bytes, BytesMut};

use crate::decide::byte_bucket::CHUNK;
use crate::decide::transport_choice::{MAX_BLOB, RANGE};
use crate::model::PeerId;
use crate::oci::{Digest, PieceLayout};
use crate::ports::{BlobReader, StoreError};
use crate::transfer::hash_chain_cache::HashChainLookup;
use crate::transfer::{Shared, Transfer};
use crate::wire::{Answer, Request};

impl Transfer {
    /// Answers a request of an admitted peer, with at most [`RANGE`] bytes of a blob of at most
    /// [`MAX_BLOB`] bytes. The caller has admitted the peer and bounds the number of requests.
    pub async fn answer_range(&self, peer: PeerId, request: Request) -> (Answer, Bytes) {
        let served = match request {
            Request::Have(digest) => self.0.blob_answer(digest).await.map(|answer| (answer, Bytes::new())),
            Request::Get { digest, offset, length } => self.0.read_range(digest, offset, length).await,
            Request::HashChain(digest) => self.0.read_hash_chain(digest).await,
            Request::Pieces { .. } | Request::Follow(_) => Ok((Answer::Absent, Bytes::new())),
        };
        served.unwrap_or_else(|error| match error {
            StoreError::Absent(_) => (Answer::Absent, Bytes::new()),
            error => {
                tracing::warn!(%peer, %error, "mesh request not served");
                (Answer::Failed, Bytes::new())
            }
        })
    }

    /// Counts bytes of a blob that arrived over the mesh, and waits until the download rate lets as
    /// many pass.
    pub async fn account_received(&self, bytes: u64) {
        self.0.download_limiter.acquire_bytes(bytes).await;
        self.0.metrics.fetched(bytes);
    }

    /// Whether a connection to this peer is open.
    pub fn is_connected(&self, peer: PeerId) -> bool {
        self.0.peers.find(peer).is_some_and(|(_, outbound)| outbound.has_connection())
    }
}

impl Shared {
    async fn blob_answer(&self, digest: Digest) -> Result<Answer, StoreError> {
        let blob = self.with_store_timeout(self.store.blob(digest)).await?;
        Ok(blob.map_or(Answer::Absent, |blob| Answer::Blob { size: blob.size }))
    }

    async fn read_range(&self, digest: Digest, offset: u64, length: u64) -> Result<(Answer, Bytes), StoreError> {
        let serve_permit = self.serve_permits.try_acquire().ok();
        let permit = if length > CHUNK { self.upload_limiter.try_acquire_permit().map(Some) } else { Some(None) };
        let (Some(_serve_permit), Some(_permit)) = (serve_permit, permit) else {
            return Ok((Answer::Busy, Bytes::new()));
        };
        let mut reader = self.with_store_timeout(self.store.open(digest)).await?;
        let size = reader.size();
        let is_inside = offset.checked_add(length).is_some_and(|end| end <= size);
        if !is_inside || length > RANGE || size > MAX_BLOB {
            return Ok((Answer::Invalid { size }, Bytes::new()));
        }
        let bytes = self.with_store_timeout(read_exactly(&mut *reader, offset, length)).await?;
        self.upload_limiter.acquire_bytes(length).await;
        self.metrics.served(length);
        Ok((Answer::Blob { size }, bytes))
    }

    /// All states of the chain. The chain of a blob that was never hashed here is computed now.
    async fn read_hash_chain(&self, digest: Digest) -> Result<(Answer, Bytes), StoreError> {
        let size = match self.blob_answer(digest).await? {
            Answer::Blob { size } if size <= MAX_BLOB => size,
            Answer::Blob { size } => return Ok((Answer::Invalid { size }, Bytes::new())),
            absent => return Ok((absent, Bytes::new())),
        };
        let states = match self.hash_chains.get_or_start(digest, PieceLayout::for_size(size)) {
            None => return Ok((Answer::Busy, Bytes::new())),
            Some(HashChainLookup::Cached(chain)) => chain.states().to_vec(),
            Some(HashChainLookup::Pending(pending)) => {
                let mut states = Vec::new();
                loop {
                    let batch = self.hash_chains.next_states(&pending, states.len(), &*self.store).await?;
                    states.extend(batch.states);
                    if batch.is_end {
                        break states;
                    }
                }
            }
        };
        let bytes = states.into_iter().flat_map(|state| state.to_bytes()).collect();
        Ok((Answer::Blob { size }, bytes))
    }
}

/// Reads in a loop: one read may return fewer bytes than requested.
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
