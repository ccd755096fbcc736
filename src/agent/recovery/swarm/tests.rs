//! Two senders of the same piece, and a hash chain that is replaced while pieces arrive.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use proptest::collection::vec;
use proptest::prelude::*;
use tokio::sync::{Notify, Semaphore};

use super::SwarmShared;
use super::download_sink::DownloadSink;
use crate::agent::recovery::downloads::Downloads;
use crate::agent::recovery::downloads::blob_download::{BlobDownload, ReceivedPiece, StoredPiece};
use crate::decide::piece_picker::PiecePicker;
use crate::model::PeerId;
use crate::oci::{Descriptor, Digest, HashChain, HashChainBuilder, HashState, MIN_PIECE_SIZE, PieceLayout};
use crate::ports::{Blobs, PartialBlobs, PieceError, PieceSink, Pins};
use crate::testing::MemoryStore;

const PIECE: usize = MIN_PIECE_SIZE as usize;

fn peer(number: u8) -> PeerId {
    PeerId::from_public_key([number; 32])
}

/// Three pieces that differ.
fn blob() -> Vec<u8> {
    (0..3 * PIECE).map(|position| (position / PIECE * 7 + position % 251) as u8).collect()
}

fn chain_of(bytes: &[u8]) -> HashChain {
    let mut builder = HashChainBuilder::new(PieceLayout::for_size(bytes.len() as u64));
    builder.update(bytes);
    builder.finish().unwrap()
}

async fn start_download(bytes: &[u8]) -> Arc<BlobDownload> {
    let store = MemoryStore::new();
    let pin = store.pin(Duration::from_secs(60)).await.unwrap();
    let (digest, size) = (Digest::of(bytes), bytes.len() as u64);
    let staged = store.stage(digest, size, &pin).await.unwrap();
    let blob = Descriptor { media_type: String::new(), digest, size, platform: None, attestation: false };
    Arc::new(BlobDownload::new(blob, staged))
}

fn sink(download: &Arc<BlobDownload>, number: u8) -> DownloadSink {
    let shared = Arc::new(SwarmShared {
        picker: Mutex::new(PiecePicker::new(None, 1)),
        piece_received: Notify::new(),
        buffer_permits: Arc::new(Semaphore::new(1)),
    });
    DownloadSink::new(shared, Arc::clone(download), number.into(), peer(number))
}

#[tokio::test]
async fn a_valid_piece_is_not_overwritten_by_a_slower_sender_of_the_same_piece() {
    let blob = blob();
    let download = start_download(&blob).await;
    download.set_hash_chain(Arc::new(chain_of(&blob)), peer(9));
    let half = Bytes::from(vec![0; PIECE / 2]);
    let (mut liar, mut honest) = (sink(&download, 1), sink(&download, 2));
    liar.begin(1);
    liar.append(std::slice::from_ref(&half)).await.unwrap();
    honest.begin(1);
    honest.append(&[Bytes::copy_from_slice(&blob[PIECE..2 * PIECE])]).await.unwrap();
    honest.end().await.unwrap();
    liar.append(&[half]).await.unwrap();
    liar.end().await.unwrap();
    let read = download.staged().read_at(PIECE as u64, PIECE).await.unwrap();
    assert!(read == blob[PIECE..2 * PIECE]);
    assert_eq!(download.bytes_by_peer().into_keys().collect::<Vec<_>>(), [peer(2)]);
}

#[tokio::test]
async fn a_received_piece_is_not_overwritten_by_a_later_sender() {
    let blob = blob();
    let right = Bytes::copy_from_slice(&blob[PIECE..2 * PIECE]);
    for has_chain in [true, false] {
        let download = start_download(&blob).await;
        if has_chain {
            download.set_hash_chain(Arc::new(chain_of(&blob)), peer(9));
        }
        let (mut honest, mut late) = (sink(&download, 1), sink(&download, 2));
        honest.begin(1);
        honest.append(std::slice::from_ref(&right)).await.unwrap();
        honest.end().await.unwrap();
        late.begin(1);
        late.append(&[Bytes::from(vec![0; PIECE])]).await.unwrap();
        late.end().await.unwrap();
        let read = download.staged().read_at(PIECE as u64, PIECE).await.unwrap();
        assert!(read == right, "a late sender writes nothing (with a hash chain: {has_chain})");
        assert_eq!(download.bytes_by_peer().into_keys().collect::<Vec<_>>(), [peer(1)]);
    }
}

/// Peers that follow a download rely on this contract of [`PartialBlobs::partial`].
#[tokio::test]
async fn a_partial_provider_has_a_view_of_its_own_that_ends_with_the_download() {
    let blob = blob();
    let download = start_download(&blob).await;
    let (downloads, digest) = (Downloads::default(), download.blob().digest);
    downloads.insert(&download);
    assert!(downloads.partial(digest).is_none(), "a download without a hash chain serves nothing");
    download.set_hash_chain(Arc::new(chain_of(&blob)), peer(9));
    let mut changes = downloads.partial(digest).unwrap().changes();
    let mut sink = sink(&download, 1);
    sink.begin(1);
    sink.append(&[Bytes::copy_from_slice(&blob[PIECE..2 * PIECE])]).await.unwrap();
    sink.end().await.unwrap();
    changes.changed().await.unwrap();
    assert_eq!(downloads.partial(digest).unwrap().piece_map().ones().collect::<Vec<_>>(), [1]);
    downloads.remove(&download);
    assert!(downloads.partial(digest).is_none() && changes.changed().await.is_err());
}

