//! Calls to the CRI plugin: its configuration, its snapshotter's folder, and its images.
//! containerd-client has no types for CRI, so this file defines them.

use std::collections::HashMap;

use containerd_client::tonic::client::Grpc;
use containerd_client::tonic::codegen::http::uri::PathAndQuery;
use containerd_client::tonic::{Code, Status};
use serde_json::Value;
use tonic_prost::ProstCodec;

use super::ContainerdStore;
use crate::ports::StoreError;

/// CRI's `StatusRequest` (cri-api, `runtime/v1/api.proto`).
#[derive(Clone, PartialEq, prost::Message)]
struct StatusRequest {
    /// Requests `info` as well.
    #[prost(bool, tag = "1")]
    verbose: bool,
}

/// CRI's `StatusResponse`, without the conditions.
#[derive(Clone, PartialEq, prost::Message)]
struct StatusResponse {
    #[prost(map = "string, string", tag = "2")]
    info: HashMap<String, String>,
}

/// CRI's `ImageStatusRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageStatusRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// CRI's `ImageSpec`, only with the name.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// CRI's `ImageStatusResponse`. No image means that the plugin has none of that name.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageStatusResponse {
    #[prost(message, optional, tag = "1")]
    image: Option<Image>,
}

/// CRI's `Image`, without fields: only its presence matters.
#[derive(Clone, PartialEq, prost::Message)]
struct Image {}

/// CRI's `ImageFsInfoRequest`.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageFsInfoRequest {}

/// CRI's `ImageFsInfoResponse`, without containers' file systems.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageFsInfoResponse {
    /// The first is the file system of the snapshotter that images are unpacked into
    /// (`imagefs_info.go`).
    #[prost(message, repeated, tag = "1")]
    image_filesystems: Vec<FilesystemUsage>,
}

/// CRI's `FilesystemUsage`, without the used bytes.
#[derive(Clone, PartialEq, prost::Message)]
struct FilesystemUsage {
    #[prost(message, optional, tag = "2")]
    fs_id: Option<FilesystemIdentifier>,
}

/// CRI's `FilesystemIdentifier`.
#[derive(Clone, PartialEq, prost::Message)]
struct FilesystemIdentifier {
    #[prost(string, tag = "1")]
    mountpoint: String,
}

/// The plugin's configuration is some kilobytes of JSON, and more with many registries and
/// runtimes. An image with its names is less.
const MAX_RESPONSE: usize = 1 << 20;

impl ContainerdStore {
    /// The plugin's configuration in force; `Null` without a CRI plugin.
    pub(super) async fn cri_configuration(&self) -> Result<Value, StoreError> {
        match self.call_cri("/runtime.v1.RuntimeService/Status", StatusRequest { verbose: true }).await {
            Ok(StatusResponse { info }) => {
                let configuration = info.get("config").and_then(|json| serde_json::from_str(json).ok());
                Ok(configuration.unwrap_or_default())
            }
            Err(status) if status.code() == Code::Unimplemented => Ok(Value::Null),
            Err(status) => Err(self.client.store_error(&status)),
        }
    }

    /// The folder that images are unpacked into.
    pub(super) async fn cri_image_file_system(&self) -> Result<Option<String>, StoreError> {
        let response = self.call_cri("/runtime.v1.ImageService/ImageFsInfo", ImageFsInfoRequest {}).await;
        let ImageFsInfoResponse { image_filesystems } = response.map_err(|status| self.client.store_error(&status))?;
        let first = image_filesystems.into_iter().next().and_then(|usage| usage.fs_id);
        Ok(first.map(|id| id.mountpoint).filter(|mountpoint| !mountpoint.is_empty()))
    }

    /// Whether CRI lists the image; the kubelet makes the same call before a pull.
    pub(super) async fn cri_has_image(&self, name: &str) -> Result<bool, Status> {
        let request = ImageStatusRequest { image: Some(ImageSpec { image: name.to_owned() }) };
        let ImageStatusResponse { image } = self.call_cri("/runtime.v1.ImageService/ImageStatus", request).await?;
        Ok(image.is_some())
    }

    async fn call_cri<Q, A>(&self, method: &'static str, message: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let exchange = async {
            let mut client = Grpc::new(self.client.channel()).max_decoding_message_size(MAX_RESPONSE);
            client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
            let request = self.client.request(message);
            client.unary(request, PathAndQuery::from_static(method), ProstCodec::<Q, A>::default()).await
        };
        self.client.call(exchange).await
    }
}
