//! Writing a blob through containerd.
//!
//! A write is a stream of messages to a *ref*, answered one by one. containerd keeps what was written to a ref that is neither committed nor
//! aborted; that is of no use here, because nothing of a blob is kept before all of it is proved, so it is thrown away.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::{
    AbortRequest, ListStatusesRequest, WriteAction, WriteContentRequest, WriteContentResponse,
};
use containerd_client::tonic::metadata::{Ascii, MetadataValue};
use containerd_client::tonic::{Code, Status, Streaming};
use tokio::sync::mpsc;
use tokio::time::sleep;
use tokio_stream::wrappers::ReceiverStream;

use super::client::with_deadline;
use super::labels::missing_labels;
use super::{ContainerdStore, State};
use crate::oci::{BlobProof, Digest};
use crate::ports::{BlobMetadata, BlobSink, Pin, StoreError};

/// Every ref of ours begins so; the digest follows.
const REF_PREFIX: &str = "lighterman-";

/// The data in one message. containerd refuses messages over 16 MiB; 4 and 8 were no faster (measured on 1.6), and each costs its size in
/// memory three times over.
pub(super) const MESSAGE_SIZE: usize = 1 << 20;

/// Messages that wait to be sent, so that containerd always has one to go on with. They bound a writer's memory, together with
/// the one being filled and what is in the connection's buffer.
const IN_FLIGHT: usize = 2;

/// For one message of a stream, either way: a disk that takes no megabyte in half a minute is not going to.
pub(super) const MESSAGE_DEADLINE: Duration = Duration::from_secs(30);

/// Once a stream is cancelled containerd writes out what it has of it: milliseconds, or what a busy disk takes. All pauses
/// together are two seconds.
const FIRST_PAUSE: Duration = Duration::from_millis(4);
const LAST_PAUSE: Duration = Duration::from_millis(1024);

/// Committing syncs the file. What the kernel has not written by then is bounded by its dirty limits, a fifth of memory: some gigabytes at 50 MB/s.
const COMMIT_DEADLINE: Duration = Duration::from_secs(120);

pub(super) struct ApiWriter {
    slot: Arc<IngestSlot>,
    size: u64,
    /// Bytes taken so far, sent or not.
    written: u64,
    /// Bytes that containerd has confirmed.
    confirmed: u64,
    /// The next message's data.
    filling: Vec<u8>,
    messages: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

/// The right to write a blob, given back when dropped.
pub(super) struct IngestSlot {
    store: ContainerdStore,
    digest: Digest,
    /// containerd may keep something for the ref.
    has_leftover: AtomicBool,
}

impl IngestSlot {
    pub(super) fn take(store: &ContainerdStore, digest: Digest) -> Result<Arc<Self>, StoreError> {
        let slot = || Arc::new(Self { store: store.clone(), digest, has_leftover: AtomicBool::new(false) });
        store.state.being_written().insert(digest).then(slot).ok_or(StoreError::Busy(digest))
    }

    pub(super) fn digest(&self) -> Digest {
        self.digest
    }

    fn set_leftover(&self, something: bool) {
        self.has_leftover.store(something, Ordering::Relaxed);
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
        self.writing.lock().expect("nothing panics while it holds the set")
    }
}

/// A write that was begun.
pub(super) struct WriteStream {
    messages: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
    /// Bytes that containerd says it has. It has all, or none: what it had of a ref of ours was aborted before.
    pub(super) offered: u64,
}

impl WriteStream {
    /// Declined, containerd goes on with the file that an attempt before may have left: aborting one to which a copy was offered leaves it.
    /// Zero bytes now, and the next zero offset empties it.
    async fn decline(&mut self, ask: WriteContentRequest) -> Result<(), Status> {
        let decline = async {
            let _ = self.messages.send(ask).await;
            self.answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))
        };
        with_deadline(MESSAGE_DEADLINE, decline).await.map(|_| ())
    }

    /// Accepts what is offered, with these labels.
    pub(super) async fn accept(
        mut self,
        digest: Digest,
        size: u64,
        labels: HashMap<String, String>,
    ) -> Result<(), Status> {
        let accept = WriteContentRequest {
            offset: size.cast_signed(),
            labels,
            ..write_request(WriteAction::Commit, digest, size)
        };
        let _ = self.messages.send(accept).await;
        let accepted = async { self.answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended")) };
        with_deadline(COMMIT_DEADLINE, accepted).await.map(|_| ())
    }
}

