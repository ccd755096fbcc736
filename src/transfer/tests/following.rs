//! Following what a peer has of a blob.

use super::content::introduce;
use super::pieces::{Growth, PIECE};
use super::*;
use crate::model::{Availability, Bits, MAX_NEWS};
use crate::oci::Cut;
use crate::ports::PieceFetcher;
use crate::transfer::tuning::MAX_FOLLOWED;

fn bits(pieces: impl IntoIterator<Item = usize>) -> Bits {
    let mut bits = Bits::default();
    pieces.into_iter().for_each(|piece| bits.set(piece));
    bits
}

#[tokio::test]
async fn whoever_follows_hears_what_there_is_and_then_what_comes() {
    let blob = blob(9 * PIECE);
    let (digest, cut) = (Digest::of(&blob), Cut::usual(blob.len() as u64));
    within(async {
        let (growth, only) = Growth::of(&blob);
        growth.came([1, 8]);
        let (holder, fetcher) = (Node::start_sharing(Shelf::default(), only), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        let mut following = fetcher.transfer.follow(holder.id, digest, cut).await.unwrap();
        assert_eq!(following.next().await.unwrap(), Availability::These(bits([1, 8])));
        growth.came([0, 5]);
        growth.came([2]);
        let mut heard = Vec::new();
        while heard.len() < 3 {
            match following.next().await.unwrap() {
                Availability::Also(news) => heard.extend(news),
                other => panic!("{other:?}"),
            }
        }
        heard.sort_unstable();
        assert_eq!(heard, [0, 2, 5]);
        drop(growth);
        let error = following.next().await.unwrap_err();
        assert!(matches!(error, FetchError::Absent { peer, .. } if peer == holder.id), "{error}");
        let error = fetcher.transfer.follow(holder.id, digest, cut).await.map(drop).unwrap_err();
        assert!(matches!(error, FetchError::Absent { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn a_blob_that_is_in_the_store_in_the_end_is_said_to_be_whole() {
    let blob = blob(2 * PIECE);
    let (digest, cut) = (Digest::of(&blob), Cut::usual(blob.len() as u64));
    within(async {
        let (growth, only) = Growth::of(&blob);
        let (holder, fetcher) = (Node::start_sharing(Shelf::with(&blob), only), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        let mut following = fetcher.transfer.follow(holder.id, digest, cut).await.unwrap();
        assert_eq!(following.next().await.unwrap(), Availability::These(Bits::default()));
        drop(growth);
        assert_eq!(following.next().await.unwrap(), Availability::Whole);
        let mut again = fetcher.transfer.follow(holder.id, digest, cut).await.unwrap();
        assert_eq!(again.next().await.unwrap(), Availability::Whole);
        holder.stop.cancel();
        let error = again.next().await.unwrap_err();
        assert!(matches!(error, FetchError::Unreachable { .. }), "{error}");
    })
    .await;
}

#[tokio::test]
async fn an_agent_that_stops_does_not_wait_for_those_who_follow() {
    let blob = blob(2 * PIECE);
    let (digest, cut) = (Digest::of(&blob), Cut::usual(blob.len() as u64));
    within(async {
        let (_growth, only) = Growth::of(&blob);
        let (holder, fetcher) = (Node::start_sharing(Shelf::default(), only), Node::start(Shelf::default()));
        fetcher.meet(holder.address()).await;
        let mut following = fetcher.transfer.follow(holder.id, digest, cut).await.unwrap();
        following.next().await.unwrap();
        holder.stop.cancel();
        let error = following.next().await.unwrap_err();
        assert!(matches!(error, FetchError::Absent { .. }), "its stream ended before its connection did: {error}");
    })
    .await;
}

#[tokio::test]
async fn a_word_that_cannot_be_true_breaks_the_protocol() {
    let too_many = (0..=MAX_NEWS as u32).map(|piece| piece % 9).collect();
    let these = Availability::These(bits([1]));
    let cases = [
        ("a piece beyond the end", vec![Availability::These(bits([9]))]),
        ("more bits than pieces", vec![Availability::These(Bits(vec![0; 3]))]),
        ("news before there is anything", vec![Availability::Also(vec![1])]),
        ("news of a piece that there is not", vec![these.clone(), Availability::Also(vec![9])]),
        ("more news than fit", vec![these.clone(), Availability::Also(too_many)]),
        ("no news", vec![these.clone(), Availability::Also(Vec::new())]),
        ("everything twice", vec![these.clone(), these.clone()]),
        ("an end without a word", vec![these]),
    ];
    for (what, words) in cases {
        within(async {
            let good = words.len() - 1 + usize::from(what == "an end without a word");
            let rogue = Rogue::start(move |_, mut send| {
                let words = words.clone();
                async move {
                    wire::write(&mut send, &Answer::Partial { size: 9 * PIECE as u64 }).await.unwrap();
                    for word in words {
                        wire::write(&mut send, &word).await.unwrap();
                    }
                }
            });
            let fetcher = Node::start(Shelf::default());
            fetcher.meet(rogue.address).await;
            let cut = Cut::usual(9 * PIECE as u64);
            let mut following = fetcher.transfer.follow(rogue.id, Digest::of(b"any"), cut).await.unwrap();
            for _ in 0..good {
                following.next().await.unwrap();
            }
            let error = following.next().await.unwrap_err();
            assert!(matches!(error, FetchError::Protocol { peer, .. } if peer == rogue.id), "{what}: {error}");
        })
        .await;
    }
}

#[tokio::test]
async fn a_word_is_not_lost_on_those_who_stop_waiting_in_the_middle_of_it() {
    let word = wire::encode(&Availability::These(bits([1, 3]))).unwrap();
    within(async {
        let (go, went) = watch::channel(false);
        let rogue = Rogue::start(move |_, mut send| {
            let (word, mut went) = (word.clone(), went.clone());
            async move {
                wire::write(&mut send, &Answer::Partial { size: 9 * PIECE as u64 }).await.unwrap();
                send.write_all(&word[..7]).await.unwrap();
                went.wait_for(|went| *went).await.unwrap();
                send.write_all(&word[7..]).await.unwrap();
                let _ = send.stopped().await;
            }
        });
        let fetcher = Node::start(Shelf::default());
        fetcher.meet(rogue.address).await;
        let cut = Cut::usual(9 * PIECE as u64);
        let mut following = fetcher.transfer.follow(rogue.id, Digest::of(b"any"), cut).await.unwrap();
        assert!(tokio::time::timeout(BRIEF, following.next()).await.is_err());
        go.send(true).unwrap();
        assert_eq!(following.next().await.unwrap(), Availability::These(bits([1, 3])));
    })
    .await;
}

#[tokio::test]
async fn only_so_many_blobs_are_followed_on_a_connection() {
    let blob = blob(2 * PIECE);
    within(async {
        let (_growth, only) = Growth::of(&blob);
        let holder = Node::start_sharing(Shelf::default(), only);
        let endpoint = bare_endpoint(&Identity::generate());
        let connection = introduce(&endpoint, holder.address()).await;
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
