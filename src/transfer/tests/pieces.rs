//! Pieces of whole and of partial blobs.

use super::*;
use crate::model::{Bits, PieceRequest};
use crate::oci::{HashChainBuilder, PieceHasher, PieceVerifier};
use crate::ports::{PartialBlob, PieceError, PieceSink};

/// The smallest usual piece, in bytes.
pub(super) const PIECE: usize = 256 << 10;

pub(super) fn hash_chain_of(blob: &Bytes) -> Arc<HashChain> {
    let mut builder = HashChainBuilder::new(PieceLayout::for_size(blob.len() as u64));
    builder.update(blob);
    Arc::new(builder.finish().unwrap())
}

/// A request for all of the first pieces, in order.
pub(super) fn first_pieces(peer: PeerId, blob: &Bytes, pieces: u32) -> PieceRequest {
    let (digest, layout) = (Digest::of(blob), PieceLayout::for_size(blob.len() as u64));
    PieceRequest { peer, digest, layout, pieces: (0..pieces).collect(), limit: pieces as u8 }
}

/// Collects pieces, and verifies each by a hash chain.
pub(super) struct CollectingSink {
    pub(super) verifier: PieceVerifier,
    hasher: Option<PieceHasher>,
    bytes: Vec<u8>,
    /// In the order of arrival.
    pub(super) received: Vec<(u32, Vec<u8>)>,
}

impl CollectingSink {
    pub(super) fn new(chain: Arc<HashChain>) -> Self {
        Self { verifier: PieceVerifier::new(chain), hasher: None, bytes: Vec::new(), received: Vec::new() }
    }

    pub(super) fn of(blob: &Bytes) -> Self {
        Self::new(hash_chain_of(blob))
    }

    pub(super) fn numbers(&self) -> Vec<u32> {
        self.received.iter().map(|(piece, _)| *piece).collect()
    }
}

#[async_trait]
impl PieceSink for CollectingSink {
    fn begin(&mut self, piece: u32) {
        assert!(self.hasher.is_none() && self.bytes.is_empty(), "the pieces come one after the other");
        self.hasher = Some(self.verifier.hash_chain().hasher(piece as usize));
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
        self.received.push((hasher.piece() as u32, std::mem::take(&mut self.bytes)));
        if self.verifier.record(hasher) { Ok(()) } else { Err(PieceError::Mismatch) }
    }
}

#[derive(Clone)]
pub(super) struct TestPartial {
    blob: Bytes,
    chain: Arc<HashChain>,
    piece_map: Arc<Mutex<Bits>>,
    changes: watch::Receiver<u64>,
}

#[async_trait]
impl PartialBlob for TestPartial {
    fn hash_chain(&self) -> Arc<HashChain> {
        self.chain.clone()
    }
    fn piece_map(&self) -> Bits {
        self.piece_map.lock().clone()
    }
    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.clone()
    }
    async fn read_at(&self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        let from = usize::try_from(offset).unwrap();
        Ok(self.blob.slice(from..self.blob.len().min(from + limit)))
    }
}

/// The download behind a [`TestPartial`]. Dropping the download ends the partial blob.
pub(super) struct PartialDownload {
    piece_map: Arc<Mutex<Bits>>,
    changes: watch::Sender<u64>,
    partial: Arc<Mutex<Option<TestPartial>>>,
}

/// The partial blob of a node, if the download goes on.
pub(super) struct SinglePartial(Arc<Mutex<Option<TestPartial>>>);

impl PartialBlobs for SinglePartial {
    fn partial(&self, digest: Digest) -> Option<Arc<dyn PartialBlob>> {
        let partial = self.0.lock().clone().filter(|partial| partial.chain.digest() == digest)?;
        Some(Arc::new(partial))
    }
}

impl PartialDownload {
    pub(super) fn of(blob: &Bytes) -> (Self, SinglePartial) {
        let (changes, changes_receiver) = watch::channel(0);
        let piece_map = Arc::new(Mutex::new(Bits::default()));
        let partial_blob = TestPartial {
            blob: blob.clone(),
            chain: hash_chain_of(blob),
            piece_map: piece_map.clone(),
            changes: changes_receiver,
        };
        let partial = Arc::new(Mutex::new(Some(partial_blob)));
        (Self { piece_map, changes, partial: partial.clone() }, SinglePartial(partial))
    }

    pub(super) fn add_pieces(&self, pieces: impl IntoIterator<Item = usize>) {
        pieces.into_iter().for_each(|piece| self.piece_map.lock().set(piece));
        self.changes.send_modify(|count| *count += 1);
    }
}

impl Drop for PartialDownload {
    fn drop(&mut self) {
        self.partial.lock().take();
    }
}

