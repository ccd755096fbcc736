//! Recoveries of one image, from peers into the store.

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::model::RecoveredImage;
use crate::oci::Descriptor;
use crate::ports::{Blobs, ChildKind, FetchError, ImageRecords, Pins};
use crate::testing::image::put_document;

fn request(name: &str) -> RecoveryRequest {
    name.parse::<Reference>().unwrap().into()
}

async fn recover(node: &TestNode, name: &str) -> Result<RecoveredImage, RecoverError> {
    node.recoverer().recover(&request(name), &Progress::default(), &CancellationToken::new()).await
}

#[tokio::test(start_paused = true)]
async fn an_image_of_one_provider_is_recovered() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_eq!((recovered.fetched, recovered.present), (5, 0), "a manifest, a config and three layers");
    assert_eq!(recovered.bytes, image.bytes());
    assert_eq!(recovered.providers, [(peer(1), image.bytes())].into());
    let by_digest = format!("r.test/shop/checkout@{}", image.target.digest);
    assert_eq!(node.record_names().await, [IMAGE.to_owned(), by_digest]);
    assert_eq!(node.store.pins(), 0);
    node.store.collect();
    assert_eq!(blobs_of(&*node.store).await.len(), 5, "the image records alone keep every blob");
}

#[tokio::test(start_paused = true)]
async fn gc_labels_are_written_with_the_manifest() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    recover(&node, IMAGE).await.unwrap();
    let metadata = node.store.metadata(image.target.digest).unwrap();
    let kinds: Vec<_> = metadata.children.iter().map(|child| child.kind).collect();
    assert_eq!(kinds, [ChildKind::Config, ChildKind::Layer, ChildKind::Layer, ChildKind::Layer]);
    assert_eq!(metadata.source.unwrap().to_string(), "r.test/shop/checkout");
}

#[tokio::test(start_paused = true)]
async fn only_missing_blobs_are_fetched() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    // The same seed and first layers: only the last layer, the config and the manifest differ.
    put_image(&*node.store, &["r.test/other:1".into()], &[3000, 200], 7).await.unwrap();
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_eq!((recovered.fetched, recovered.present), (3, 2));
    let layers: u64 = image.blobs[1..3].iter().map(|blob| blob.size).sum();
    assert_eq!(recovered.bytes, image.bytes() - layers);
}

#[tokio::test(start_paused = true)]
async fn an_image_by_digest_is_recovered_and_recorded_by_digest_alone() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let name = format!("r.test/shop/checkout@{}", image.target.digest);
    recover(&node, &name).await.unwrap();
    assert_eq!(node.record_names().await, [name]);
}

#[tokio::test(start_paused = true)]
async fn a_digest_is_not_a_permission() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    for invented in ["evil.test/shop/checkout", "r.test:5000/shop/checkout", "r.test/shop/other"] {
        let name = format!("{invented}@{}", image.target.digest);
        let rejected = recover(&node, &name).await;
        assert!(matches!(rejected, Err(RecoverError::NoProvider { .. })), "{invented}: {rejected:?}");
    }
    assert!(blobs_of(&*node.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_lying_provider_is_passed_over_and_ranked_last_afterwards() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Corrupts).await;
    let image = node.add_provider(2, IMAGE, Behaviour::Honest).await;
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_eq!(recovered.providers, [(peer(2), image.bytes())].into());
    assert!(node.fetcher.request_count(peer(1)) <= 1, "no request after the first wrong bytes");
}

#[tokio::test(start_paused = true)]
async fn dead_providers_are_ranked_last_afterwards() {
    let node = TestNode::new();
    // Among 20 unreachable peers at least one gets a request first, whatever the ranks.
    for number in 1..=20 {
        node.add_provider(number, IMAGE, Behaviour::Unreachable).await;
    }
    node.add_provider(21, IMAGE, Behaviour::Honest).await;
    recover(&node, IMAGE).await.unwrap();
    let requests: Vec<_> = (1..=20).map(|number| node.fetcher.request_count(peer(number))).collect();
    // Before the first failure, a peer may get a request for each of the four blobs.
    assert!(requests.iter().all(|times| *times <= 4) && requests.contains(&1), "{requests:?}");
    let before: usize = requests.iter().sum();
    node.store.collect();
    recover(&node, IMAGE).await.unwrap();
    let requests: Vec<_> = (1..=20).map(|number| node.fetcher.request_count(peer(number))).collect();
    assert_eq!(requests.iter().sum::<usize>(), before, "no unreachable peer gets another request");
}

