//! The agent is killed at every step of a recovery, before it and after it.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use std::collections::HashMap;

use super::*;
use crate::agent::recovery::progress::Progress;
use crate::decide::image_completeness::{DocumentNeeds, missing_content};
use crate::oci::Document;
use crate::testing::image::{Recipe, make_image};
use crate::testing::{KillPoint, StoppingStore};

/// What is in the store at the beginning.
#[derive(Debug, Clone, Copy, PartialEq)]
enum InitialContent {
    /// Nothing.
    Empty,
    /// The image with a record, and a manifest whose bytes are wrong.
    Damaged,
}

/// A node on which the recovery was killed; `None` when it ended before that step came.
async fn recover_until_killed(killed_at: KillPoint, before: InitialContent) -> Option<TestNode> {
    let node = TestNode::new();
    let recipe = Recipe { layers: vec![1_500_000, 200], index: true, ..Recipe::default() };
    let theirs = Arc::new(MemoryStore::new());
    make_image(&*theirs, &[IMAGE.into()], &recipe, 7).await.unwrap();
    node.announce_store(1, theirs, Behaviour::Honest).await;
    if before == InitialContent::Damaged {
        let image = make_image(&*node.store, &["r.test/kept:1".into()], &recipe, 7).await.unwrap();
        node.store.corrupt(image.blobs[0].digest);
    }
    let store = StoppingStore::new(Arc::clone(&node.store) as _, killed_at);
    let recoverer = node.recoverer_on(Arc::new(store.clone()));
    let (wanted, progress, stop) =
        (IMAGE.parse::<Reference>().unwrap().into(), Progress::default(), CancellationToken::new());
    let was_killed = tokio::select! {
        biased;
        () = store.reached() => true,
        recovered = recoverer.recover(&wanted, &progress, &stop) => recovered.map(|_| false).unwrap(),
    };
    drop(recoverer);
    let node = TestNode { store: Arc::new(node.store.restarted()), ..node };
    was_killed.then_some(node)
}

/// What the image of this name lacks.
async fn missing_content_of(
    store: &MemoryStore,
    root: Digest,
) -> Option<crate::decide::image_completeness::MissingContent> {
    let there = blobs_of(store).await;
    let mut known = HashMap::new();
    for &digest in &there {
        let bytes = store.open(digest).await.unwrap().read_at(0, 1 << 20).await.unwrap();
        if let (true, Ok(document)) = (Digest::of(&bytes) == digest, Document::parse(&bytes)) {
            known.insert(digest, DocumentNeeds::of(&document));
        }
    }
    missing_content(root, |digest| known.get(&digest), |digest| there.contains(&digest))
}

async fn assert_records_are_whole(store: &MemoryStore, when: &str) {
    for record in store.images().await.unwrap() {
        if record.name != "r.test/kept:1" {
            assert_eq!(missing_content_of(store, record.target.digest).await, None, "{} {when}", record.name);
        }
    }
}

/// Every step, before it and after it, until the recovery ends by itself. Returns how many there were.
async fn at_every_step(before: InitialContent, check: impl AsyncFn(TestNode, String)) -> usize {
    for step in 0.. {
        for killed_at in [KillPoint::Before(step), KillPoint::After(step)] {
            match recover_until_killed(killed_at, before).await {
                Some(node) => check(node, format!("killed at {killed_at:?} with {before:?}")).await,
                None => return step,
            }
        }
    }
    unreachable!("a recovery has an end")
}

#[tokio::test(start_paused = true)]
async fn a_killed_recovery_leaves_only_whole_image_records_and_the_retry_completes() {
    for (before, least) in [(InitialContent::Empty, 15), (InitialContent::Damaged, 10)] {
        let steps = at_every_step(before, async |node, when| {
            assert_records_are_whole(&node.store, &when).await;
            node.store.collect();
            assert_records_are_whole(&node.store, &format!("{when} and collected")).await;
            let wanted = IMAGE.parse::<Reference>().unwrap().into();
            let began = tokio::time::Instant::now();
            let recovered = node.recoverer().recover(&wanted, &Progress::default(), &CancellationToken::new()).await;
            assert!(began.elapsed() < Duration::from_secs(1), "{when}: simulated time {:?}", began.elapsed());
            let root = recovered.unwrap_or_else(|error| panic!("{when}: {error}")).digest;
            // What the killed one held is held no longer then.
            tokio::time::advance(Duration::from_secs(3601)).await;
            node.store.collect();
            assert_eq!(missing_content_of(&node.store, root).await, None, "{when}");
            assert!(node.record_names().await.contains(&IMAGE.to_owned()), "{when}");
        });
        assert!(steps.await >= least, "the test takes the steps that there are");
    }
}

#[tokio::test(start_paused = true)]
async fn a_killed_recovery_without_a_retry_leaves_no_content() {
    at_every_step(InitialContent::Empty, async |node, when| {
        tokio::time::advance(Duration::from_secs(3601)).await;
        node.store.collect();
        let (blobs, records) = (blobs_of(&*node.store).await.len(), node.record_names().await.len());
        assert_eq!(blobs, if records == 0 { 0 } else { 5 }, "{when}: {records} records");
        assert_eq!(node.store.pins(), 0, "{when}");
    })
    .await;
}
