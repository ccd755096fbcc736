//! Reads a blob through containerd, where the file cannot be seen.

use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::{ReadContentRequest, ReadContentResponse};
use containerd_client::tonic::Streaming;

use super::client::{ContainerdClient, MESSAGE_DEADLINE, with_deadline};
use crate::oci::Digest;
use crate::ports::{BlobReader, StoreError};

/// Bytes of one request. Large enough that requests do not count (a millisecond each, against 25 at
/// 300 MB/s). Small enough that a reader that jumps wastes only the bytes that containerd has sent
/// by then.
const WINDOW: u64 = 8 << 20;

pub(super) struct ApiReader {
    client: ContainerdClient,
    digest: Digest,
    size: u64,
    window: Option<Window>,
}

/// An answer that is being read.
struct Window {
    messages: Streaming<ReadContentResponse>,
    /// Offset of `left` in the blob.
    next: u64,
    /// End of the answer in the blob.
    end: u64,
    /// Received bytes that were not returned yet.
    buffered: Bytes,
}

impl ApiReader {
    pub(super) fn new(client: ContainerdClient, digest: Digest, size: u64) -> Self {
        Self { client, digest, size, window: None }
    }

    async fn window_at(&mut self, offset: u64) -> Result<Window, StoreError> {
        match self.window.take() {
            Some(window) if window.next == offset && window.next < window.end => Ok(window),
            _ => {
                let size = (self.size - offset).min(WINDOW);
                let request = ReadContentRequest {
                    digest: self.digest.to_string(),
                    offset: offset.cast_signed(),
                    size: size.cast_signed(),
                };
                let answer = self.client.call(self.client.content().read(self.client.request(request))).await;
                let messages = answer.map_err(|status| self.client.blob_error(self.digest, &status))?;
                Ok(Window { messages, next: offset, end: offset + size, buffered: Bytes::new() })
            }
        }
    }
}

#[async_trait]
impl BlobReader for ApiReader {
    fn size(&self) -> u64 {
        self.size
    }

    async fn read_at(&mut self, offset: u64, limit: usize) -> Result<Bytes, StoreError> {
        if offset >= self.size || limit == 0 {
            return Ok(Bytes::new());
        }
        let mut window = self.window_at(offset).await?;
        while window.buffered.is_empty() {
            let received = with_deadline(MESSAGE_DEADLINE, window.messages.message()).await;
            let message =
                received.map_err(|status| self.client.blob_error(self.digest, &status))?.ok_or_else(|| {
                    StoreError::Other(format!(
                        "containerd ended {} at byte {} of {}",
                        self.digest, window.next, self.size
                    ))
                })?;
            // Messages arrive in order, so `offset`, which counts from the start of the answer, is
            // not checked.
            window.buffered = message.data.into();
        }
        let read = window.buffered.split_to(window.buffered.len().min(limit));
        window.next += read.len() as u64;
        self.window = Some(window);
        Ok(read)
    }
}
