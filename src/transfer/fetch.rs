//! Fetches blobs: sends a request, then hashes the bytes and passes them on, until the blob is
//! verified or the fetch is aborted.
//!
//! Here: whole blobs, and the requests. Beneath: pieces, hash chains and piece maps.

mod blob_request;
mod hash_chain;
mod other_major;
mod piece_map;
mod pieces;

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use quinn::RecvStream;
use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, sleep, timeout};

use self::blob_request::BlobRequest;
use super::peers::{Outbound, SharedConnection};
use super::rate_limiter::TransferPermit;
use super::tuning::{BATCH, BATCH_CHUNKS, MIN_BYTES_PER_STALL};
use super::{Shared, Transfer};
use crate::decide::byte_bucket::CHUNK;
use crate::model::{PeerId, PieceRequest};
use crate::oci::{BlobProof, Digest, HashChain, Hasher, PieceLayout};
use crate::ports::{BlobSink, DialError, FetchError, Fetcher, PieceMapUpdates, PieceSink, StateSink};
use crate::wire::{self, Answer, Request};

#[async_trait]
impl Fetcher for Transfer {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError> {
        let fetched = self.0.fetch(BlobRequest { peer, digest, size }, sink).await;
        fetched.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        match self.0.request(peer, digest, &Request::Have(digest)).await {
            Ok((Answer::Blob { size }, ..)) => Ok(Some(size)),
            Ok((Answer::Absent, ..)) | Err(FetchError::Absent { .. }) => Ok(None),
            Ok((Answer::Failed, ..)) => Err(FetchError::StoreFailed { peer }),
            Ok((other, ..)) => Err(FetchError::Protocol { peer, reason: format!("answers {other:?} to Have") }),
            Err(error) => Err(error),
        }
    }

