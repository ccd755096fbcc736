//! Fetching: ask, then hash and hand on what comes, until it is proved or given up.
//!
//! Here: whole blobs, and how anything is asked. Beneath: pieces, lists of states, and what a peer tells of its pieces.

mod following;
mod list;
mod pieces;
mod ranges;
mod wanted;

use std::net::SocketAddr;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use quinn::RecvStream;
use tokio::sync::SemaphorePermit;
use tokio::time::{Instant, sleep, timeout};

use self::wanted::Wanted;
use super::peers::{Line, Outbound};
use super::throttle::Place;
use super::tuning::{BATCH, BATCH_CHUNKS, FLOOR};
use super::{GreetError, Shared, Transfer};
use crate::decide::bucket::CHUNK;
use crate::model::{Order, PeerId};
use crate::oci::{Chain, Cut, Digest, Hasher, Verified};
use crate::ports::{BlobSink, FetchError, Fetcher, Following, Heard, PieceFetcher, PieceSink};
use crate::wire::{self, Answer, Request};

#[async_trait]
impl Fetcher for Transfer {
    async fn fetch(
        &self,
        peer: PeerId,
        digest: Digest,
        size: u64,
        sink: &mut dyn BlobSink,
    ) -> Result<Verified, FetchError> {
        let fetched = self.0.fetch(Wanted { peer, digest, size }, sink).await;
        fetched.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    async fn size_of(&self, peer: PeerId, digest: Digest) -> Result<Option<u64>, FetchError> {
        match self.0.ask(peer, digest, &Request::Have(digest)).await {
            Ok((Answer::Blob { size }, ..)) => Ok(Some(size)),
            Ok((Answer::Absent, ..)) | Err(FetchError::Absent { .. }) => Ok(None),
            Ok((Answer::Failed, ..)) => Err(FetchError::StoreFailed { peer }),
            Ok((other, ..)) => Err(FetchError::Protocol { peer, reason: format!("answers {other:?} to Have") }),
            Err(error) => Err(error),
        }
    }
}

#[async_trait]
impl PieceFetcher for Transfer {
    async fn chain(&self, peer: PeerId, digest: Digest, cut: Cut, heard: Heard<'_>) -> Result<Chain, FetchError> {
        let wanted = Wanted { peer, digest, size: cut.size() };
        let listed = match self.0.list(wanted, cut, heard).await {
            Err(FetchError::OtherMajor { .. }) => self.0.list_by_ranges(wanted, cut, heard).await,
            listed => listed,
        };
        listed.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    async fn follow(&self, peer: PeerId, digest: Digest, cut: Cut) -> Result<Box<dyn Following>, FetchError> {
        let wanted = Wanted { peer, digest, size: cut.size() };
        let followed = match self.0.follow(wanted, cut).await {
            Err(FetchError::OtherMajor { .. }) => self.0.follow_by_have(wanted, cut).await,
            followed => followed,
        };
        followed.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    async fn pieces(&self, order: &Order, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let fetched = match self.0.fetch_pieces(order, sink).await {
            Err(FetchError::OtherMajor { .. }) => self.0.fetch_ranges(order, sink).await,
            fetched => fetched,
        };
        fetched.inspect_err(|error| self.0.metrics.fetch_failed(error.label()))
    }

    fn keep(&self, chain: Arc<Chain>) {
        self.knows_chain(chain);
    }
}

impl Shared {
    async fn fetch(&self, wanted: Wanted, sink: &mut dyn BlobSink) -> Result<Verified, FetchError> {
        let Wanted { peer, digest, size } = wanted;
        let request = Request::Get { digest, offset: 0, length: size };
        let outbound = self.crowded(peer, size);
        let _places = self.places(outbound.as_deref()).await;
        // The line is held so that the connection counts as used.
        let (answer, mut recv, _line) = self.ask(peer, digest, &request).await?;
        match answer {
            Answer::Blob { size: actual } if actual == size => self.take(wanted, &mut recv, sink).await,
            Answer::Blob { size: actual } => Err(wanted.of_another_size(actual)),
            Answer::Absent => Err(FetchError::Absent { peer, digest }),
            Answer::Partial { .. } => {
                Err(FetchError::Protocol { peer, reason: format!("answers Get of {digest} with a part") })
            }
            Answer::Busy => Err(FetchError::Busy { peer }),
            // Somebody's word about the size was wrong, and it may have been the manifest's.
            Answer::Invalid { size: actual } if actual < size => Err(wanted.of_another_size(actual)),
            Answer::Invalid { size: actual } => {
                let reason = format!("says that {size} bytes of {digest} are more than {actual}");
                Err(FetchError::Protocol { peer, reason })
            }
            Answer::Failed => Err(FetchError::StoreFailed { peer }),
        }
    }

    /// The peer, where what is fetched of it has to wait for other things. A blob of one chunk arrives whole whoever else is under way, and manifests are
    /// not to wait for layers.
    fn crowded(&self, peer: PeerId, size: u64) -> Option<Arc<Outbound>> {
        self.peers.find(peer).filter(|_| size > CHUNK).map(|(_, outbound)| outbound)
    }

    /// A place among what comes from this peer, and one among all that comes.
    async fn places<'a>(&'a self, peer: Option<&'a Outbound>) -> Option<(Option<SemaphorePermit<'a>>, Place<'a>)> {
        match peer {
            // It is never closed.
            Some(outbound) => Some((outbound.blobs.acquire().await.ok(), self.down.place().await)),
            None => None,
        }
    }

    /// Takes the bytes in batches, hashing each chunk as it comes: nothing is copied, and no other thread is asked to
    /// hash.
    async fn take(
        &self,
        wanted: Wanted,
        recv: &mut RecvStream,
        sink: &mut dyn BlobSink,
    ) -> Result<Verified, FetchError> {
        let mut hasher = Hasher::default();
        let mut batch = vec![Bytes::new(); BATCH_CHUNKS];
        let (mut chunks, mut held) = (0, 0);
        let stall = self.limits.stall;
        let mut patience = std::pin::pin!(sleep(stall));
        let mut since_moved = 0;
        loop {
            let read = tokio::select! {
                biased;
                read = recv.read_chunks(&mut batch[chunks..]) => read.map_err(|error| wanted.cut_off(&error))?,
                () = &mut patience => return Err(wanted.stalled(stall.as_secs())),
            };
            let Some(read) = read else { break };
            let arrived = &batch[chunks..chunks + read];
            let bytes: usize = arrived.iter().map(Bytes::len).sum();
            let total = hasher.size() + bytes as u64;
            if total > wanted.size {
                return Err(wanted.of_another_size(total));
            }
            if self.down.is_limited() {
                // Not read on meanwhile, so the windows fill and slow the sender. Our own wait is not its fault.
                let began = Instant::now();
                self.down.pass(bytes as u64).await;
                let deadline = patience.deadline() + began.elapsed();
                patience.as_mut().reset(deadline);
            }
            arrived.iter().for_each(|chunk| hasher.update(chunk));
            chunks += read;
            held += bytes;
            since_moved += bytes as u64;
            let full = held >= BATCH || chunks == BATCH_CHUNKS;
            if full {
                self.hand_on(&mut batch[..chunks], held, sink).await?;
                (chunks, held) = (0, 0);
            }
            // The sink's time is not the sender's.
            if full || since_moved >= FLOOR {
                patience.as_mut().reset(Instant::now() + stall);
                since_moved = 0;
            }
        }
        if chunks > 0 {
            self.hand_on(&mut batch[..chunks], held, sink).await?;
        }
        hasher.verify(wanted.digest, wanted.size).map_err(|source| FetchError::Corrupt { peer: wanted.peer, source })
    }

    async fn hand_on(&self, batch: &mut [Bytes], bytes: usize, sink: &mut dyn BlobSink) -> Result<(), FetchError> {
        sink.append(batch).await?;
        batch.fill(Bytes::new());
        self.metrics.fetched(bytes as u64);
        Ok(())
    }

    /// Sends a request and reads its answer. A pooled connection may have died unnoticed, as when its other end was
    /// restarted: then a new one is tried, once.
    async fn ask(
        &self,
        peer: PeerId,
        digest: Digest,
        request: &Request,
    ) -> Result<(Answer, RecvStream, Line), FetchError> {
        if let Some(line) = self.peers.find(peer).and_then(|(_, outbound)| outbound.line()) {
            match self.ask_on(&line, peer, digest, request).await {
                Err(FetchError::Unreachable { .. }) if line.close_reason().is_some() => {}
                done => return done.map(|(answer, recv)| (answer, recv, line)),
            }
        }
        // Looked up again: the peer may have been forgotten, which closes its connections.
        let Some((address, outbound)) = self.peers.find(peer) else {
            return Err(FetchError::Unreachable { peer, silent: false, reason: "its address is not known".into() });
        };
        let dialled = self.connect(peer, address, &outbound).await;
        let line = dialled.map_err(|error| not_met(peer, error))?;
        let (answer, recv) = self.ask_on(&line, peer, digest, request).await?;
        Ok((answer, recv, line))
    }

    /// The one connection to a peer: whoever comes while it is being dialled waits for the outcome and shares it.
    async fn connect(&self, peer: PeerId, address: SocketAddr, outbound: &Outbound) -> Result<Line, GreetError> {
        let seen = outbound.failures();
        let _dialling = outbound.dialling.lock().await;
        if let Some(line) = outbound.line() {
            return Ok(line);
        }
        if let Some(error) = outbound.failed_since(seen) {
            return Err(error);
        }
        match self.dial(address, Some(peer)).await {
            Ok((_, connection, standing)) => {
                self.peers.stands(peer, standing);
                Ok(outbound.keep(connection))
            }
            Err(error) => {
                outbound.fail(error.clone());
                Err(error)
            }
        }
    }

    async fn ask_on(
        &self,
        line: &Line,
        peer: PeerId,
        digest: Digest,
        request: &Request,
    ) -> Result<(Answer, RecvStream), FetchError> {
        let wanted = Wanted { peer, digest, size: 0 };
        let format = self.format_on(line);
        if format.is_previous() && request.needs_equal_majors() {
            return Err(FetchError::OtherMajor { peer });
        }
        let asked = async {
            let (mut send, mut recv) = line.open_bi().await.map_err(|error| wanted.lost(&error))?;
            wire::write_in(&mut send, request, format).await.map_err(|error| wanted.no_answer(line, error))?;
            // It was just opened, so it can be finished.
            let _ = send.finish();
            let answer = wire::read_in::<Answer>(&mut recv, self.versions).await;
            let answer = answer.map_err(|error| wanted.no_answer(line, error))?;
            Ok((answer, recv))
        };
        let answered = timeout(self.limits.answer, asked).await;
        answered.unwrap_or_else(|_| Err(wanted.stalled(self.limits.answer.as_secs())))
    }
}

fn not_met(peer: PeerId, error: GreetError) -> FetchError {
    match error {
        GreetError::Unreachable { address, silent, reason } => {
            FetchError::Unreachable { peer, silent, reason: format!("{address}: {reason}") }
        }
        GreetError::Refused { address, reason, .. } => {
            FetchError::NotAdmitted { peer, reason: format!("it says at {address}: {reason}") }
        }
        GreetError::NotAdmitted { address, refusal, .. } => {
            FetchError::NotAdmitted { peer, reason: format!("this agent says of {address}: {refusal}") }
        }
        GreetError::Protocol { reason, .. } => FetchError::Protocol { peer, reason },
        error @ (GreetError::NoCredential(_) | GreetError::OtherVersion { .. }) => {
            FetchError::NotAdmitted { peer, reason: error.to_string() }
        }
        error @ (GreetError::Myself(_) | GreetError::SharedKey { .. } | GreetError::AnotherKey { .. }) => {
            FetchError::Unreachable { peer, silent: false, reason: error.to_string() }
        }
    }
}
