//! The connection to containerd, and what every call shares.

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

/// For one small call. containerd answers in milliseconds; while its metadata is locked for collecting or syncing to a slow
/// disk, in a few seconds. The kubelet gives its own calls two minutes, which is too long for us: a recovery could go on elsewhere.
const CALL_DEADLINE: Duration = Duration::from_secs(10);

/// A Unix socket connects at once or not at all, unless containerd hangs and its backlog is full.
const CONNECT_DEADLINE: Duration = Duration::from_secs(2);

/// Read messages carry at most 1 MiB: one on the way while one is being consumed.
const STREAM_WINDOW: u32 = 2 << 20;

/// For all streams together. A reader that stops reading keeps its stream's window from the others, so this is room for 16 of them.
const CONNECTION_WINDOW: u32 = 16 * STREAM_WINDOW;

/// What containerd itself accepts and sends by default (`max_recv_message_size`, `max_send_message_size`); lists of images and
/// content can be that long.
pub(super) const MAX_MESSAGE: usize = 16 << 20;

#[derive(Clone)]
pub(super) struct ContainerdClient {
    channel: Channel,
    socket: PathBuf,
    namespace: MetadataValue<Ascii>,
}

impl ContainerdClient {
    pub(super) fn new(socket: PathBuf, namespace: &str) -> Result<Self, ConfigError> {
        let unusable = || ConfigError::Namespace(namespace.to_owned());
        // containerd: identifiers.Validate. It also keeps the name from meaning anything in a filter.
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if namespace.is_empty() || namespace.len() > 76 || !namespace.bytes().all(plain) {
            return Err(unusable());
        }
        let namespace = namespace.parse().map_err(|_| unusable())?;
        let path = socket.to_str().ok_or_else(|| ConfigError::Socket(socket.clone()))?;
        // No HTTP/2 keep-alive: a Unix socket does not go silent, and gRPC's servers disconnect who pings within five minutes.
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

    /// The containerd namespace.
    pub(super) fn namespace(&self) -> &str {
        self.namespace.to_str().expect("it was parsed from text")
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

    /// The message, for our namespace.
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

    /// What a failure means, when it is about no blob in particular.
    pub(super) fn store_error(&self, status: &Status) -> StoreError {
        classify(&self.socket, None, status)
    }

    /// What a failure means for this blob.
    pub(super) fn blob_error(&self, digest: Digest, status: &Status) -> StoreError {
        classify(&self.socket, Some(digest), status)
    }
}

/// Gives up after a while, as if containerd had.
pub(super) async fn with_deadline<T>(
    deadline: Duration,
    answer: impl Future<Output = Result<T, Status>>,
) -> Result<T, Status> {
    let silent = |_| Err(Status::deadline_exceeded(format!("no answer within {} s", deadline.as_secs())));
    tokio::time::timeout(deadline, answer).await.unwrap_or_else(silent)
}
