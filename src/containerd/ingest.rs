//! An ingest of containerd receives a stream of messages to a *ref*, and answers each message.
//! containerd keeps the bytes of a ref that is neither committed nor aborted. A new write aborts
//! the ref first, because no part of a blob is kept without a proof of the whole blob.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use containerd_client::services::v1::{
    AbortRequest, ListStatusesRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_client::tonic::{Code, Status, Streaming};
use parking_lot::MutexGuard;
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;

use super::client::{MESSAGE_DEADLINE, with_deadline};
use super::{ContainerdStore, State};
use crate::oci::Digest;
use crate::ports::{BlobMetadata, Pin, StoreError};
use crate::util::backoff::Backoff;

/// Prefix of the agent's refs; the digest follows.
const REF_PREFIX: &str = "lighterman-";

/// Queued messages, so that containerd always has a next message. Bounds a writer's memory,
/// together with the message that is being filled and the connection's buffer.
const IN_FLIGHT: usize = 2;

/// Pauses between retries. After a cancelled stream containerd writes its buffered bytes:
/// milliseconds, or as long as a busy disk takes. All pauses together are two seconds.
pub(super) const SETTLING: Backoff = Backoff { first: Duration::from_millis(4), longest: Duration::from_millis(1024) };
pub(super) const SETTLING_RETRIES: u32 = 9;

/// A commit syncs the file. The kernel's dirty limits bound the unwritten bytes by a fifth of
/// memory: some gigabytes at 50 MB/s.
pub(super) const COMMIT_DEADLINE: Duration = Duration::from_secs(120);

/// Exclusive right to write a blob.
pub(super) struct IngestSlot {
    store: ContainerdStore,
    digest: Digest,
    /// containerd may have bytes of the ref.
    has_leftover: AtomicBool,
}

impl IngestSlot {
    pub(super) fn take(store: &ContainerdStore, digest: Digest) -> Result<Self, StoreError> {
        let slot = || Self { store: store.clone(), digest, has_leftover: AtomicBool::new(false) };
        store.state.being_written().insert(digest).then(slot).ok_or(StoreError::Busy(digest))
    }

    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    fn set_leftover(&self, has_leftover: bool) {
        self.has_leftover.store(has_leftover, Ordering::Relaxed);
    }
}

impl Drop for IngestSlot {
    fn drop(&mut self) {
        self.store.state.being_written().remove(&self.digest);
        if *self.has_leftover.get_mut() {
            self.store.state.abandoned.notify_one();
        }
    }
}

impl State {
    fn being_written(&self) -> MutexGuard<'_, HashSet<Digest>> {
        self.writing.lock()
    }
}

/// An open write.
pub(super) struct WriteStream {
    pub(super) messages: mpsc::Sender<WriteContentRequest>,
    pub(super) answers: Streaming<WriteContentResponse>,
    /// Bytes that containerd offers: all or none, because the ref was aborted before.
    pub(super) offered: u64,
}

impl WriteStream {
    /// Declines the offer with an empty write. containerd then continues with the file of an
    /// earlier attempt, which an abort leaves if a copy was offered to that attempt. The next
    /// message has offset 0 and truncates the file.
    pub(super) async fn decline(&mut self, request: WriteContentRequest) -> Result<(), Status> {
        let exchange = async {
            let _ = self.messages.send(request).await;
            self.answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))
        };
        with_deadline(MESSAGE_DEADLINE, exchange).await.map(|_| ())
    }

    /// Commits the offered bytes, with these labels.
    pub(super) async fn accept(
        mut self,
        digest: Digest,
        size: u64,
        labels: HashMap<String, String>,
    ) -> Result<(), Status> {
        let request = WriteContentRequest {
            offset: size.cast_signed(),
            labels,
            ..write_request(WriteAction::Commit, digest, size)
        };
        let _ = self.messages.send(request).await;
        let accepted = async { self.answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended")) };
        with_deadline(COMMIT_DEADLINE, accepted).await.map(|_| ())
    }
}

pub(super) fn write_request(action: WriteAction, digest: Digest, size: u64) -> WriteContentRequest {
    WriteContentRequest {
        action: action.into(),
        r#ref: ref_of(digest),
        total: size.cast_signed(),
        expected: digest.to_string(),
        ..WriteContentRequest::default()
    }
}