#[tokio::test(start_paused = true)]
async fn an_image_of_lying_providers_is_not_stored() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Corrupts).await;
    let failed = recover(&node, IMAGE).await.unwrap_err();
    assert!(node.has_metric(r#"lighterman_peer_faults_total{fault="lied"} 1"#), "the fault is counted once");
    let RecoverError::Fetch { attempts, .. } = &failed else { panic!("{failed:?}") };
    assert!(matches!(attempts[..], [FetchError::Corrupt { .. }]));
    assert!(failed.to_string().contains(&peer(1).to_string()), "the error names the peer: {failed}");
    assert!(blobs_of(&*node.store).await.is_empty() && node.record_names().await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_busy_provider_is_retried_and_a_dead_provider_is_not() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Unreachable).await;
    node.add_provider(2, IMAGE, Behaviour::BusyFor(3)).await;
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_eq!(recovered.providers.into_keys().collect::<Vec<_>>(), [peer(2)]);
}

#[tokio::test(start_paused = true)]
async fn peers_that_disagree_on_a_tag_are_named_with_their_digests() {
    let node = TestNode::new();
    let first = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let store = Arc::new(MemoryStore::new());
    let second = put_image(&*store, &[IMAGE.into()], &[5], 99).await.unwrap();
    node.announce_store(2, store, Behaviour::Honest).await;
    let rejected = recover(&node, IMAGE).await.unwrap_err();
    assert!(matches!(rejected, RecoverError::TagDisagreement { .. }));
    for digest in [first.target.digest, second.target.digest] {
        assert!(rejected.to_string().contains(&digest.to_string()), "{rejected}");
    }
}

#[tokio::test(start_paused = true)]
async fn an_image_over_the_size_limit_is_rejected_before_a_layer_is_fetched() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.change_policy(|policy| policy.budgets.max_image_bytes = 1000);
    let rejected = recover(&node, IMAGE).await;
    assert!(matches!(rejected, Err(RecoverError::OverLimit(_))), "{rejected:?}");
    assert_eq!(node.fetcher.served().len(), 1, "only the manifest");
    node.store.collect();
    assert!(blobs_of(&*node.store).await.is_empty(), "the manifest of a refused image is not kept");
}

#[tokio::test(start_paused = true)]
async fn an_index_without_this_platform_is_rejected() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[], &[5], 1).await.unwrap();
    put_index(&store, &image, "s390x").await;
    node.announce_store(1, store, Behaviour::Honest).await;
    let rejected = recover(&node, IMAGE).await;
    assert!(matches!(rejected, Err(RecoverError::NoPlatform { .. })), "{rejected:?}");
}

#[tokio::test(start_paused = true)]
async fn an_index_is_recovered_with_the_manifest_of_this_platform_alone() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[], &[5], 1).await.unwrap();
    put_index(&store, &image, &Platform::of_this_node().architecture).await;
    node.announce_store(1, store, Behaviour::Honest).await;
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_ne!(recovered.digest, image.target.digest, "the record points at the index");
    node.store.collect();
    assert_eq!(blobs_of(&*node.store).await.len(), 4, "index, manifest, config, layer");
}

/// Stores an index with the image for `architecture`, and with an absent manifest for riscv64.
async fn put_index(store: &MemoryStore, image: &MadeImage, architecture: &str) {
    let manifest = &image.target;
    let entry = |digest: Digest, architecture: &str| {
        serde_json::json!({"mediaType": manifest.media_type, "digest": digest, "size": manifest.size,
            "platform": {"architecture": architecture, "os": "linux"}})
    };
    let manifests = [entry(manifest.digest, architecture), entry(Digest::of(b"elsewhere"), "riscv64")];
    let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests}).to_string();
    crate::testing::image::put_document(store, IMAGE, index).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_blob_that_is_no_manifest_is_rejected_and_not_stored() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    crate::testing::image::put_document(&*store, IMAGE, "<html>".into()).await.unwrap();
    node.announce_store(1, store, Behaviour::Honest).await;
    let rejected = recover(&node, IMAGE).await;
    assert!(matches!(rejected, Err(RecoverError::Document { .. })), "{rejected:?}");
    assert!(blobs_of(&*node.store).await.is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_recovery_that_is_stopped_leaves_no_record_and_no_pin() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Hangs).await;
    let recoverer = node.recoverer();
    let (reference, progress, stop) = (request(IMAGE), Progress::default(), CancellationToken::new());
    let (result, ()) = tokio::join!(recoverer.recover(&reference, &progress, &stop), async {
        tokio::task::yield_now().await;
        stop.cancel();
    });
    assert!(matches!(result, Err(RecoverError::Abandoned)));
    assert!(node.fetcher.request_count(peer(1)) > 0, "the recovery stopped during a fetch");
    assert_eq!(node.store.pins(), 0);
    assert!(node.record_names().await.is_empty());
    node.store.collect();
    assert!(blobs_of(&*node.store).await.is_empty(), "no blob is pinned");
}