fn write_request(action: WriteAction, digest: Digest, size: u64) -> WriteContentRequest {
    WriteContentRequest {
        action: action.into(),
        r#ref: ref_of(digest),
        total: size.cast_signed(),
        expected: digest.to_string(),
        ..WriteContentRequest::default()
    }
}

impl ContainerdStore {
    pub(super) async fn begin_write(
        &self,
        slot: Arc<IngestSlot>,
        size: u64,
        pin: &Pin,
    ) -> Result<ApiWriter, StoreError> {
        let digest = slot.digest;
        let mut pause = FIRST_PAUSE;
        let stream = loop {
            let mut stream = self.open_write(&slot, size, pin).await?;
            // Another namespace has the blob, or its file is there without a record, and it is offered unseen.
            if stream.offered == 0 {
                break stream;
            }
            let declined = stream.decline(write_request(WriteAction::Write, digest, size)).await;
            match declined.map_err(|status| self.link.blob_error(digest, &status)) {
                Ok(()) => break stream,
                // The offer came before containerd had noticed that the last stream on the ref is gone.
                Err(StoreError::Busy(_)) if pause <= LAST_PAUSE => sleep(pause).await,
                Err(error) => return Err(error),
            }
            pause *= 2;
        };
        let filling = Vec::with_capacity(MESSAGE_SIZE.min(usize::try_from(size).unwrap_or(MESSAGE_SIZE)));
        let WriteStream { messages, answers, offered: _ } = stream;
        Ok(ApiWriter { slot, size, written: 0, confirmed: 0, filling, messages, answers })
    }

    /// Begins a write that the pin holds; what was written to the ref before is thrown away.
    ///
    /// # Errors
    /// [`StoreError::AlreadyThere`] when the whole blob is there; the pin holds it then.
    pub(super) async fn open_write(&self, slot: &IngestSlot, size: u64, pin: &Pin) -> Result<WriteStream, StoreError> {
        let digest = slot.digest;
        let gone = || StoreError::Other(format!("the pin {} is gone", pin.0));
        let lease: MetadataValue<Ascii> = self.state.renewals.lease(pin)?.parse().map_err(|_| gone())?;
        let _alone = self.state.begin_lock.lock().await;
        self.abort(digest).await?;
        slot.set_leftover(true);
        let locked = |status: &Status| matches!(self.link.blob_error(digest, status), StoreError::Busy(_));
        let open = || retry_until_settled(locked, || self.open_stream(digest, size, Some(&lease)));
        let mut opened = open().await;
        if opened.as_ref().is_err_and(|status| status.code() == Code::AlreadyExists)
            && self.find_blob(digest).await?.is_none()
        {
            tracing::warn!(%digest, "containerd has a record of the blob but not its bytes; it is written again");
            self.discard_blob(digest, pin).await?;
            opened = open().await;
        }
        match opened {
            Ok(stream) => Ok(stream),
            Err(status) if status.code() == Code::NotFound => Err(gone()),
            Err(status) => {
                slot.set_leftover(status.code() != Code::AlreadyExists);
                Err(self.link.blob_error(digest, &status))
            }
        }
    }

