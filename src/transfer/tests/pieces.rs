//! Pieces: what arrives of whole blobs and of those that are being fetched.

use super::*;
use crate::model::{Bits, Order};
use crate::oci::{ChainBuilder, PieceHasher, Proving};
use crate::ports::{Partial, PieceError, PieceSink};

/// The smallest usual piece.
pub(super) const PIECE: usize = 256 << 10;

pub(super) fn chain_of(blob: &Bytes) -> Arc<Chain> {
    let mut builder = ChainBuilder::new(Cut::usual(blob.len() as u64));
    builder.update(blob);
    Arc::new(builder.finish().unwrap())
}

/// The first so many pieces, in order, all of them wanted.
pub(super) fn order_of(peer: PeerId, blob: &Bytes, pieces: u32) -> Order {
    let (digest, cut) = (Digest::of(blob), Cut::usual(blob.len() as u64));
    Order { peer, digest, cut, choice: (0..pieces).collect(), most: pieces as u8 }
}

/// Takes pieces that fit the list.
pub(super) struct Collecting {
    pub(super) proving: Proving,
    hasher: Option<PieceHasher>,
    bytes: Vec<u8>,
    /// In the order in which they came.
    pub(super) came: Vec<(u32, Vec<u8>)>,
}

impl Collecting {
    pub(super) fn new(chain: Arc<Chain>) -> Self {
        Self { proving: Proving::new(chain), hasher: None, bytes: Vec::new(), came: Vec::new() }
    }

    pub(super) fn of(blob: &Bytes) -> Self {
        Self::new(chain_of(blob))
    }

    pub(super) fn numbers(&self) -> Vec<u32> {
        self.came.iter().map(|(piece, _)| *piece).collect()
    }
}

#[async_trait]
impl PieceSink for Collecting {
    fn begin(&mut self, piece: u32) {
        assert!(self.hasher.is_none() && self.bytes.is_empty(), "one after the other");
        self.hasher = Some(self.proving.chain().hasher(piece as usize));
    }

    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        for chunk in chunks {
            self.hasher.as_mut().expect("a piece has begun").update(chunk);
            self.bytes.extend_from_slice(chunk);
        }
        Ok(())
    }

    async fn end(&mut self) -> Result<(), PieceError> {
        let hasher = self.hasher.take().expect("a piece has begun");
        self.came.push((hasher.piece() as u32, std::mem::take(&mut self.bytes)));
        if self.proving.take(hasher) { Ok(()) } else { Err(PieceError::Unfit) }
    }
}

/// A blob that is being fetched.
#[derive(Clone)]
pub(super) struct Growing {
    blob: Bytes,
    chain: Arc<Chain>,
    held: Arc<Mutex<Bits>>,
    changes: watch::Receiver<u64>,
}

#[async_trait]
impl Partial for Growing {
    fn chain(&self) -> Arc<Chain> {
        self.chain.clone()
    }
    fn held(&self) -> Bits {
        self.held.lock().unwrap().clone()
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
    async fn read_at(&self, offset: u64, most: usize) -> Result<Bytes, StoreError> {
        let from = usize::try_from(offset).unwrap();
        Ok(self.blob.slice(from..self.blob.len().min(from + most)))
    }
}

/// Who fetches it. Dropped, it is not fetched any more.
pub(super) struct Growth {
    held: Arc<Mutex<Bits>>,
    changes: watch::Sender<u64>,
    partial: Arc<Mutex<Option<Growing>>>,
}

/// The one blob that is being fetched here.
pub(super) struct Only(Arc<Mutex<Option<Growing>>>);

impl Partials for Only {
    fn partial(&self, digest: Digest) -> Option<Arc<dyn Partial>> {
        let partial = self.0.lock().unwrap().clone().filter(|partial| partial.chain.digest() == digest)?;
        Some(Arc::new(partial))
    }
}

impl Growth {
    pub(super) fn of(blob: &Bytes) -> (Self, Only) {
        let (changes, seen) = watch::channel(0);
        let held = Arc::new(Mutex::new(Bits::default()));
        let growing = Growing { blob: blob.clone(), chain: chain_of(blob), held: held.clone(), changes: seen };
        let partial = Arc::new(Mutex::new(Some(growing)));
        (Self { held, changes, partial: partial.clone() }, Only(partial))
    }

