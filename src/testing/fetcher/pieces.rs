//! Pieces from peers in memory: of what they hold, and of what they are fetching themselves.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::watch;

use super::{Behaviour, MemoryFetcher};
use crate::model::{Availability, Order, PeerId};
use crate::oci::{Chain, ChainBuilder, Cut, Digest, State, VerifyError};
use crate::ports::{
    BlobReader, ContentStore, FetchError, Following, Heard, Partial, PieceError, PieceFetcher, PieceSink, StoreError,
};

/// Bytes that come at a time.
const CHUNK: usize = 1 << 16;

/// Where a peer has the bytes.
enum Held {
    Whole(Box<dyn BlobReader>),
    Partly(Arc<dyn Partial>),
}

impl Held {
    async fn read_at(&mut self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        match self {
            Self::Whole(reader) => reader.read_at(offset, most).await,
            Self::Partly(partial) => partial.read_at(offset, most).await,
        }
    }

    fn has(&self, piece: u32) -> bool {
        match self {
            Self::Whole(_) => true,
            Self::Partly(partial) => partial.held().get(piece as usize),
        }
    }
}

impl MemoryFetcher {
    /// The blob at a peer that behaves so; one that hangs does so here.
    async fn open(&self, peer: PeerId, digest: Digest, cut: Cut) -> Result<(Held, Behaviour), FetchError> {
        let (store, behaviour) = self.peer(peer)?;
        if behaviour == Behaviour::Hangs {
            std::future::pending::<()>().await;
        }
        let store: Arc<dyn ContentStore> = store;
        let reader = match store.open(digest).await {
            Ok(reader) => reader,
            Err(StoreError::Absent(_)) => {
                let partial = self.partial(peer, digest).ok_or(FetchError::Absent { peer, digest })?;
                return Ok((Held::Partly(partial), behaviour));
            }
            Err(_) => return Err(FetchError::StoreFailed { peer }),
        };
        let actual_size = reader.size();
        if actual_size != cut.size() {
            let source = VerifyError::Size { expected: digest, expected_size: cut.size(), actual_size };
            return Err(FetchError::Corrupt { peer, source });
        }
        Ok((Held::Whole(reader), behaviour))
    }
}

/// What comes instead of right bytes, of a piece or for the list.
fn sent(is_wrong: bool, bytes: Bytes) -> Bytes {
    if is_wrong { bytes.iter().map(|byte| !byte).collect() } else { bytes }
}

fn is_wrong(behaviour: Behaviour, cut: Cut, piece: u32) -> bool {
    match behaviour {
        Behaviour::Lies => true,
        Behaviour::SpoilsPiece(spoilt) => piece == spoilt,
        Behaviour::Rotten => cut.pieces() > 1,
        _ => false,
    }
}

/// How long one waits that drips its list, before each state.
const DRIP: Duration = Duration::from_secs(10);

/// As long as 36 GB take to be hashed.
const SLOW_LIST: Duration = Duration::from_secs(20);

/// States that a slow list begins with.
const BEGINNING: usize = 2;

