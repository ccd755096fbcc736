//! Image records that the kubelet's image collection skips, because CRI reports them as pinned.

use std::path::Path;

use containerd_client::tonic::Request;
use containerd_client::tonic::client::Grpc;
use containerd_client::tonic::codegen::http::uri::PathAndQuery;
use lighterman::containerd::ContainerdStore;
use lighterman::oci::{Digest, Reference};
use lighterman::ports::{ImageRecord, ImageRecords, Pins, ProtectedImages};
use tokio::time::timeout;
use tonic_prost::ProstCodec;

use super::daemon::Daemon;
use super::discarding::{LoopbackRegistry, pull};
use super::{HOUR, WAIT_DEADLINE, image};

/// Names that CRI's `ListImages` reports as pinned. The kubelet's image collection reads this list.
async fn pinned_images(socket: &Path) -> Vec<String> {
    #[derive(Clone, PartialEq, prost::Message)]
    struct ListImagesRequest {}
    #[derive(Clone, PartialEq, prost::Message)]
    struct ListImagesResponse {
        #[prost(message, repeated, tag = "1")]
        images: Vec<Image>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct Image {
        #[prost(string, repeated, tag = "2")]
        repo_tags: Vec<String>,
        #[prost(bool, tag = "8")]
        pinned: bool,
    }
    let mut client = Grpc::new(containerd_client::connect(socket).await.unwrap());
    client.ready().await.unwrap();
    let method = PathAndQuery::from_static("/runtime.v1.ImageService/ListImages");
    let response = client
        .unary(
            Request::new(ListImagesRequest {}),
            method,
            ProstCodec::<ListImagesRequest, ListImagesResponse>::default(),
        )
        .await;
    let images = response.unwrap().into_inner().images.into_iter();
    images.filter(|image| image.pinned).flat_map(|image| image.repo_tags).collect()
}

/// CRI follows containerd's events, so the list changes a moment later.
async fn wait_pinned(socket: &Path, names: &[&str]) {
    let reached = async {
        while pinned_images(socket).await != names {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    };
    if timeout(WAIT_DEADLINE, reached).await.is_err() {
        panic!("CRI reports {:?} as pinned, not {names:?}", pinned_images(socket).await);
    }
}

async fn put_record(store: &ContainerdStore, name: &str, platform: &str) -> (Reference, Digest) {
    let pin = store.pin(HOUR).await.unwrap();
    let (target, _) = image(store, &pin, platform).await;
    let digest = target.digest;
    store.put_image(&ImageRecord { name: name.into(), target }).await.unwrap();
    (name.parse().unwrap(), digest)
}

fn labels(daemon: &Daemon, name: &str) -> String {
    let listed = daemon.ctr("k8s.io", &["images", "ls", &format!("name=={name}")]);
    listed.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} is not in {listed}")).to_owned()
}

const NAME: &str = "example.org/team/lighterman:v1";

pub(crate) async fn a_protected_image_is_pinned_for_the_kubelet_until_it_is_released(version: &str) {
    let mut daemon = Daemon::start(version).await;
    let (socket, store) = (daemon.config("k8s.io").socket, daemon.store("k8s.io"));
    let (name, digest) = put_record(&store, NAME, "amd64").await;
    daemon.ctr("k8s.io", &["images", "label", NAME, "made.by=another-client"]);
    assert_eq!(pinned_images(&socket).await, Vec::<String>::new());

    store.protect_image(&name).await.unwrap();
    wait_pinned(&socket, &[NAME]).await;
    let protection = store.protected_images().await.unwrap();
    assert_eq!((protection.ours, protection.others.len()), ([name.clone()].into(), 0));
    // A recovery of the same name and a restart of containerd keep the protection.
    let target = store.images().await.unwrap().into_iter().find(|record| record.name == NAME).unwrap().target;
    assert_eq!(target.digest, digest, "the target stays");
    store.put_image(&ImageRecord { name: NAME.into(), target }).await.unwrap();
    wait_pinned(&socket, &[NAME]).await;
    daemon.kill();
    daemon.restart().await;
    wait_pinned(&socket, &[NAME]).await;

    store.release_image(&name).await.unwrap();
    wait_pinned(&socket, &[]).await;
    let left = labels(&daemon, NAME);
    assert!(left.contains("made.by=another-client") && !left.contains("lighterman.dev/protects"), "{left}");
    assert_eq!(store.protected_images().await.unwrap().all(), [].into());
}

pub(crate) async fn a_pin_by_another_program_is_neither_marked_nor_ended(version: &str) {
    let daemon = Daemon::start(version).await;
    let (socket, store) = (daemon.config("k8s.io").socket, daemon.store("k8s.io"));
    let (name, _) = put_record(&store, NAME, "amd64").await;
    daemon.ctr("k8s.io", &["images", "label", NAME, "io.cri-containerd.pinned=pinned"]);
    store.protect_image(&name).await.unwrap();
    let protection = store.protected_images().await.unwrap();
    assert_eq!((protection.ours.len(), protection.others), (0, [name.clone()].into()));
    store.release_image(&name).await.unwrap();
    wait_pinned(&socket, &[NAME]).await;
}

pub(crate) async fn an_absent_record_is_neither_protected_nor_created(version: &str) {
    let daemon = Daemon::start(version).await;
    let store = daemon.store("k8s.io");
    let name: Reference = NAME.parse().unwrap();
    let error = store.protect_image(&name).await.unwrap_err();
    assert!(error.to_string().contains(NAME), "{error}");
    store.release_image(&name).await.unwrap();
    assert!(store.images().await.unwrap().is_empty());
}

/// A pull through CRI replaces every label of a record that exists (`createNewImage`, containerd
/// client). The agent sees that the record lacks the protection.
pub(crate) async fn a_protection_removed_by_a_pull_is_noticed_and_restored(version: &str) {
    let daemon = Daemon::start(version).await;
    let (socket, store) = (daemon.config("k8s.io").socket, daemon.store("k8s.io"));
    let registry = LoopbackRegistry::start().await;
    let (name, _) = registry.push().await;
    pull(&socket, &name).await;
    store.protect_image(&name.parse().unwrap()).await.unwrap();
    wait_pinned(&socket, &[&name]).await;
    let new_image = registry.push_as(&name).await;
    pull(&socket, &name).await;
    let records = store.images().await.unwrap();
    let record = records.iter().find(|record| record.name == name).unwrap();
    assert_eq!(record.target.digest, new_image.target.digest, "the pull moved the tag");
    wait_pinned(&socket, &[]).await;
    assert_eq!(store.protected_images().await.unwrap().all(), [].into());
    store.protect_image(&name.parse().unwrap()).await.unwrap();
    wait_pinned(&socket, &[&name]).await;
    assert_eq!(store.protected_images().await.unwrap().ours, [name.parse().unwrap()].into());
}
