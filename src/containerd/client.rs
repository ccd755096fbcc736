//! The connection to containerd, shared by every call.

use std::path::{Path, PathBuf};
use std::time::Duration;

use containerd_client::services::v1::content_client::ContentClient;
use containerd_client::services::v1::images_client::ImagesClient;
use containerd_client::services::v1::leases_client::LeasesClient;
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_client::tonic::transport::{Channel, Endpoint};
use containerd_client::tonic::{Request, Response, Status};

use super::ConfigError;
use super::errors::classify;
use crate::oci::Digest;
use crate::ports::StoreError;

/// Deadline of one small call. containerd answers in milliseconds, and in a few seconds while its
/// metadata is locked for a collection or for a sync to a slow disk. The kubelet waits two minutes
/// for its own calls; a recovery can use that time better.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// Deadline of one message, in either direction: a disk that takes no megabyte in half a minute has
/// failed.
pub(super) const MESSAGE_DEADLINE: Duration = Duration::from_secs(30);

/// A Unix socket connects or fails at once, unless containerd hangs and its backlog is full.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Read messages carry at most 1 MiB: one is on the way while another is consumed.
const STREAM_WINDOW: u32 = 2 << 20;

/// Window of all streams together. A reader that stops occupies its stream's window, so 16 of them
/// fit.
const CONNECTION_WINDOW: u32 = 16 * STREAM_WINDOW;

/// containerd's default limits (`max_recv_message_size`, `max_send_message_size`). Lists of images
/// and of content can reach them.
pub(super) const MAX_MESSAGE: usize = 16 << 20;

#[derive(Clone)]
pub(super) struct ContainerdClient {
    channel: Channel,
    socket: PathBuf,
    namespace: MetadataValue<Ascii>,
}

impl ContainerdClient {
    pub(super) fn new(socket: PathBuf, namespace: &str) -> Result<Self, ConfigError> {
        let invalid_namespace = || ConfigError::Namespace(namespace.to_owned());
        // As containerd's `identifiers.Validate`. A valid name has no special meaning in a filter.
        let is_allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if namespace.is_empty() || namespace.len() > 76 || !namespace.bytes().all(is_allowed) {
            return Err(invalid_namespace());
        }
        let namespace = namespace.parse().map_err(|_| invalid_namespace())?;
        let path = socket.to_str().ok_or_else(|| ConfigError::Socket(socket.clone()))?;
        // No HTTP/2 keep-alive: a Unix socket does not go silent, and gRPC servers disconnect
        // clients that ping more often than every five minutes.
        let endpoint = Endpoint::from_shared(format!("unix:{path}"))
            .map_err(|_| ConfigError::Socket(socket.clone()))?
            .connect_timeout(CONNECT_DEADLINE)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW);
        Ok(Self { channel: endpoint.connect_lazy(), socket, namespace })
    }

    pub(super) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    pub(super) fn socket(&self) -> &Path {
        &self.socket
    }

    pub(super) fn namespace(&self) -> &str {
        self.namespace.to_str().expect("the namespace was parsed from text")
    }

    pub(super) fn content(&self) -> ContentClient<Channel> {
        ContentClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub(super) fn images(&self) -> ImagesClient<Channel> {
        ImagesClient::new(self.channel()).max_decoding_message_size(MAX_MESSAGE)
    }

    pub(super) fn leases(&self) -> LeasesClient<Channel> {
        LeasesClient::new(self.channel())
    }

    /// A request in the configured containerd namespace.
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.clone());
        request
    }

    /// Waits for a small answer.
    pub(super) async fn call<T>(&self, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Status> {
        self.call_within(CALL_DEADLINE, call).await
    }

    pub(super) async fn call_within<T>(
        &self,
        deadline: Duration,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        with_deadline(deadline, call).await.map(Response::into_inner)
    }

    /// Classifies a failure that concerns no single blob.
    pub(super) fn store_error(&self, status: &Status) -> StoreError {
        classify(&self.socket, None, status)
    }

    /// Classifies a failure of a call about this blob.
    pub(super) fn blob_error(&self, digest: Digest, status: &Status) -> StoreError {
        classify(&self.socket, Some(digest), status)
    }
}

/// Fails after the deadline with containerd's own code for that.
pub(super) async fn with_deadline<T>(
    deadline: Duration,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let timed_out = |_| Err(Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs())));
    tokio::time::timeout(deadline, answer).await.unwrap_or_else(timed_out)
}