#[tokio::test]
async fn pieces_of_any_length_arrive_and_verify_the_blob() {
    let sizes = [
        (0, "one piece, and nothing in it"),
        (1, "one piece of one byte"),
        (PIECE, "one whole piece"),
        (PIECE + 1, "a last piece of one byte"),
        (5 * PIECE - 1, "a last piece that lacks a byte"),
        (20 * PIECE + 12_345, "more than a stream's window"),
    ];
    let blobs: Vec<Bytes> = sizes.iter().map(|(size, _)| blob(*size)).collect();
    let store = TestStore { blobs: blobs.iter().map(|b| (Digest::of(b), b.clone())).collect(), ..TestStore::default() };
    with_deadline(async {
        let (provider, fetcher) = (TransferTestNode::start(store), TransferTestNode::start(TestStore::default()));
        fetcher.dial(provider.address()).await;
        for ((size, why), blob) in sizes.iter().zip(&blobs) {
            let layout = PieceLayout::for_size(*size as u64);
            let chain = fetcher.hash_chain(provider.id, Digest::of(blob), layout).await.unwrap();
            let mut sink = CollectingSink::new(Arc::new(chain));
            fetcher
                .transfer
                .fetch_pieces(&first_pieces(provider.id, blob, layout.piece_count() as u32), &mut sink)
                .await
                .unwrap();
            let proof = sink.verifier.proof().expect(why);
            assert_eq!((proof.digest(), proof.size()), (Digest::of(blob), *size as u64), "{why}");
            sink.received.sort();
            let bytes: Vec<u8> = sink.received.into_iter().flat_map(|(_, bytes)| bytes).collect();
            assert!(bytes == *blob, "{why}");
        }
        let total: usize = sizes.iter().map(|(size, _)| size).sum();
        assert!(fetcher.metric(&format!("fetched_bytes_total {total}")));
        assert!(provider.metric(&format!("served_bytes_total {total}")));
    })
    .await;
}

#[tokio::test]
async fn a_seed_sends_the_pieces_that_it_has_sent_the_least() {
    let blob = blob(12 * PIECE);
    with_deadline(async {
        let provider = TransferTestNode::start(TestStore::with(&blob));
        let mut received = Vec::new();
        for _ in 0..3 {
            let fetcher = TransferTestNode::start(TestStore::default());
            fetcher.dial(provider.address()).await;
            let mut sink = CollectingSink::of(&blob);
            let request = PieceRequest { limit: 4, ..first_pieces(provider.id, &blob, 12) };
            fetcher.transfer.fetch_pieces(&request, &mut sink).await.unwrap();
            received.extend(sink.numbers());
        }
        assert_eq!(received, (0..12).collect::<Vec<_>>(), "three fetchers with the same request get a third each");
    })
    .await;
}

#[tokio::test]
async fn a_partial_provider_serves_the_pieces_that_it_has() {
    let blob = blob(8 * PIECE + 1);
    with_deadline(async {
        let (download, partials) = PartialDownload::of(&blob);
        let (provider, fetcher) = (
            TransferTestNode::start_partial(TestStore::default(), partials),
            TransferTestNode::start(TestStore::default()),
        );
        fetcher.dial(provider.address()).await;
        let mut sink = CollectingSink::of(&blob);
        fetcher.transfer.fetch_pieces(&first_pieces(provider.id, &blob, 9), &mut sink).await.unwrap();
        assert!(sink.received.is_empty(), "a provider without the pieces sends none, without an error");
        download.add_pieces([8, 3, 5]);
        let request = PieceRequest { pieces: vec![8, 1, 5, 3], limit: 2, ..first_pieces(provider.id, &blob, 9) };
        fetcher.transfer.fetch_pieces(&request, &mut sink).await.unwrap();
        assert_eq!(sink.numbers(), [8, 5], "the first requested pieces that are present");
        let chain = fetcher.hash_chain(provider.id, Digest::of(&blob), request.layout).await.unwrap();
        assert_eq!(chain, *hash_chain_of(&blob));
        drop(download);
        let error = fetcher.transfer.fetch_pieces(&request, &mut sink).await.unwrap_err();
        assert!(matches!(error, FetchError::Absent { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_dropped_fetch_stops_the_stream() {
    let blob = blob(8 * PIECE);
    with_deadline(async {
        let (progress, mut stopped) = mpsc::channel(1);
        let rogue = Rogue::start(move |_, mut send| {
            let progress = progress.clone();
            async move {
                answer_blob(&mut send, 8 * PIECE as u64).await;
                send.write_all(&[0, 0, 0, 0, 7]).await.unwrap();
                progress.send(false).await.unwrap();
                assert!(send.stopped().await.unwrap().is_some());
                progress.send(true).await.unwrap();
            }
        });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(rogue.address).await;
        let (request, mut sink) = (first_pieces(rogue.id, &blob, 8), CollectingSink::of(&blob));
        tokio::select! {
            _ = fetcher.transfer.fetch_pieces(&request, &mut sink) => panic!("most of the pieces never arrive"),
            began = stopped.recv() => assert_eq!(began, Some(false)),
        }
        assert_eq!(stopped.recv().await, Some(true));
    })
    .await;
}
