//! One image, from peers into the store.

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::progress::Progress;
use crate::agent::recover::{RecoverError, Recovered};
use crate::agent::resolve::Wanted;
use crate::oci::Descriptor;
use crate::ports::{ChildKind, FetchError};
use crate::testing::image::put_document;

fn wanted(name: &str) -> Wanted {
    name.parse::<Reference>().unwrap().into()
}

async fn recover(harbour: &Harbour, name: &str) -> Result<Recovered, RecoverError> {
    harbour.recoverer().recover(&wanted(name), &Progress::default(), &CancellationToken::new()).await
}

#[tokio::test(start_paused = true)]
async fn an_image_held_by_one_peer_becomes_usable_here() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!((recovered.fetched, recovered.there), (5, 0), "a manifest, a config and three layers");
    assert_eq!(recovered.bytes, image.bytes());
    assert_eq!(recovered.providers, [(peer(1), image.bytes())].into());
    let by_digest = format!("r.test/shop/checkout@{}", image.root.digest);
    assert_eq!(harbour.record_names().await, [IMAGE.to_owned(), by_digest]);
    assert_eq!(harbour.store.pins(), 0);
    harbour.store.collect();
    assert_eq!(blobs_of(&*harbour.store).await.len(), 5, "the records alone hold every blob");
}

#[tokio::test(start_paused = true)]
async fn what_the_collector_must_leave_is_written_with_the_manifest() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    recover(&harbour, IMAGE).await.unwrap();
    let remembered = harbour.store.remembered(image.root.digest).unwrap();
    let kinds: Vec<_> = remembered.children.iter().map(|child| child.kind).collect();
    assert_eq!(kinds, [ChildKind::Config, ChildKind::Layer, ChildKind::Layer, ChildKind::Layer]);
    assert_eq!(remembered.source.unwrap().to_string(), "r.test/shop/checkout");
}

#[tokio::test(start_paused = true)]
async fn only_missing_blobs_are_fetched() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    // The same seed and the same first layers: only the last layer, the config and the manifest differ.
    put_image(&*harbour.store, &["r.test/other:1".into()], &[3000, 200], 7).await.unwrap();
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!((recovered.fetched, recovered.there), (3, 2));
    let layers: u64 = image.blobs[1..3].iter().map(|blob| blob.size).sum();
    assert_eq!(recovered.bytes, image.bytes() - layers);
}

#[tokio::test(start_paused = true)]
async fn an_image_by_digest_is_recovered_and_recorded_by_digest_alone() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let name = format!("r.test/shop/checkout@{}", image.root.digest);
    recover(&harbour, &name).await.unwrap();
    assert_eq!(harbour.record_names().await, [name]);
}

#[tokio::test(start_paused = true)]
async fn a_digest_is_not_a_permission() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    for invented in ["evil.test/shop/checkout", "r.test:5000/shop/checkout", "r.test/shop/other"] {
        let name = format!("{invented}@{}", image.root.digest);
        let refused = recover(&harbour, &name).await;
        assert!(matches!(refused, Err(RecoverError::NoProvider { .. })), "{invented}: {refused:?}");
    }
    assert!(blobs_of(&*harbour.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_lying_provider_is_passed_over_and_asked_last_from_then_on() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Lies).await;
    let image = harbour.peer_with(2, IMAGE, Behaviour::Honest).await;
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!(recovered.providers, [(peer(2), image.bytes())].into());
    assert!(harbour.fetcher.times_asked(peer(1)) <= 1, "one lie is enough");
}

#[tokio::test(start_paused = true)]
async fn dead_providers_are_asked_last_from_then_on() {
    let harbour = Harbour::new();
    // Enough of them that one is asked first, whatever the ranks.
    for number in 1..=20 {
        harbour.peer_with(number, IMAGE, Behaviour::Gone).await;
    }
    harbour.peer_with(21, IMAGE, Behaviour::Honest).await;
    recover(&harbour, IMAGE).await.unwrap();
    let asked: Vec<_> = (1..=20).map(|number| harbour.fetcher.times_asked(peer(number))).collect();
    // Before the first answer it may have been asked for each of the blobs that come at a time.
    assert!(asked.iter().all(|times| *times <= 4) && asked.contains(&1), "{asked:?}");
    let before: usize = asked.iter().sum();
    harbour.store.collect();
    recover(&harbour, IMAGE).await.unwrap();
    let asked: Vec<_> = (1..=20).map(|number| harbour.fetcher.times_asked(peer(number))).collect();
    assert_eq!(asked.iter().sum::<usize>(), before, "nobody dead was asked again");
}

