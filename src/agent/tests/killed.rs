//! The agent is killed at every step of a recovery, before it and after it.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use std::collections::HashMap;

use super::*;
use crate::agent::progress::Progress;
use crate::decide::wholeness::{Needs, lack};
use crate::oci::Document;
use crate::testing::image::{Recipe, make_image};
use crate::testing::{KilledAt, StoppingStore};

/// What is in the store at the beginning.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Before {
    /// Nothing.
    Empty,
    /// The image with a record, and a manifest whose bytes are wrong.
    Damaged,
}

/// A node on which the recovery was killed; `None` when it ended before that step came.
async fn killed(killed_at: KilledAt, before: Before) -> Option<Harbour> {
    let harbour = Harbour::new();
    let recipe = Recipe { layers: vec![1_500_000, 200], index: true, ..Recipe::default() };
    let theirs = Arc::new(MemoryStore::new());
    make_image(&*theirs, &[IMAGE.into()], &recipe, 7).await.unwrap();
    harbour.announce(1, theirs, Behaviour::Honest).await;
    if before == Before::Damaged {
        let image = make_image(&*harbour.store, &["r.test/kept:1".into()], &recipe, 7).await.unwrap();
        harbour.store.spoil(image.blobs[0].digest);
    }
    let store = StoppingStore::new(Arc::clone(&harbour.store) as _, killed_at);
    let recoverer = harbour.recoverer_on(Arc::new(store.clone()));
    let (wanted, progress, stop) =
        (IMAGE.parse::<Reference>().unwrap().into(), Progress::default(), CancellationToken::new());
    let was_killed = tokio::select! {
        biased;
        () = store.reached() => true,
        recovered = recoverer.recover(&wanted, &progress, &stop) => recovered.map(|_| false).unwrap(),
    };
    drop(recoverer);
    let harbour = Harbour { store: Arc::new(harbour.store.restarted()), ..harbour };
    was_killed.then_some(harbour)
}

/// What the image of this name lacks.
async fn lacks(store: &MemoryStore, root: Digest) -> Option<crate::decide::wholeness::Lack> {
    let there = blobs_of(store).await;
    let mut known = HashMap::new();
    for &digest in &there {
        let bytes = store.open(digest).await.unwrap().read_at(0, 1 << 20).await.unwrap();
        if let (true, Ok(document)) = (Digest::of(&bytes) == digest, Document::parse(&bytes)) {
            known.insert(digest, Needs::of(&document));
        }
    }
    lack(root, |digest| known.get(&digest), |digest| there.contains(&digest))
}

async fn every_record_of_ours_is_whole(store: &MemoryStore, when: &str) {
    for record in store.images().await.unwrap() {
        if record.name != "r.test/kept:1" {
            assert_eq!(lacks(store, record.target.digest).await, None, "{} {when}", record.name);
        }
    }
}

/// Every step, before it and after it, until the recovery ends by itself. Returns how many there were.
async fn at_every_step(before: Before, check: impl AsyncFn(Harbour, String)) -> usize {
    for step in 0.. {
        for killed_at in [KilledAt::Before(step), KilledAt::After(step)] {
            match killed(killed_at, before).await {
                Some(harbour) => check(harbour, format!("killed at {killed_at:?} with {before:?}")).await,
                None => return step,
            }
        }
    }
    unreachable!("a recovery has an end")
}

#[tokio::test(start_paused = true)]
async fn whenever_it_is_killed_no_record_promises_too_much_and_the_next_start_finishes() {
    for (before, least) in [(Before::Empty, 15), (Before::Damaged, 10)] {
        let steps = at_every_step(before, async |harbour, when| {
            every_record_of_ours_is_whole(&harbour.store, &when).await;
            harbour.store.collect();
            every_record_of_ours_is_whole(&harbour.store, &format!("{when} and collected")).await;
            let wanted = IMAGE.parse::<Reference>().unwrap().into();
            let began = tokio::time::Instant::now();
            let recovered = harbour.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await;
            assert!(began.elapsed() < Duration::from_secs(1), "{when}: simulated time {:?}", began.elapsed());
            let root = recovered.unwrap_or_else(|error| panic!("{when}: {error}")).root;
            // What the killed one held is held no longer then.
            tokio::time::advance(Duration::from_secs(3601)).await;
            harbour.store.collect();
            assert_eq!(lacks(&harbour.store, root).await, None, "{when}");
            assert!(harbour.record_names().await.contains(&IMAGE.to_owned()), "{when}");
        });
        assert!(steps.await >= least, "the test takes the steps that there are");
    }
}

#[tokio::test(start_paused = true)]
async fn whenever_it_is_killed_and_nobody_goes_on_nothing_is_left_behind() {
    at_every_step(Before::Empty, async |harbour, when| {
        tokio::time::advance(Duration::from_secs(3601)).await;
        harbour.store.collect();
        let (blobs, records) = (blobs_of(&*harbour.store).await.len(), harbour.record_names().await.len());
        assert_eq!(blobs, if records == 0 { 0 } else { 5 }, "{when}: {records} records");
        assert_eq!(harbour.store.pins(), 0, "{when}");
    })
    .await;
}