#[async_trait]
impl PieceFetcher for MemoryFetcher {
    /// The list of one that lies about everything is of what it sends.
    async fn chain(&self, peer: PeerId, digest: Digest, cut: Cut, heard: Heard<'_>) -> Result<Chain, FetchError> {
        self.lists_asked.fetch_add(1, Ordering::Relaxed);
        let (held, behaviour) = self.open(peer, digest, cut).await?;
        let mut reader = match held {
            Held::Whole(reader) => reader,
            Held::Partly(partial) => {
                let chain = partial.chain();
                heard(chain.states());
                return Ok((*chain).clone());
            }
        };
        let mut builder = ChainBuilder::new(cut);
        let mut at = 0;
        while at < cut.size() {
            let bytes = reader.read_at(at, CHUNK).await?;
            at += bytes.len() as u64;
            builder.update(&sent(behaviour == Behaviour::Lies, bytes));
        }
        if behaviour == Behaviour::Rotten && cut.pieces() > 1 {
            return Err(FetchError::StoreFailed { peer });
        }
        let mut states = builder.states().to_vec();
        if let Behaviour::ForgesList(piece) = behaviour
            && let Some(state) = states.get_mut(piece as usize)
        {
            *state = State::INITIAL;
        }
        let (first, rest) = states.split_at(states.len().min(BEGINNING));
        heard(first);
        if behaviour == Behaviour::ListsSlowly {
            tokio::time::sleep(SLOW_LIST).await;
        }
        for state in rest {
            if behaviour == Behaviour::DripsList {
                tokio::time::sleep(DRIP).await;
            }
            heard(std::slice::from_ref(state));
        }
        Chain::claimed(digest, cut, states).map_err(|error| FetchError::Protocol { peer, reason: error.to_string() })
    }

    async fn follow(&self, peer: PeerId, digest: Digest, cut: Cut) -> Result<Box<dyn Following>, FetchError> {
        Ok(match self.open(peer, digest, cut).await?.0 {
            Held::Whole(_) => Box::new(Whole(false)),
            Held::Partly(partial) => {
                Box::new(Partly { peer, digest, changes: partial.changes(), partial, told: false })
            }
        })
    }

    async fn pieces(&self, order: &Order, sink: &mut dyn PieceSink) -> Result<(), FetchError> {
        let Order { peer, digest, cut, .. } = *order;
        self.note_asked(peer);
        let (mut held, behaviour) = self.open(peer, digest, cut).await?;
        let choice: Vec<_> = order.choice.iter().copied().filter(|piece| held.has(*piece)).collect();
        for piece in choice.into_iter().take(order.most.into()) {
            if !self.may_send(peer) {
                std::future::pending::<()>().await;
            }
            let is_wrong = is_wrong(behaviour, cut, piece);
            self.spoilt.fetch_add(usize::from(is_wrong), Ordering::Relaxed);
            sink.begin(piece);
            let (mut at, end) = (cut.offset(piece as usize), cut.offset(piece as usize) + cut.length(piece as usize));
            while at < end {
                let most = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
                let bytes = held.read_at(at, most).await?;
                at += bytes.len() as u64;
                sink.append(&[sent(is_wrong, bytes)]).await?;
                // As on a network, others have their turn.
                tokio::task::yield_now().await;
            }
            sink.end().await.map_err(|error| unfit(error, peer, digest, piece))?;
            self.note_served(peer, digest);
        }
        Ok(())
    }

    fn keep(&self, _: Arc<Chain>) {}
}

fn unfit(error: PieceError, peer: PeerId, digest: Digest, piece: u32) -> FetchError {
    match error {
        PieceError::Unfit => FetchError::Unfit { peer, digest, piece: piece as usize },
        PieceError::Store(error) => FetchError::Sink(error),
    }
}

/// A peer that has the whole blob: it says so, and then nothing more.
struct Whole(bool);

#[async_trait]
impl Following for Whole {
    async fn next(&mut self) -> Result<Availability, FetchError> {
        if std::mem::replace(&mut self.0, true) {
            std::future::pending::<()>().await;
        }
        Ok(Availability::Whole)
    }
}

/// A peer that is fetching the blob itself.
struct Partly {
    peer: PeerId,
    digest: Digest,
    partial: Arc<dyn Partial>,
    changes: watch::Receiver<u64>,
    told: bool,
}

#[async_trait]
impl Following for Partly {
    async fn next(&mut self) -> Result<Availability, FetchError> {
        let gone = |_| FetchError::Absent { peer: self.peer, digest: self.digest };
        if std::mem::replace(&mut self.told, true) {
            self.changes.changed().await.map_err(gone)?;
        }
        Ok(Availability::These(self.partial.held()))
    }
}
