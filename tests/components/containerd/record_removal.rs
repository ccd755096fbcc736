//! Removal of an image record.

use std::path::Path;

use containerd_client::tonic::Request;
use containerd_client::tonic::client::Grpc;
use containerd_client::tonic::codegen::http::uri::PathAndQuery;
use lighterman::oci::Digest;
use lighterman::ports::{ImageRecord, ImageRecords, Pins};
use tonic_prost::ProstCodec;

use super::daemon::Daemon;
use super::{HOUR, image};

/// Whether CRI has the image, by the kubelet's call `ImageStatus`. Only the presence of an image in
/// the response matters.
async fn cri_has(socket: &Path, name: &str) -> bool {
    #[derive(Clone, PartialEq, prost::Message)]
    struct ImageStatusRequest {
        #[prost(message, optional, tag = "1")]
        image: Option<ImageSpec>,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct ImageSpec {
        #[prost(string, tag = "1")]
        image: String,
    }
    #[derive(Clone, PartialEq, prost::Message)]
    struct ImageStatusResponse {
        #[prost(message, optional, tag = "1")]
        image: Option<()>,
    }
    let mut client = Grpc::new(containerd_client::connect(socket).await.unwrap());
    client.ready().await.unwrap();
    let request = Request::new(ImageStatusRequest { image: Some(ImageSpec { image: name.into() }) });
    let method = PathAndQuery::from_static("/runtime.v1.ImageService/ImageStatus");
    let response: ImageStatusResponse =
        client.unary(request, method, ProstCodec::default()).await.unwrap().into_inner();
    response.image.is_some()
}

pub(crate) async fn a_record_is_removed_when_cri_has_noticed_it(version: &str) {
    let daemon = Daemon::start(version).await;
    let (config, store) = (daemon.config("k8s.io"), daemon.store("k8s.io"));
    let pin = store.pin(HOUR).await.unwrap();
    let (target, _) = image(&store, &pin, "amd64").await;
    // The CRI plugin notices records with a delay, and a store that does not wait often passes one
    // round. So there are 20 rounds.
    for round in 0..20 {
        let name = format!("example.org/team/app:{round}");
        store.put_image(&ImageRecord { name: name.clone(), target: target.clone() }).await.unwrap();
        store.remove_image(&name, Digest::of(b"another target")).await.unwrap();
        assert!(cri_has(&config.socket, &name).await, "round {round}: the record has another target and stays");
        store.remove_image(&name, target.digest).await.unwrap();
        assert!(!cri_has(&config.socket, &name).await, "round {round}: CRI reports a removed image");
    }
}