#[tokio::test]
async fn a_lying_second_sender_writes_nothing() {
    let blob = blob();
    let download = start_download(&blob).await;
    download.set_hash_chain(Arc::new(chain_of(&blob)), peer(9));
    let (mut first, mut liar) = (sink(&download, 1), sink(&download, 2));
    first.begin(0);
    liar.begin(0);
    liar.append(&[Bytes::from(vec![1; PIECE])]).await.unwrap();
    assert!(matches!(liar.end().await, Err(PieceError::Mismatch)));
    assert!(download.staged().read_at(0, PIECE).await.unwrap().iter().all(|byte| *byte == 0));
    first.append(&[Bytes::copy_from_slice(&blob[..PIECE])]).await.unwrap();
    first.end().await.unwrap();
    assert!(download.is_verified(0));
}

/// The next action of one of several senders.
#[derive(Debug, Clone, Copy)]
enum SenderAction {
    /// The sender begins a piece if none has begun, sends half of the piece, or ends the piece.
    Sends(usize, u32),
    /// The sender disconnects.
    Disconnects(usize),
    /// The hash chain arrives.
    ChainArrives,
}

fn action() -> impl Strategy<Value = SenderAction> {
    prop_oneof![
        12 => (0..4_usize, 0..3_u32).prop_map(|(sender, piece)| SenderAction::Sends(sender, piece)),
        1 => (0..4_usize).prop_map(SenderAction::Disconnects),
        1 => Just(SenderAction::ChainArrives),
    ]
}

/// Two honest senders and two lying senders, with the piece and the bytes that each has sent.
struct Senders {
    blob: Vec<u8>,
    incoming: Arc<BlobDownload>,
    all: Vec<(DownloadSink, Option<(u32, usize)>)>,
}

impl Senders {
    async fn apply(&mut self, step: SenderAction) {
        match step {
            SenderAction::ChainArrives if self.incoming.hash_chain().is_none() => {
                self.incoming.set_hash_chain(Arc::new(chain_of(&self.blob)), peer(9))
            }
            SenderAction::ChainArrives => {}
            SenderAction::Disconnects(sender) => self.all[sender] = (sink(&self.incoming, sender as u8), None),
            SenderAction::Sends(sender, next) => {
                let is_honest = sender < 2;
                let (sink, at) = &mut self.all[sender];
                match *at {
                    None => {
                        sink.begin(next);
                        *at = Some((next, 0));
                    }
                    Some((_, PIECE)) => {
                        let ended = sink.end().await;
                        assert!(ended.is_ok() || !is_honest, "{ended:?}");
                        *at = None;
                    }
                    Some((piece, sent)) => {
                        let from = piece as usize * PIECE + sent;
                        let mut half = self.blob[from..from + PIECE / 2].to_vec();
                        half.iter_mut().for_each(|byte| *byte ^= if is_honest { 0 } else { 0xff });
                        sink.append(&[half.into()]).await.unwrap();
                        *at = Some((piece, sent + PIECE / 2));
                    }
                }
            }
        }
    }

    async fn check(&self) {
        for piece in (0..3).filter(|piece| self.incoming.is_verified(*piece)) {
            let from = piece as usize * PIECE;
            let stored = self.incoming.staged().read_at(from as u64, PIECE).await.unwrap();
            assert!(stored == self.blob[from..from + PIECE], "the verified piece {piece} keeps its bytes");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_valid_piece_stays_unchanged_whatever_the_senders_send(steps in vec(action(), 1..60)) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let blob = blob();
            let incoming = start_download(&blob).await;
            let all = (0..4).map(|sender| (sink(&incoming, sender), None)).collect();
            let mut senders = Senders { blob, incoming, all };
            for step in steps {
                senders.apply(step).await;
                senders.check().await;
            }
        });
    }
}

#[tokio::test]
async fn a_piece_that_was_hashed_by_a_replaced_chain_is_verified_by_the_new_chain() {
    let blob = blob();
    let download = start_download(&blob).await;
    let right = chain_of(&blob);
    let mut states = right.states().to_vec();
    states[0] = HashState::INITIAL;
    let forged = HashChain::unverified(right.digest(), right.layout(), states).unwrap();
    download.set_hash_chain(Arc::new(forged), peer(9));
    let mut hasher = download.hasher(1).unwrap();
    let mut sender = sink(&download, 1);
    sender.begin(1);
    sender.append(&[Bytes::copy_from_slice(&blob[PIECE..2 * PIECE])]).await.unwrap();
    download.set_hash_chain(Arc::new(right), peer(8));
    sender.end().await.unwrap();
    assert_eq!(download.unverified(), [1], "the piece waits for the new hash chain");
    assert_eq!(download.verify_stored(1).await.unwrap(), StoredPiece::Valid(Some(peer(1))));
    hasher.update(&blob[PIECE..2 * PIECE]);
    assert_eq!(download.record_received(1, Some(hasher), peer(3)), ReceivedPiece::Unverified);
}
