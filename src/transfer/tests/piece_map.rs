//! Following the piece map of a peer.

use super::content::handshake;
use super::pieces::{PIECE, PartialDownload};
use super::*;
use crate::model::{Bits, MAX_HAVE_PIECES, PieceMapUpdate};
use crate::oci::PieceLayout;
use crate::ports::Fetcher;
use crate::transfer::tuning::MAX_FOLLOWED;

fn bits(pieces: impl IntoIterator<Item = usize>) -> Bits {
    let mut bits = Bits::default();
    pieces.into_iter().for_each(|piece| bits.set(piece));
    bits
}

#[tokio::test]
async fn a_follower_receives_the_piece_map_and_then_the_added_pieces() {
    let blob = blob(9 * PIECE);
    let (digest, layout) = (Digest::of(&blob), PieceLayout::for_size(blob.len() as u64));
    with_deadline(async {
        let (download, partials) = PartialDownload::of(&blob);
        download.add_pieces([1, 8]);
        let (provider, fetcher) = (
            TransferTestNode::start_partial(TestStore::default(), partials),
            TransferTestNode::start(TestStore::default()),
        );
        fetcher.dial(provider.address()).await;
        let mut updates = fetcher.transfer.follow(provider.id, digest, layout).await.unwrap();
        assert_eq!(updates.next().await.unwrap(), PieceMapUpdate::Map(bits([1, 8])));
        download.add_pieces([0, 5]);
        download.add_pieces([2]);
        let mut added = Vec::new();
        while added.len() < 3 {
            match updates.next().await.unwrap() {
                PieceMapUpdate::Have(pieces) => added.extend(pieces),
                other => panic!("{other:?}"),
            }
        }
        added.sort_unstable();
        assert_eq!(added, [0, 2, 5]);
        drop(download);
        let error = updates.next().await.unwrap_err();
        assert!(matches!(error, FetchError::Absent { peer, .. } if peer == provider.id), "{error}");
        let error = fetcher.transfer.follow(provider.id, digest, layout).await.map(drop).unwrap_err();
        assert!(matches!(error, FetchError::Absent { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_partial_blob_that_was_committed_is_announced_as_whole() {
    let blob = blob(2 * PIECE);
    let (digest, layout) = (Digest::of(&blob), PieceLayout::for_size(blob.len() as u64));
    with_deadline(async {
        let (download, partials) = PartialDownload::of(&blob);
        let (provider, fetcher) = (
            TransferTestNode::start_partial(TestStore::with(&blob), partials),
            TransferTestNode::start(TestStore::default()),
        );
        fetcher.dial(provider.address()).await;
        let mut updates = fetcher.transfer.follow(provider.id, digest, layout).await.unwrap();
        assert_eq!(updates.next().await.unwrap(), PieceMapUpdate::Map(Bits::default()));
        drop(download);
        assert_eq!(updates.next().await.unwrap(), PieceMapUpdate::HaveAll);
        let mut again = fetcher.transfer.follow(provider.id, digest, layout).await.unwrap();
        assert_eq!(again.next().await.unwrap(), PieceMapUpdate::HaveAll);
        provider.stop.cancel();
        let error = again.next().await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_stopping_agent_does_not_wait_for_followers() {
    let blob = blob(2 * PIECE);
    let (digest, layout) = (Digest::of(&blob), PieceLayout::for_size(blob.len() as u64));
    with_deadline(async {
        let (_download, partials) = PartialDownload::of(&blob);
        let (provider, fetcher) = (
            TransferTestNode::start_partial(TestStore::default(), partials),
            TransferTestNode::start(TestStore::default()),
        );
        fetcher.dial(provider.address()).await;
        let mut updates = fetcher.transfer.follow(provider.id, digest, layout).await.unwrap();
        updates.next().await.unwrap();
        provider.stop.cancel();
        let error = updates.next().await.unwrap_err();
        assert!(matches!(error, FetchError::Absent { .. }), "the stream ended before the connection: {error}");
    })
    .await;
}

#[tokio::test]
async fn an_impossible_piece_map_breaks_the_protocol() {
    let too_many = (0..=MAX_HAVE_PIECES as u32).map(|piece| piece % 9).collect();
    let first_map = PieceMapUpdate::Map(bits([1]));
    let cases = [
        ("a piece beyond the end", vec![PieceMapUpdate::Map(bits([9]))]),
        ("more bits than pieces", vec![PieceMapUpdate::Map(Bits(vec![0; 3]))]),
        ("added pieces before the map", vec![PieceMapUpdate::Have(vec![1])]),
        ("an added piece beyond the end", vec![first_map.clone(), PieceMapUpdate::Have(vec![9])]),
        ("too many added pieces", vec![first_map.clone(), PieceMapUpdate::Have(too_many)]),
        ("no added pieces", vec![first_map.clone(), PieceMapUpdate::Have(Vec::new())]),
        ("the map twice", vec![first_map.clone(), first_map.clone()]),
        ("an end without an update", vec![first_map]),
    ];
    for (what, updates) in cases {
        with_deadline(async {
            let valid_updates = updates.len() - 1 + usize::from(what == "an end without an update");
            let rogue = Rogue::start(move |_, mut send| {
                let updates = updates.clone();
                async move {
                    wire::write(&mut send, &Answer::Partial { size: 9 * PIECE as u64 }).await.unwrap();
                    for update in updates {
                        wire::write(&mut send, &update).await.unwrap();
                    }
                }
            });
            let fetcher = TransferTestNode::start(TestStore::default());
            fetcher.dial(rogue.address).await;
            let layout = PieceLayout::for_size(9 * PIECE as u64);
            let mut received = fetcher.transfer.follow(rogue.id, Digest::of(b"any"), layout).await.unwrap();
            for _ in 0..valid_updates {
                received.next().await.unwrap();
            }
            let error = received.next().await.unwrap_err();
            assert!(matches!(error, FetchError::Protocol { peer, .. } if peer == rogue.id), "{what}: {error}");
        })
        .await;
    }
}

#[tokio::test]
async fn an_update_that_was_read_in_part_survives_a_cancelled_wait() {
    let update = wire::encode(&PieceMapUpdate::Map(bits([1, 3]))).unwrap();
    with_deadline(async {
        let (go, went) = watch::channel(false);
        let rogue = Rogue::start(move |_, mut send| {
            let (update, mut went) = (update.clone(), went.clone());
            async move {
                wire::write(&mut send, &Answer::Partial { size: 9 * PIECE as u64 }).await.unwrap();
                send.write_all(&update[..7]).await.unwrap();
                went.wait_for(|went| *went).await.unwrap();
                send.write_all(&update[7..]).await.unwrap();
                let _ = send.stopped().await;
            }
        });
        let fetcher = TransferTestNode::start(TestStore::default());
        fetcher.dial(rogue.address).await;
        let layout = PieceLayout::for_size(9 * PIECE as u64);
        let mut updates = fetcher.transfer.follow(rogue.id, Digest::of(b"any"), layout).await.unwrap();
        assert!(tokio::time::timeout(BRIEF, updates.next()).await.is_err());
        go.send(true).unwrap();
        assert_eq!(updates.next().await.unwrap(), PieceMapUpdate::Map(bits([1, 3])));
    })
    .await;
}

#[tokio::test]
async fn followed_blobs_are_bounded_for_each_connection() {
    let blob = blob(2 * PIECE);
    with_deadline(async {
        let (_download, partials) = PartialDownload::of(&blob);
        let provider = TransferTestNode::start_partial(TestStore::default(), partials);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = handshake(&endpoint, provider.address()).await;
        let mut streams = Vec::new();
        for number in 0..=MAX_FOLLOWED {
            let (mut send, mut recv) = connection.open_bi().await.unwrap();
            wire::write(&mut send, &Request::Follow(Digest::of(&blob))).await.unwrap();
            send.finish().unwrap();
            let answer: Answer = wire::read(&mut recv).await.unwrap();
            let expected =
                if number < MAX_FOLLOWED { Answer::Partial { size: blob.len() as u64 } } else { Answer::Busy };
            assert_eq!(answer, expected, "{number}");
            streams.push(recv);
        }
    })
    .await;
}