#[tokio::test(start_paused = true)]
async fn a_recovery_continues_without_a_claim_if_the_api_server_is_unavailable() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.cluster.set_unavailable(true);
    recover(&node, IMAGE).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_image_that_is_present_is_recorded_without_a_fetch() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    recover(&node, IMAGE).await.unwrap();
    let again = recover(&node, IMAGE).await.unwrap();
    assert_eq!((again.fetched, again.present, again.bytes), (0, 5, 0));
}

#[tokio::test(start_paused = true)]
async fn gc_labels_are_added_to_a_present_manifest() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[IMAGE.into()], &[3000, 200], 7).await.unwrap();
    let mut reader = store.open(image.target.digest).await.unwrap();
    let manifest = reader.read_at(0, 1 << 20).await.unwrap();
    node.announce_store(1, store, Behaviour::Honest).await;
    let manifest = String::from_utf8(manifest.to_vec()).unwrap();
    crate::testing::image::put_document(&*node.store, "r.test/left:over", manifest).await.unwrap();
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_eq!((recovered.fetched, recovered.present), (3, 1));
    node.store.collect();
    assert_eq!(blobs_of(&*node.store).await.len(), 4, "the labels keep the layers");
}

#[tokio::test(start_paused = true)]
async fn a_manifest_is_fetched_from_providers_that_lack_the_index() {
    let node = TestNode::new();
    let (with_index, with_rest) = (Arc::new(MemoryStore::new()), Arc::new(MemoryStore::new()));
    let image = put_image(&*with_rest, &[], &[5], 1).await.unwrap();
    put_index(&with_index, &image, &Platform::of_this_node().architecture).await;
    node.announce_store(1, with_index, Behaviour::Honest).await;
    node.announce_store(2, with_rest, Behaviour::Honest).await;
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_eq!(recovered.providers.into_keys().collect::<Vec<_>>().len(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_manifest_over_the_size_limit_is_not_requested() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let huge = " ".repeat(usize::try_from(crate::oci::MAX_DOCUMENT_BYTES).unwrap() + 1);
    crate::testing::image::put_document(&*store, IMAGE, huge).await.unwrap();
    node.announce_store(1, store, Behaviour::Honest).await;
    let rejected = recover(&node, IMAGE).await.unwrap_err();
    assert!(rejected.to_string().contains("over the limit"), "{rejected}");
    assert_eq!(node.fetcher.request_count(peer(1)), 0, "no byte of the manifest is fetched");
}

#[tokio::test(start_paused = true)]
async fn a_blob_with_an_open_writer_is_waited_for() {
    let node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let layer = &image.blobs[1];
    let pin = node.store.pin(std::time::Duration::from_secs(600)).await.unwrap();
    let staged = node.store.stage(layer.digest, layer.size, &pin).await.unwrap();
    let (recovered, ()) = tokio::join!(recover(&node, IMAGE), async {
        tokio::time::sleep(std::time::Duration::from_secs(300)).await;
        drop(staged);
    });
    assert_eq!(recovered.unwrap().fetched, 5);
}

#[tokio::test(start_paused = true)]
async fn a_recorded_image_is_repaired_and_keeps_its_digest() {
    let node = TestNode::new();
    let image = put_image(&*node.store, &[IMAGE.to_owned()], &[3000, 200], 1).await.unwrap();
    node.add_provider(2, IMAGE, Behaviour::Honest).await;
    let recovered = recover(&node, IMAGE).await.unwrap();
    assert_eq!(
        (recovered.digest, recovered.fetched),
        (image.target.digest, 0),
        "peers provide another image under this tag"
    );
}

#[tokio::test(start_paused = true)]
async fn an_image_record_of_something_else_than_an_image_is_ignored() {
    let node = TestNode::new();
    let page = put_document(&*node.store, IMAGE, "<html>".into()).await.unwrap();
    let target = Descriptor { media_type: "text/html".into(), ..page };
    node.store.put_image(&ImageRecord { name: IMAGE.into(), target }).await.unwrap();
    let image = node.add_provider(2, IMAGE, Behaviour::Honest).await;
    assert_eq!(recover(&node, IMAGE).await.unwrap().digest, image.target.digest);
    assert!(node.record_names().await.contains(&IMAGE.to_owned()));
}
