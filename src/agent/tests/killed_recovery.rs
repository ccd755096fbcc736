//! Kills the agent before and after every step of a recovery.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

use std::collections::HashMap;

use super::*;
use crate::agent::recovery::progress::Progress;
use crate::decide::image_completeness::{DocumentNeeds, missing_content};
use crate::oci::Document;
use crate::ports::{Blobs, ImageRecords};
use crate::testing::image::{Recipe, make_image};
use crate::testing::{KillPoint, StoppingStore};

#[derive(Debug, Clone, Copy, PartialEq)]
enum InitialContent {
    Empty,
    /// An image record, whose manifest has wrong bytes.
    Damaged,
}

/// Runs a recovery up to the kill point and restarts the store. Returns `None` if the recovery ends
/// before the kill point.
async fn recover_until_killed(killed_at: KillPoint, initial: InitialContent) -> Option<TestNode> {
    let node = TestNode::new();
    let recipe = Recipe { layers: vec![1_500_000, 200], index: true, ..Recipe::default() };
    let peer_store = Arc::new(MemoryStore::new());
    make_image(&*peer_store, &[IMAGE.into()], &recipe, 7).await.unwrap();
    node.announce_store(1, peer_store, Behaviour::Honest).await;
    if initial == InitialContent::Damaged {
        let image = make_image(&*node.store, &["r.test/kept:1".into()], &recipe, 7).await.unwrap();
        node.store.corrupt(image.blobs[0].digest);
    }
    let store = StoppingStore::new(Arc::clone(&node.store) as _, killed_at);
    let recoverer = node.recoverer_on(Arc::new(store.clone()));
    let (request, progress, stop) =
        (IMAGE.parse::<Reference>().unwrap().into(), Progress::default(), CancellationToken::new());
    let was_killed = tokio::select! {
        biased;
        () = store.reached() => true,
        recovered = recoverer.recover(&request, &progress, &stop) => recovered.map(|_| false).unwrap(),
    };
    drop(recoverer);
    let node = TestNode { store: Arc::new(node.store.restarted()), ..node };
    was_killed.then_some(node)
}

/// Missing content of an image. A manifest or index counts only if its bytes match its digest.
async fn missing_content_of(
    store: &MemoryStore,
    image: Digest,
) -> Option<crate::decide::image_completeness::MissingContent> {
    let blobs = blobs_of(store).await;
    let mut documents = HashMap::new();
    for &digest in &blobs {
        let bytes = store.open(digest).await.unwrap().read_at(0, 1 << 20).await.unwrap();
        if let (true, Ok(document)) = (Digest::of(&bytes) == digest, Document::parse(&bytes)) {
            documents.insert(digest, DocumentNeeds::of(&document));
        }
    }
    missing_content(image, |digest| documents.get(&digest), |digest| blobs.contains(&digest))
}

async fn assert_records_are_whole(store: &MemoryStore, when: &str) {
    for record in store.images().await.unwrap() {
        if record.name != "r.test/kept:1" {
            assert_eq!(missing_content_of(store, record.target.digest).await, None, "{} {when}", record.name);
        }
    }
}

/// Runs `check` after a kill before and after every step. Returns the number of steps in a whole
/// recovery.
async fn at_every_step(initial: InitialContent, check: impl AsyncFn(TestNode, String)) -> usize {
    for step in 0.. {
        for killed_at in [KillPoint::Before(step), KillPoint::After(step)] {
            match recover_until_killed(killed_at, initial).await {
                Some(node) => check(node, format!("killed at {killed_at:?} with {initial:?}")).await,
                None => return step,
            }
        }
    }
    unreachable!("every recovery ends")
}

#[tokio::test(start_paused = true)]
async fn a_killed_recovery_leaves_only_whole_image_records_and_the_retry_completes() {
    for (initial, min_steps) in [(InitialContent::Empty, 11), (InitialContent::Damaged, 6)] {
        let steps = at_every_step(initial, async |node, when| {
            assert_records_are_whole(&node.store, &when).await;
            node.store.collect();
            assert_records_are_whole(&node.store, &format!("{when} and collected")).await;
            let request = IMAGE.parse::<Reference>().unwrap().into();
            let began = tokio::time::Instant::now();
            let recovered = node.recoverer().recover(&request, &Progress::default(), &CancellationToken::new()).await;
            assert!(began.elapsed() < Duration::from_secs(1), "{when}: simulated time {:?}", began.elapsed());
            let digest = recovered.unwrap_or_else(|error| panic!("{when}: {error}")).digest;
            // By then the pins of the killed recovery have expired.
            tokio::time::advance(Duration::from_secs(3601)).await;
            node.store.collect();
            assert_eq!(missing_content_of(&node.store, digest).await, None, "{when}");
            assert!(node.record_names().await.contains(&IMAGE.to_owned()), "{when}");
        });
        assert!(steps.await >= min_steps, "fewer than {min_steps} steps with {initial:?}");
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