#[tokio::test(start_paused = true)]
async fn when_every_provider_lies_nothing_is_kept() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Lies).await;
    let failed = recover(&harbour, IMAGE).await.unwrap_err();
    assert!(harbour.counted(r#"lighterman_peer_faults_total{fault="lied"} 1"#), "once for each fault");
    let RecoverError::Fetch { attempts, .. } = &failed else { panic!("{failed:?}") };
    assert!(matches!(attempts[..], [FetchError::Corrupt { .. }]));
    assert!(failed.to_string().contains(&peer(1).to_string()), "the peer is named: {failed}");
    assert!(blobs_of(&*harbour.store).await.is_empty() && harbour.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_busy_provider_is_waited_for_and_a_dead_one_is_not() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Gone).await;
    harbour.peer_with(2, IMAGE, Behaviour::BusyFor(3)).await;
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!(recovered.providers.into_keys().collect::<Vec<_>>(), [peer(2)]);
}

#[tokio::test(start_paused = true)]
async fn peers_that_disagree_on_a_tag_are_named_with_their_digests() {
    let harbour = Harbour::new();
    let first = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let store = Arc::new(MemoryStore::new());
    let second = put_image(&*store, &[IMAGE.into()], &[5], 99).await.unwrap();
    harbour.announce(2, store, Behaviour::Honest).await;
    let refused = recover(&harbour, IMAGE).await.unwrap_err();
    assert!(matches!(refused, RecoverError::Disagreement { .. }));
    for digest in [first.root.digest, second.root.digest] {
        assert!(refused.to_string().contains(&digest.to_string()), "{refused}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_limit_stops_an_image_before_a_layer_moves() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.rule(|rules| rules.budgets.max_image_bytes = 1000);
    let refused = recover(&harbour, IMAGE).await;
    assert!(matches!(refused, Err(RecoverError::OverLimit(_))), "{refused:?}");
    assert_eq!(harbour.fetcher.served().len(), 1, "only the manifest");
    harbour.store.collect();
    assert!(blobs_of(&*harbour.store).await.is_empty(), "which is not held: the next attempt will not get further");
}

#[tokio::test(start_paused = true)]
async fn an_index_without_this_platform_has_no_image_for_us() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[], &[5], 1).await.unwrap();
    put_index(&store, &image, "s390x").await;
    harbour.announce(1, store, Behaviour::Honest).await;
    let refused = recover(&harbour, IMAGE).await;
    assert!(matches!(refused, Err(RecoverError::NoPlatform { .. })), "{refused:?}");
}

#[tokio::test(start_paused = true)]
async fn an_index_is_recovered_with_the_manifest_of_this_platform_alone() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[], &[5], 1).await.unwrap();
    put_index(&store, &image, &Platform::of_this_node().architecture).await;
    harbour.announce(1, store, Behaviour::Honest).await;
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_ne!(recovered.root, image.root.digest, "the record points at the index");
    harbour.store.collect();
    assert_eq!(blobs_of(&*harbour.store).await.len(), 4, "index, manifest, config, layer");
}

/// An index that names the image for one architecture, and something absent for another.
async fn put_index(store: &MemoryStore, image: &MadeImage, architecture: &str) {
    let manifest = &image.root;
    let entry = |digest: Digest, architecture: &str| {
        serde_json::json!({"mediaType": manifest.media_type, "digest": digest, "size": manifest.size,
            "platform": {"architecture": architecture, "os": "linux"}})
    };
    let manifests = [entry(manifest.digest, architecture), entry(Digest::of(b"elsewhere"), "riscv64")];
    let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests}).to_string();
    crate::testing::image::put_document(store, IMAGE, index).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_no_manifest_is_refused_and_not_kept() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    crate::testing::image::put_document(&*store, IMAGE, "<html>".into()).await.unwrap();
    harbour.announce(1, store, Behaviour::Honest).await;
    let refused = recover(&harbour, IMAGE).await;
    assert!(matches!(refused, Err(RecoverError::Document { .. })), "{refused:?}");
    assert!(blobs_of(&*harbour.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_that_is_stopped_leaves_no_record_and_no_pin() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Hangs).await;
    let recoverer = harbour.recoverer();
    let (reference, progress, stop) = (wanted(IMAGE), Progress::default(), CancellationToken::new());
    let (result, ()) = tokio::join!(recoverer.recover(&reference, &progress, &stop), async {
        tokio::task::yield_now().await;
        stop.cancel();
    });
    assert!(matches!(result, Err(RecoverError::Abandoned)));
    assert!(harbour.fetcher.times_asked(peer(1)) > 0, "it was stopped in the middle");
    assert_eq!(harbour.store.pins(), 0);
    assert!(harbour.record_names().await.is_empty());
    harbour.store.collect();
    assert!(blobs_of(&*harbour.store).await.is_empty(), "nothing is held");
}