    /// containerd answers `AlreadyExists` to an expected digest that it has, and adds that blob to the lease in the same
    /// transaction (metadata/content.go, `Writer`).
    pub(super) async fn open_stream(
        &self,
        digest: Digest,
        size: u64,
        lease: Option<&MetadataValue<Ascii>>,
    ) -> Result<WriteStream, Status> {
        let (messages, waiting) = mpsc::channel(IN_FLIGHT);
        messages.try_send(write_request(WriteAction::Stat, digest, size)).expect("an empty channel has room");
        let mut request = self.link.request(ReceiverStream::new(waiting));
        if let Some(lease) = lease {
            request.metadata_mut().insert("containerd-lease", lease.clone());
        }
        // The answer says that the ref is ours.
        let opened = async {
            let mut answers = self.link.content().write(request).await?.into_inner();
            let answer = answers.message().await?.ok_or_else(|| Status::unavailable("the stream ended"))?;
            Ok(WriteStream { messages, answers, offered: answer.offset.cast_unsigned() })
        };
        with_deadline(MESSAGE_DEADLINE, opened).await
    }

    /// What comes of a write that is over: nothing is left at its ref when containerd made the blob, or had it.
    pub(super) async fn finish_commit(
        &self,
        slot: &IngestSlot,
        committed: Result<(), Status>,
        remembered: &BlobMetadata,
    ) -> Result<(), StoreError> {
        match committed {
            Ok(()) => {}
            // Somebody else, the kubelet perhaps, was faster. The lease holds it, but the labels that came along were dropped.
            Err(status) if status.code() == Code::AlreadyExists => self.add_labels(slot.digest, remembered).await?,
            Err(status) => return Err(self.link.blob_error(slot.digest, &status)),
        }
        slot.set_leftover(false);
        self.changed();
        Ok(())
    }