    pub(super) fn came(&self, pieces: impl IntoIterator<Item = usize>) {
        pieces.into_iter().for_each(|piece| self.held.lock().unwrap().set(piece));
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Drop for Growth {
    fn drop(&mut self) {
        self.partial.lock().unwrap().take();
    }
}

#[tokio::test]
async fn pieces_of_any_length_arrive_and_prove_the_blob() {
    let sizes = [
        (0, "one piece, and nothing in it"),
        (1, "one piece of one byte"),
        (PIECE, "one whole piece"),
        (PIECE + 1, "a last piece of one byte"),
        (5 * PIECE - 1, "a last piece that lacks a byte"),
        (20 * PIECE + 12_345, "more than a stream's window"),
    ];
    let blobs: Vec<Bytes> = sizes.iter().map(|(size, _)| blob(*size)).collect();
    let shelf = Shelf { blobs: blobs.iter().map(|b| (Digest::of(b), b.clone())).collect(), ..Shelf::default() };
    within(async {
        let (holder, fetcher) = (Node::start(shelf), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        for ((size, why), blob) in sizes.iter().zip(&blobs) {
            let cut = Cut::usual(*size as u64);
            let chain = fetcher.list(holder.id, Digest::of(blob), cut).await.unwrap();
            let mut sink = Collecting::new(Arc::new(chain));
            fetcher.transfer.pieces(&order_of(holder.id, blob, cut.pieces() as u32), &mut sink).await.unwrap();
            let proof = sink.proving.verified().expect(why);
            assert_eq!((proof.digest(), proof.size()), (Digest::of(blob), *size as u64), "{why}");
            sink.came.sort();
            let bytes: Vec<u8> = sink.came.into_iter().flat_map(|(_, bytes)| bytes).collect();
            assert!(bytes == *blob, "{why}");
        }
        let total: usize = sizes.iter().map(|(size, _)| size).sum();
        assert!(fetcher.metric(&format!("fetched_bytes_total {total}")));
        assert!(holder.metric(&format!("served_bytes_total {total}")));
    })
    .await;
}

#[tokio::test]
async fn a_holder_of_all_sends_what_it_has_sent_the_least() {
    let blob = blob(12 * PIECE);
    within(async {
        let holder = Node::start(Shelf::with(&blob));
        let mut came = Vec::new();
        for _ in 0..3 {
            let fetcher = Node::start(Shelf::default());
            fetcher.meet(holder.address()).await;
            let mut sink = Collecting::of(&blob);
            let order = Order { most: 4, ..order_of(holder.id, &blob, 12) };
            fetcher.transfer.pieces(&order, &mut sink).await.unwrap();
            came.extend(sink.numbers());
        }
        assert_eq!(came, (0..12).collect::<Vec<_>>(), "three who ask for the same get a third each");
    })
    .await;
}

#[tokio::test]
async fn a_blob_that_is_being_fetched_is_served_as_far_as_it_is_there() {
    let blob = blob(8 * PIECE + 1);
    within(async {
        let (growth, only) = Growth::of(&blob);
        let (holder, fetcher) = (Node::start_sharing(Shelf::default(), only), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        let mut sink = Collecting::of(&blob);
        fetcher.transfer.pieces(&order_of(holder.id, &blob, 9), &mut sink).await.unwrap();
        assert!(sink.came.is_empty(), "which is no failure");
        growth.came([8, 3, 5]);
        let order = Order { choice: vec![8, 1, 5, 3], most: 2, ..order_of(holder.id, &blob, 9) };
        fetcher.transfer.pieces(&order, &mut sink).await.unwrap();
        assert_eq!(sink.numbers(), [8, 5], "those that are welcome most");
        let list = fetcher.list(holder.id, Digest::of(&blob), order.cut).await.unwrap();
        assert_eq!(list, *chain_of(&blob));
        drop(growth);
        let error = fetcher.transfer.pieces(&order, &mut sink).await.unwrap_err();
        assert!(matches!(error, FetchError::Absent { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_fetch_that_is_dropped_stops_the_stream() {
    let blob = blob(8 * PIECE);
    within(async {
        let (told, mut stopped) = mpsc::channel(1);
        let rogue = Rogue::start(move |_, mut send| {
            let told = told.clone();
            async move {
                promise(&mut send, 8 * PIECE as u64).await;
                send.write_all(&[0, 0, 0, 0, 7]).await.unwrap();
                told.send(false).await.unwrap();
                assert!(send.stopped().await.unwrap().is_some());
                told.send(true).await.unwrap();
            }
        });
        let fetcher = Node::start(Shelf::default());
        fetcher.meet(rogue.address).await;
        let (order, mut sink) = (order_of(rogue.id, &blob, 8), Collecting::of(&blob));
        tokio::select! {
            _ = fetcher.transfer.pieces(&order, &mut sink) => panic!("most of it does not come"),
            began = stopped.recv() => assert_eq!(began, Some(false)),
        }
        assert_eq!(stopped.recv().await, Some(true));
    })
    .await;
}
