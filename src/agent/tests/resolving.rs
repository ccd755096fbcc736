//! What a reference means and who may be asked for it.

use tokio_util::sync::CancellationToken;

use super::*;
use crate::agent::progress::Progress;
use crate::agent::recover::{Found, RecoverError};
use crate::agent::resolve::Wanted;
use crate::decide::tag::TagPolicy;
use crate::ports::PullSecret;
use crate::testing::image::{Recipe, make_image};

fn wanted(name: &str) -> Wanted {
    name.parse::<Reference>().unwrap().into()
}

async fn find(harbour: &Harbour, name: &str) -> Result<Found, RecoverError> {
    harbour.recoverer().find(&wanted(name)).await
}

/// Peers that hold images of this one name, one image for each seed, built at the time given.
async fn peers_with(harbour: &Harbour, images: &[(u8, u8, &str)]) -> Vec<Digest> {
    let mut roots = Vec::new();
    for (number, seed, created) in images {
        let store = Arc::new(MemoryStore::new());
        let recipe = Recipe { layers: vec![100], created: Some((*created).to_owned()), ..Recipe::default() };
        let image = make_image(&*store, &[IMAGE.to_owned()], &recipe, u64::from(*seed)).await.unwrap();
        roots.push(image.root.digest);
        harbour.announce(*number, store, Behaviour::Honest).await;
    }
    roots
}

#[tokio::test(start_paused = true)]
async fn peers_that_disagree_on_a_tag_are_settled_by_the_policy_alone() {
    let images = [(1, 1, "2026-01-01T00:00:00Z"), (2, 1, "2026-01-01T00:00:00Z"), (3, 2, "2026-03-01T00:00:00+02:00")];
    for (policy, expected) in
        [(TagPolicy::Unanimous, None), (TagPolicy::MostCommon, Some(0)), (TagPolicy::Newest, Some(2))]
    {
        let mut harbour = Harbour::new();
        harbour.resolve.tag_policy = policy;
        let roots = peers_with(&harbour, &images).await;
        match (find(&harbour, IMAGE).await, expected) {
            (Ok(found), Some(expected)) => assert_eq!(found.root, roots[expected], "{policy:?}"),
            (Err(RecoverError::Disagreement { meanings, .. }), None) => {
                assert_eq!(meanings.iter().map(|(_, peers)| peers).sum::<usize>(), 3);
            }
            (other, _) => panic!("{policy:?}: {other:?}"),
        }
        assert!(blobs_of(&*harbour.store).await.is_empty(), "looking keeps nothing");
    }
}

#[tokio::test(start_paused = true)]
async fn the_newest_is_not_guessed_where_images_do_not_say_when_they_were_built() {
    let mut harbour = Harbour::new();
    harbour.resolve.tag_policy = TagPolicy::Newest;
    peers_with(&harbour, &[(1, 1, "yesterday"), (2, 2, "2026-03-01T00:00:00Z")]).await;
    assert!(matches!(find(&harbour, IMAGE).await, Err(RecoverError::Disagreement { .. })));
}

#[tokio::test(start_paused = true)]
async fn the_source_registry_decides_a_tag_where_it_is_asked_and_answers() {
    let mut harbour = Harbour::new();
    harbour.resolve.ask_registry = true;
    harbour.resolve.pull_secret_namespaces = vec!["shop".into()];
    let images = [(1, 1, "2026-01-01T00:00:00Z"), (2, 2, "2026-01-02T00:00:00Z")];
    let roots = peers_with(&harbour, &images).await;
    let reference: Reference = IMAGE.parse().unwrap();
    assert!(matches!(find(&harbour, IMAGE).await, Err(RecoverError::Disagreement { .. })), "it is down: peers decide");
    let ours = PullSecret(b"ours".to_vec());
    harbour.registry.put_private_tag(reference.repository(), "v1", roots[1], ours.clone());
    harbour.cluster.put_pull_secret("shop", "key", ours.clone());
    harbour.cluster.put_pull_secret("bank", "key", ours);
    let shown = |namespace: &str| Wanted { pull_secrets: vec![(namespace.into(), "key".into())], ..wanted(IMAGE) };
    let found = harbour.recoverer().find(&shown("shop")).await.unwrap();
    assert_eq!(found.root, roots[1]);
    let unread = harbour.recoverer().find(&shown("bank")).await;
    assert!(
        matches!(unread, Err(RecoverError::Disagreement { .. })),
        "that namespace did not give the right: {unread:?}"
    );
}

#[tokio::test(start_paused = true)]
async fn a_digest_is_a_permission_only_where_the_cluster_says_so() {
    let mut harbour = Harbour::new();
    let image = harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    let invented = format!("invented.test:5000/other/app@{}", image.root.digest);
    assert!(matches!(find(&harbour, &invented).await, Err(RecoverError::NoProvider { .. })));
    harbour.resolve.any_repository = true;
    assert_eq!(find(&harbour, &invented).await.unwrap().providers, [peer(1)]);
}

#[tokio::test(start_paused = true)]
async fn an_image_that_nobody_holds_whole_is_not_begun() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    let image = put_image(&*store, &[IMAGE.to_owned()], &[3000, 200], 7).await.unwrap();
    harbour.announce(1, store, Behaviour::Honest).await;
    let layer = image.blobs[1].digest;
    harbour.holders.apply(MeshEvent::Changed(peer(1), vec![ContentChange::Removed(Item::Blob(layer))]));
    let refused = harbour.recoverer().recover(&wanted(IMAGE), &Progress::default(), &CancellationToken::new()).await;
    let Err(RecoverError::NotHeld { blobs, .. }) = refused else { panic!("{refused:?}") };
    assert_eq!(blobs, [layer]);
    assert_eq!(harbour.fetcher.served(), [(peer(1), image.root.digest)], "not a byte of a layer moved");
    assert_eq!(harbour.store.pins(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_closed_store_takes_nothing() {
    let harbour = Harbour::new();
    harbour.peer_with(1, IMAGE, Behaviour::Honest).await;
    harbour.imports.send_replace(Imports::Refused("there are verifiers".into()));
    let refused = find(&harbour, IMAGE).await.unwrap_err();
    assert!(refused.to_string().contains("there are verifiers"), "{refused}");
}

#[tokio::test(start_paused = true)]
async fn an_image_with_a_layer_that_must_not_be_distributed_is_refused_with_the_reason() {
    let harbour = Harbour::new();
    let store = Arc::new(MemoryStore::new());
    let recipe = Recipe { layers: vec![100], foreign: true, ..Recipe::default() };
    make_image(&*store, &[IMAGE.to_owned()], &recipe, 1).await.unwrap();
    harbour.announce(1, store, Behaviour::Honest).await;
    let refused = harbour.recoverer().recover(&wanted(IMAGE), &Progress::default(), &CancellationToken::new()).await;
    let Err(error @ RecoverError::NotDistributable { .. }) = refused else { panic!("{refused:?}") };
    assert!(error.to_string().contains("licence"), "{error}");
    assert!(harbour.record_names().await.is_empty());
}