    /// Throws away what was written to the ref, if anything.
    pub(super) async fn abort(&self, digest: Digest) -> Result<(), StoreError> {
        let abort = || async {
            let request = self.link.request(AbortRequest { r#ref: ref_of(digest) });
            self.link.call(self.link.content().abort(request)).await
        };
        // The last stream made a file in the folder while that was being removed. containerd undoes the abort then.
        let refilled = |status: &Status| status.code() == Code::Unknown;
        match retry_until_settled(refilled, abort).await {
            Err(status) if status.code() != Code::NotFound => Err(self.link.blob_error(digest, &status)),
            _ => Ok(()),
        }
    }

    /// Aborts every write of ours that nobody here is writing: left by a dropped writer, or by a process that was killed.
    pub(super) async fn sweep_abandoned(&self) -> Result<(), StoreError> {
        let filters = vec![format!("ref~=\"^{REF_PREFIX}\"")];
        let request = self.link.request(ListStatusesRequest { filters });
        let listed = self.link.call(self.link.content().list_statuses(request)).await;
        for status in listed.map_err(|status| self.link.store_error(&status))?.statuses {
            let Some(Ok(digest)) = status.r#ref.strip_prefix(REF_PREFIX).map(str::parse) else { continue };
            let _alone = self.state.begin_lock.lock().await;
            let is_written = self.state.being_written().contains(&digest);
            if !is_written {
                self.abort(digest).await?;
            }
        }
        Ok(())
    }
}

/// Tries again while containerd has not noticed yet that the last stream on the ref is gone.
async fn retry_until_settled<T, F: Future<Output = Result<T, Status>>>(
    unsettled: impl Fn(&Status) -> bool,
    attempt: impl Fn() -> F,
) -> Result<T, Status> {
    let mut pause = FIRST_PAUSE;
    loop {
        match attempt().await {
            Err(status) if unsettled(&status) && pause <= LAST_PAUSE => sleep(pause).await,
            settled => return settled,
        }
        pause *= 2;
    }
}

fn ref_of(digest: Digest) -> String {
    format!("{REF_PREFIX}{digest}")
}

impl ApiWriter {
    /// Sends what has been filled, as soon as there is room, and takes the answers that have come meanwhile.
    async fn send(&mut self, action: WriteAction, labels: HashMap<String, String>) -> Result<(), StoreError> {
        let data = std::mem::take(&mut self.filling);
        let message = WriteContentRequest {
            action: action.into(),
            total: self.size.cast_signed(),
            expected: self.slot.digest.to_string(),
            // Zero on the first one makes containerd forget what another namespace's copy of the blob would offer.
            offset: (self.written - data.len() as u64).cast_signed(),
            data,
            labels,
            ..WriteContentRequest::default()
        };
        let sending = async {
            loop {
                tokio::select! {
                    biased;
                    answer = self.answers.message() => confirm(&mut self.confirmed, answer?)?,
                    room = self.messages.reserve() => match room {
                        Ok(room) => {
                            room.send(message);
                            return Ok(());
                        }
                        // The stream has ended, and its last answer says why.
                        Err(_) => confirm(&mut self.confirmed, self.answers.message().await?)?,
                    },
                }
            }
        };
        let sent = with_deadline(MESSAGE_DEADLINE, sending).await;
        sent.map_err(|status| self.slot.store.link.blob_error(self.slot.digest, &status))
    }

    /// Waits until containerd has all bytes, has hashed and synced them, and has made the blob.
    async fn wait_committed(&mut self) -> Result<(), Status> {
        let committing = async {
            loop {
                let answer = self.answers.message().await?;
                let done = answer.as_ref().is_some_and(|answer| answer.action() == WriteAction::Commit);
                confirm(&mut self.confirmed, answer)?;
                if done {
                    return Ok(());
                }
            }
        };
        with_deadline(COMMIT_DEADLINE, committing).await
    }
}

/// Every message but the last is full, so each answer moves on by that much or ends the blob.
fn confirm(confirmed: &mut u64, answer: Option<WriteContentResponse>) -> Result<(), Status> {
    let answer = answer.ok_or_else(|| Status::unavailable("containerd ended the stream before the commit"))?;
    let offset = answer.offset.cast_unsigned();
    let step = offset.checked_sub(*confirmed);
    let whole = match answer.action() {
        WriteAction::Commit => step.is_some_and(|step| step <= MESSAGE_SIZE as u64),
        _ => step == Some(MESSAGE_SIZE as u64),
    };
    if !whole {
        return Err(Status::data_loss(format!("it is at byte {offset} after {confirmed}")));
    }
    *confirmed = offset;
    Ok(())
}

#[async_trait]
impl BlobSink for ApiWriter {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        for chunk in chunks {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                // Full ones go when there is more: the last one goes with the commit.
                if self.filling.len() == MESSAGE_SIZE {
                    self.send(WriteAction::Write, HashMap::new()).await?;
                    self.filling.reserve_exact(MESSAGE_SIZE);
                }
                let (now, later) = rest.split_at(rest.len().min(MESSAGE_SIZE - self.filling.len()));
                self.filling.extend_from_slice(now);
                self.written += now.len() as u64;
                rest = later;
                if self.written > self.size {
                    let (size, digest) = (self.size, self.slot.digest);
                    return Err(StoreError::Other(format!("more than {size} bytes for {digest}")));
                }
            }
        }
        Ok(())
    }
}

impl ApiWriter {
    /// Makes the blob readable; a file that is there already takes its place unseen.
    pub(super) async fn commit(mut self, proof: &BlobProof, remembered: &BlobMetadata) -> Result<(), StoreError> {
        let digest = self.slot.digest;
        if proof.digest() != digest || proof.size() != self.written || self.size != self.written {
            let (proved, size, written) = (proof.digest(), proof.size(), self.written);
            return Err(StoreError::Other(format!(
                "the proof is for {size} bytes of {proved}, written were {written} of {digest}"
            )));
        }
        self.send(WriteAction::Commit, missing_labels(&HashMap::new(), remembered)).await?;
        let committed = self.wait_committed().await;
        self.slot.store.finish_commit(&self.slot, committed, remembered).await
    }
}
