//! Resolution of references to digests, and the choice of providers.

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::recovery::progress::Progress;
use crate::agent::recovery::recover_error::RecoverError;
use crate::agent::recovery::reference_resolver::RecoveryRequest;
use crate::decide::recovery_queue::RecoveryEnd;
use crate::decide::tag::TagPolicy;
use crate::model::ResolvedImage;
use crate::ports::PullSecret;
use crate::testing::image::{Recipe, make_image};

fn request(name: &str) -> RecoveryRequest {
    name.parse::<Reference>().unwrap().into()
}

async fn find(node: &TestNode, name: &str) -> Result<ResolvedImage, RecoverError> {
    node.recoverer().find(&request(name)).await
}

/// Adds peers with images of one name. An entry has the peer's number, the image's seed and the
/// image's creation time. Returns the image's digest for each entry.
async fn peers_with(node: &TestNode, images: &[(u8, u8, &str)]) -> Vec<Digest> {
    let mut image_digests = Vec::new();
    for (number, seed, created) in images {
        let store = Arc::new(MemoryStore::new());
        let recipe = Recipe { layers: vec![100], created: Some((*created).to_owned()), ..Recipe::default() };
        let image = make_image(&*store, &[IMAGE.to_owned()], &recipe, u64::from(*seed)).await.unwrap();
        image_digests.push(image.target.digest);
        node.announce_store(*number, store, Behaviour::Honest).await;
    }
    image_digests
}

#[tokio::test(start_paused = true)]
async fn the_tag_policy_resolves_a_disagreement_of_peers() {
    let images = [(1, 1, "2026-01-01T00:00:00Z"), (2, 1, "2026-01-01T00:00:00Z"), (3, 2, "2026-03-01T00:00:00+02:00")];
    for (policy, expected) in
        [(TagPolicy::Unanimous, None), (TagPolicy::MostCommon, Some(0)), (TagPolicy::Newest, Some(2))]
    {
        let mut node = TestNode::new();
        node.resolve.tag_policy = policy;
        let image_digests = peers_with(&node, &images).await;
        match (find(&node, IMAGE).await, expected) {
            (Ok(found), Some(expected)) => assert_eq!(found.digest, image_digests[expected], "{policy:?}"),
            (Err(RecoverError::TagDisagreement { digests, .. }), None) => {
                assert_eq!(digests.iter().map(|(_, peers)| peers).sum::<usize>(), 3);
            }
            (other, _) => panic!("{policy:?}: {other:?}"),
        }
        assert!(blobs_of(&*node.store).await.is_empty(), "a resolution keeps no blob");
    }
}

#[tokio::test(start_paused = true)]
async fn the_newest_policy_rejects_images_without_a_creation_time() {
    let mut node = TestNode::new();
    node.resolve.tag_policy = TagPolicy::Newest;
    peers_with(&node, &[(1, 1, "yesterday"), (2, 2, "2026-03-01T00:00:00Z")]).await;
    assert!(matches!(find(&node, IMAGE).await, Err(RecoverError::TagDisagreement { .. })));
}

#[tokio::test(start_paused = true)]
async fn an_answer_of_the_source_registry_resolves_a_tag() {
    let mut node = TestNode::new();
    node.resolve.ask_registry = true;
    node.resolve.pull_secret_namespaces = vec!["shop".into()];
    let images = [(1, 1, "2026-01-01T00:00:00Z"), (2, 2, "2026-01-02T00:00:00Z")];
    let image_digests = peers_with(&node, &images).await;
    let reference: Reference = IMAGE.parse().unwrap();
    assert!(
        matches!(find(&node, IMAGE).await, Err(RecoverError::TagDisagreement { .. })),
        "the registry is down, so peers decide"
    );
    let secret = PullSecret(b"ours".to_vec());
    node.registry.put_private_tag(reference.repository(), "v1", image_digests[1], secret.clone());
    node.cluster.put_pull_secret("shop", "key", secret.clone());
    node.cluster.put_pull_secret("bank", "key", secret);
    let with_secret_of =
        |namespace: &str| RecoveryRequest { pull_secrets: vec![(namespace.into(), "key".into())], ..request(IMAGE) };
    let found = node.recoverer().find(&with_secret_of("shop")).await.unwrap();
    assert_eq!(found.digest, image_digests[1]);
    let unread = node.recoverer().find(&with_secret_of("bank")).await;
    assert!(
        matches!(unread, Err(RecoverError::TagDisagreement { .. })),
        "the options exclude secrets of this namespace: {unread:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_digest_of_another_repository_is_recovered_only_with_any_repository() {
    let mut node = TestNode::new();
    let image = node.add_provider(1, IMAGE, Behaviour::Honest).await;
    let invented = format!("invented.test:5000/other/app@{}", image.target.digest);
    assert!(matches!(find(&node, &invented).await, Err(RecoverError::NoProvider { .. })));
    node.resolve.any_repository = true;
    assert_eq!(find(&node, &invented).await.unwrap().providers, [peer(1)]);
}

#[tokio::test(start_paused = true)]
async fn an_image_with_a_blob_without_provider_is_not_fetched() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[IMAGE.to_owned()], &[3000, 200], 7).await.unwrap();
    node.announce_store(1, store, Behaviour::Honest).await;
    let layer = image.blobs[1].digest;
    node.inventory.apply(MeshEvent::Changed(peer(1), vec![InventoryChange::Removed(InventoryItem::Blob(layer))]));
    let rejected = node.recoverer().recover(&request(IMAGE), &Progress::default(), &CancellationToken::new()).await;
    let Err(RecoverError::BlobsWithoutProvider { blobs, .. }) = rejected else { panic!("{rejected:?}") };
    assert_eq!(blobs, [layer]);
    assert_eq!(node.fetcher.served(), [(peer(1), image.target.digest)], "no byte of a layer is fetched");
    assert_eq!(node.store.pins(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_store_that_refuses_imports_gets_no_recovery() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.imports.send_replace(ImportPermission::Refused("there are verifiers".into()));
    let rejected = find(&node, IMAGE).await.unwrap_err();
    assert!(rejected.to_string().contains("there are verifiers"), "{rejected}");
}

#[tokio::test(start_paused = true)]
async fn a_store_without_an_answer_about_imports_is_asked_again_by_the_retry() {
    let node = TestNode::new();
    node.add_provider(1, IMAGE, Behaviour::Honest).await;
    node.imports.send_replace(ImportPermission::Unknown);
    let failed = find(&node, IMAGE).await.unwrap_err();
    assert!(failed.to_string().contains("check that containerd runs"), "{failed}");
    assert_eq!(failed.queue_end(), RecoveryEnd::Failed);
    assert!(failed.class().pull_failure.is_retryable());
    node.imports.send_replace(ImportPermission::Allowed);
    assert!(find(&node, IMAGE).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn an_image_with_a_layer_that_must_not_be_distributed_is_rejected_with_the_reason() {
    let node = TestNode::new();
    let store = Arc::new(MemoryStore::new());
    let recipe = Recipe { layers: vec![100], foreign: true, ..Recipe::default() };
    make_image(&*store, &[IMAGE.to_owned()], &recipe, 1).await.unwrap();
    node.announce_store(1, store, Behaviour::Honest).await;
    let rejected = node.recoverer().recover(&request(IMAGE), &Progress::default(), &CancellationToken::new()).await;
    let Err(error @ RecoverError::NotDistributable { .. }) = rejected else { panic!("{rejected:?}") };
    assert!(error.to_string().contains("license"), "{error}");
    assert!(node.record_names().await.is_empty());
}