#[tokio::test(start_paused = true)]
async fn without_an_api_server_the_claim_is_done_without() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.cluster.set_away(true);
    recover(&harbour, IMAGE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn what_is_here_already_is_recorded_without_fetching() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    recover(&harbour, IMAGE).await.unwrap();
    let again = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!((again.fetched, again.there, again.bytes), (0, 5, 0));
}

#[tokio::test(start_paused = true)]
async fn a_manifest_that_was_here_without_its_labels_gets_them() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[IMAGE.into()], &[3000, 200], 7).await.unwrap();
    let mut reader = store.open(image.root.digest).await.unwrap();
    let manifest = reader.read_at(0, 1 << 20).await.unwrap();
    harbour.announce(1, store, Behaviour::Honest).await;
    let manifest = String::from_utf8(manifest.to_vec()).unwrap();
    crate::testing::image::put_document(&*harbour.store, "r.test/left:over", manifest).await.unwrap();
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!((recovered.fetched, recovered.there), (3, 1));
    harbour.store.collect();
    assert_eq!(blobs_of(&*harbour.store).await.len(), 4, "or the collector would have taken the layers");
}

#[tokio::test(start_paused = true)]
async fn a_manifest_that_only_other_peers_hold_is_fetched_from_them() {
    let harbour = Harbour::new();
    let (with_index, with_rest) = (Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new()));
    let image = put_image(&*with_rest, &[], &[5], 1).await.unwrap();
    put_index(&with_index, &image, &Platform::of_this_node().architecture).await;
    harbour.announce(1, with_index, Behaviour::Honest).await;
    harbour.announce(2, with_rest, Behaviour::Honest).await;
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!(recovered.providers.into_keys().collect::<Vec<_>>().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_peer_whose_manifest_is_over_the_limit_is_not_asked_for_it() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    let huge = " ".repeat(usize::try_from(crate::oci::MAX_DOCUMENT_BYTES).unwrap() + 1);
    crate::testing::image::put_document(&*store, IMAGE, huge).await.unwrap();
    harbour.announce(1, store, Behaviour::Honest).await;
    let refused = recover(&harbour, IMAGE).await.unwrap_err();
    assert!(refused.to_string().contains("over the limit"), "{refused}");
    assert_eq!(harbour.fetcher.times_asked(peer(1)), 0, "not a byte of it moved");
}

#[tokio::test(start_paused = true)]
async fn a_blob_that_somebody_else_is_writing_here_is_waited_for() {
    let harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let layer = &image.blobs[1];
    let pin = harbour.store.pin(std::time::Duration::from_secs(600)).await.unwrap();
    let writer = harbour.store.create(layer.digest, layer.size, &pin).await.unwrap();
    let (recovered, ()) = tokio::join!(recover(&harbour, IMAGE), async {
        tokio::time::sleep(std::time::Duration::from_secs(300)).await;
        drop(writer);
    });
    assert_eq!(recovered.unwrap().fetched, 5);
}

#[tokio::test(start_paused = true)]
async fn a_name_that_is_here_is_mended_and_never_turned_into_something_else() {
    let harbour = Harbour::new();
    let here = put_image(&*harbour.store, &[IMAGE.to_owned()], &[3000, 200], 1).await.unwrap();
    harbour.peer_with(2, IMAGE, Behaviour::Honest).await;
    let recovered = recover(&harbour, IMAGE).await.unwrap();
    assert_eq!((recovered.root, recovered.fetched), (here.root.digest, 0), "peers hold another image by that name");
}

#[tokio::test(start_paused = true)]
async fn a_name_that_points_at_no_image_is_no_name() {
    let harbour = Harbour::new();
    let page = put_document(&*harbour.store, IMAGE, "<html>".into()).await.unwrap();
    let target = Descriptor { media_type: "text/html".into(), ..page };
    harbour.store.put_image(&ImageRecord { name: IMAGE.into(), target }).await.unwrap();
    let image = harbour.peer_with(2, IMAGE, Behaviour::Honest).await;
    assert_eq!(recover(&harbour, IMAGE).await.unwrap().root, image.root.digest);
    assert!(harbour.record_names().await.contains(&IMAGE.to_owned()));
}