impl ContainerdStore {
    /// Opens a write that the pin holds. Earlier bytes of the ref are deleted.
    ///
    /// # Errors
    /// [`StoreError::AlreadyExists`] when the complete blob exists; the pin then holds the blob.
    pub(super) async fn open_write(&self, slot: &IngestSlot, size: u64, pin: &Pin) -> Result<WriteStream, StoreError> {
        let digest = slot.digest;
        let unknown_pin = || StoreError::Other(format!("the pin {} is gone", pin.0));
        let lease: MetadataValue<Ascii> = self.state.renewals.lease(pin)?.parse().map_err(|_| unknown_pin())?;
        let _guard = self.state.begin_lock.lock().await;
        self.abort(digest).await?;
        slot.set_leftover(true);
        let is_locked = |status: &Status| matches!(self.client.blob_error(digest, status), StoreError::Busy(_));
        let open = || retry_until_settled(is_locked, || self.open_stream(digest, size, Some(&lease)));
        let mut opened = open().await;
        if opened.as_ref().is_err_and(|status| status.code() == Code::AlreadyExists)
            && self.find_blob(digest).await?.is_none()
        {
            tracing::warn!(%digest, "containerd has a record of the blob, but not its bytes; the blob is written again");
            self.discard_blob(digest, pin).await?;
            opened = open().await;
        }
        match opened {
            Ok(stream) => Ok(stream),
            Err(status) if status.code() == Code::NotFound => Err(unknown_pin()),
            Err(status) => {
                slot.set_leftover(status.code() != Code::AlreadyExists);
                Err(self.client.blob_error(digest, &status))
            }
        }
    }

    /// containerd answers `AlreadyExists` to a recorded digest, and adds that blob to the lease in
    /// the same transaction (metadata/content.go, `Writer`).
    pub(super) async fn open_stream(
        &self,
        digest: Digest,
        size: u64,
        lease: Option<&MetadataValue<Ascii>>,
    ) -> Result<WriteStream, Status> {
        let (messages, queued) = mpsc::channel(IN_FLIGHT);
        messages.try_send(write_request(WriteAction::Stat, digest, size)).expect("an empty channel has room");
        let mut request = self.client.request(ReceiverStream::new(queued));
        if let Some(lease) = lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        // The answer confirms the lock on the ref.
        let opened = async {
            let mut answers = self.client.content().write(request).await?.into_inner();
            let answer = answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))?;
            Ok(WriteStream { messages, answers, offered: answer.offset.cast_unsigned() })
        };
        with_deadline(MESSAGE_DEADLINE, opened).await
    }

    /// Handles the result of a commit. The ref is empty when containerd made the blob, or had the
    /// blob before.
    pub(super) async fn finish_commit(
        &self,
        slot: &IngestSlot,
        committed: Result<(), Status>,
        metadata: &BlobMetadata,
    ) -> Result<(), StoreError> {
        match committed {
            Ok(()) => {}
            // Another client, perhaps the kubelet, committed first. The lease holds the blob, but
            // the labels of this commit are lost.
            Err(status) if status.code() == Code::AlreadyExists => self.add_labels(slot.digest, metadata).await?,
            Err(status) => return Err(self.client.blob_error(slot.digest, &status)),
        }
        slot.set_leftover(false);
        self.record_change();
        Ok(())
    }

    /// Deletes the bytes of the ref, if any.
    pub(super) async fn abort(&self, digest: Digest) -> Result<(), StoreError> {
        let abort = || async {
            let request = self.client.request(AbortRequest { r#ref: ref_of(digest) });
            self.client.call(self.client.content().abort(request)).await
        };
        // The last stream created a file in the ref's folder during the removal. containerd then
        // undoes the abort.
        let is_refilled = |status: &Status| status.code() == Code::Unknown;
        match retry_until_settled(is_refilled, abort).await {
            Err(status) if status.code() != Code::NotFound => Err(self.client.blob_error(digest, &status)),
            _ => Ok(()),
        }
    }

    /// Aborts the agent's refs without a writer: of dropped writers and of killed processes.
    pub(super) async fn sweep_abandoned(&self) -> Result<(), StoreError> {
        let filters = vec![format!("ref~=\"^{REF_PREFIX}\"")];
        let request = self.client.request(ListStatusesRequest { filters });
        let listed = self.client.call(self.client.content().list_statuses(request)).await;
        for status in listed.map_err(|status| self.client.store_error(&status))?.statuses {
            let Some(Ok(digest)) = status.r#ref.strip_prefix(REF_PREFIX).map(str::parse) else { continue };
            let _guard = self.state.begin_lock.lock().await;
            let is_written = self.state.being_written().contains(&digest);
            if !is_written {
                self.abort(digest).await?;
            }
        }
        Ok(())
    }
}

/// Retries until containerd has detected the end of the last stream on the ref.
async fn retry_until_settled<T, F: Future<Output = Result<T, Status>>>(
    is_unsettled: impl Fn(&Status) -> bool,
    attempt: impl Fn() -> F,
) -> Result<T, Status> {
    for failures in 0..SETTLING_RETRIES {
        match attempt().await {
            Err(status) if is_unsettled(&status) => sleep(SETTLING.wait(failures)).await,
            settled => return settled,
        }
    }
    attempt().await
}

fn ref_of(digest: Digest) -> String {
    format!("{REF_PREFIX}{digest}")
}