    async fn fetch_hash_chain(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
        on_states: StateSink<'_>,
    ) -> Result<HashChain, FetchError> {
        let wanted = BlobRequest { peer, digest, size: layout.size() };
        let fetched = match self.0.fetch_hash_chain(wanted, layout, on_states).await {
            Err(FetchError::OtherMajor { .. }) => self.0.hash_chain_by_get(wanted, layout, on_states).await,
            fetched => fetched,
        };
        fetched.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    async fn follow(
        &self,
        peer: PeerId,
        digest: Digest,
        layout: PieceLayout,
    ) -> Result<Box<dyn PieceMapUpdates>, FetchError> {
        let wanted = BlobRequest { peer, digest, size: layout.size() };
        let followed = match self.0.follow(wanted, layout).await {
            Err(FetchError::OtherMajor { .. }) => self.0.follow_by_have(wanted, layout).await,
            followed => followed,
        };
        followed.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    async fn fetch_pieces(&self, request: &PieceRequest, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let fetched = match self.0.fetch_pieces(request, sink).await {
            Err(FetchError::OtherMajor { .. }) => self.0.fetch_pieces_by_get(request, sink).await,
            fetched => fetched,
        };
        fetched.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    fn keep_hash_chain(&self, chain: Arc<HashChain>) {
        self.add_hash_chain(chain);
    }
}

impl Shared {
    async fn fetch(&self, wanted: BlobRequest, sink: &mut dyn BlobSink) -> Result<BlobProof, FetchError> {
        let BlobRequest { peer, digest, size } = wanted;
        let request = Request::Get { digest, offset: 0, length: size };
        let outbound = self.outbound_if_limited(peer, size);
        let _permits = self.acquire_fetch_permits(outbound.as_deref()).await;
        // Held so that the connection counts as used.
        let (answer, mut recv, _connection) = self.request(peer, digest, &request).await?;
        match answer {
            Answer::Blob { size: actual } if actual == size => self.receive_blob(wanted, &mut recv, sink).await,
            Answer::Blob { size: actual } => Err(wanted.size_mismatch(actual)),
            Answer::Absent => Err(FetchError::Absent { peer, digest }),
            Answer::Partial { .. } => {
                Err(FetchError::Protocol { peer, reason: format!("answers Get of {digest} with a partial blob") })
            }
            Answer::Busy => Err(FetchError::Busy { peer }),
            // The size here or the peer's size is wrong, and the wrong size may be the manifest's.
            Answer::Invalid { size: actual } if actual < size => Err(wanted.size_mismatch(actual)),
            Answer::Invalid { size: actual } => {
                let reason = format!("denies {size} bytes of {digest}, which has {actual}");
                Err(FetchError::Protocol { peer, reason })
            }
            Answer::Failed => Err(FetchError::StoreFailed { peer }),
        }
    }

    /// The peer, when the fetch has to wait for permits. A blob of one chunk needs none: it arrives
    /// whole beside any other transfer, and manifests must not wait for layers.
    fn outbound_if_limited(&self, peer: PeerId, size: u64) -> Option<Arc<Outbound>> {
        self.peers.find(peer).filter(|_| size > CHUNK).map(|(_, outbound)| outbound)
    }

    /// A permit for fetches from this peer, and one for all downloads.
    async fn acquire_fetch_permits<'a>(
        &'a self,
        peer: Option<&'a Outbound>,
    ) -> Option<(Option<SemaphorePermit<'a>>, TransferPermit<'a>)> {
        match peer {
            // The semaphore is never closed.
            Some(outbound) => {
                Some((outbound.fetch_permits.acquire().await.ok(), self.download_limiter.acquire_permit().await))
            }
            None => None,
        }
    }

    /// Reads the bytes in batches and hashes each chunk on arrival: nothing is copied, and no other
    /// thread is involved.
    async fn receive_blob(
        &self,
        wanted: BlobRequest,
        recv: &mut RecvStream,
        sink: &mut dyn BlobSink,
    ) -> Result<BlobProof, FetchError> {
        let mut hasher = Hasher::default();
        let mut batch = vec![Bytes::new(); BATCH_CHUNKS];
        let (mut chunks, mut batch_bytes) = (0, 0);
        let stall = self.timeouts.stall;
        let mut stall_timer = std::pin::pin!(sleep(stall));
        let mut bytes_since_reset = 0;
        loop {
            let read = tokio::select! {
                biased;
                read = recv.read_chunks(&mut batch[chunks..]) => read.map_err(|error| wanted.read_failed(&error))?,
                () = &mut stall_timer => return Err(wanted.stalled(stall.as_secs())),
            };
            let Some(read) = read else { break };
            let arrived = &batch[chunks..chunks + read];
            let bytes: usize = arrived.iter().map(Bytes::len).sum();
            let total = hasher.size() + bytes as u64;
            if total > wanted.size {
                return Err(wanted.size_mismatch(total));
            }
            if self.download_limiter.is_limited() {
                // Nothing is read during the wait, so the windows fill and slow the sender. Our own
                // wait does not count against the sender.
                let began = Instant::now();
                self.download_limiter.acquire_bytes(bytes as u64).await;
                let deadline = stall_timer.deadline() + began.elapsed();
                stall_timer.as_mut().reset(deadline);
            }
            arrived.iter().for_each(|chunk| hasher.update(chunk));
            chunks += read;
            batch_bytes += bytes;
            bytes_since_reset += bytes as u64;
            let full = batch_bytes >= BATCH || chunks == BATCH_CHUNKS;
            if full {
                self.append_batch(&mut batch[..chunks], batch_bytes, sink).await?;
                (chunks, batch_bytes) = (0, 0);
            }
            // The time of the sink does not count against the sender.
            if full || bytes_since_reset >= MIN_BYTES_PER_STALL {
                stall_timer.as_mut().reset(Instant::now() + stall);
                bytes_since_reset = 0;
            }
        }
        if chunks > 0 {
            self.append_batch(&mut batch[..chunks], batch_bytes, sink).await?;
        }
        hasher.verify(wanted.digest, wanted.size).map_err(|source| FetchError::Corrupt { peer: wanted.peer, source })
    }

    async fn append_batch(&self, batch: &mut [Bytes], bytes: usize, sink: &mut dyn BlobSink) -> Result<(), FetchError> {
        sink.append(batch).await?;
        batch.fill(Bytes::new());
        self.metrics.fetched(bytes as u64);
        Ok(())
    }

    /// Sends a request and reads the answer. A pooled connection may be dead without notice, as
    /// after a restart of the peer: then one new connection is tried.
    async fn request(
        &self,
        peer: PeerId,
        digest: Digest,
        request: &Request,
    ) -> Result<(Answer, RecvStream, SharedConnection), FetchError> {
        if let Some(connection) = self.peers.find(peer).and_then(|(_, outbound)| outbound.connection()) {
            match self.request_on(&connection, peer, digest, request).await {
                Err(FetchError::Unreachable { .. }) if connection.close_reason().is_some() => {}
                done => return done.map(|(answer, recv)| (answer, recv, connection)),
            }
        }
        // Read again: the peer may have been removed, which closes its connections.
        let Some((address, outbound)) = self.peers.find(peer) else {
            return Err(FetchError::Unreachable {
                peer,
                silent: false,
                reason: "no address of the peer is recorded".into(),
            });
        };
        let dialed = self.connect(peer, address, &outbound).await;
        let connection = dialed.map_err(|error| fetch_error_of(peer, error))?;
        let (answer, recv) = self.request_on(&connection, peer, digest, request).await?;
        Ok((answer, recv, connection))
    }

    /// The shared connection to a peer. A caller that comes during a dial waits and shares the
    /// outcome.
    async fn connect(
        &self,
        peer: PeerId,
        address: SocketAddr,
        outbound: &Outbound,
    ) -> Result<SharedConnection, DialError> {
        let failures_before = outbound.failures();
        let _dialing = outbound.dial_lock.lock().await;
        if let Some(connection) = outbound.connection() {
            return Ok(connection);
        }
        if let Some(error) = outbound.failed_since(failures_before) {
            return Err(error);
        }
        match self.dial(address, Some(peer)).await {
            Ok((_, connection, admission)) => {
                self.peers.record_admission(peer, admission);
                Ok(outbound.insert(connection))
            }
            Err(error) => {
                outbound.record_failure(error.clone());
                Err(error)
            }
        }
    }

    async fn request_on(
        &self,
        connection: &SharedConnection,
        peer: PeerId,
        digest: Digest,
        request: &Request,
    ) -> Result<(Answer, RecvStream), FetchError> {
        let wanted = BlobRequest { peer, digest, size: 0 };
        let format = self.format_on(connection);
        if format.is_previous() && request.needs_equal_majors() {
            return Err(FetchError::OtherMajor { peer });
        }
        let exchange = async {
            let (mut send, mut recv) = connection.open_bi().await.map_err(|error| wanted.connection_lost(&error))?;
            wire::write_in(&mut send, request, format)
                .await
                .map_err(|error| wanted.answer_failed(connection, error))?;
            // A stream that was just opened can be finished.
            let _ = send.finish();
            let answer = wire::read_in::<Answer>(&mut recv, self.versions).await;
            let answer = answer.map_err(|error| wanted.answer_failed(connection, error))?;
            Ok((answer, recv))
        };
        let answered = timeout(self.timeouts.answer, exchange).await;
        answered.unwrap_or_else(|_| Err(wanted.stalled(self.timeouts.answer.as_secs())))
    }
}

fn fetch_error_of(peer: PeerId, error: DialError) -> FetchError {
    match error {
        DialError::Unreachable { address, silent, reason } => {
            FetchError::Unreachable { peer, silent, reason: format!("{address}: {reason}") }
        }
        DialError::Rejected { address, reason, .. } => {
            FetchError::NotAdmitted { peer, reason: format!("the peer at {address} rejects this agent: {reason}") }
        }
        DialError::NotAdmitted { address, refusal: rejection, .. } => {
            FetchError::NotAdmitted { peer, reason: format!("this agent rejects the peer at {address}: {rejection}") }
        }
        DialError::Protocol { reason, .. } => FetchError::Protocol { peer, reason },
        error @ (DialError::NoCredential(_) | DialError::OtherVersion { .. }) => {
            FetchError::NotAdmitted { peer, reason: error.to_string() }
        }
        error @ (DialError::OwnAddress(_) | DialError::SharedKey { .. } | DialError::AnotherKey { .. }) => {
            FetchError::Unreachable { peer, silent: false, reason: error.to_string() }
        }
    }
}
