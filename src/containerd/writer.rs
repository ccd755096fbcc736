//! Writes a blob through containerd's content API.

use std::collections::HashMap;

use bytes::Bytes;
use containerd_client::services::v1::{WriteAction, WriteContentRequest, WriteContentResponse};
use containerd_client::tonic::{Status, Streaming};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::ContainerdStore;
use super::client::{MESSAGE_DEADLINE, with_deadline};
use super::ingest::{COMMIT_DEADLINE, IngestSlot, SETTLING, SETTLING_RETRIES, WriteStream, write_request};
use super::labels::missing_labels;
use crate::oci::Digest;
use crate::ports::{BlobMetadata, Pin, StoreError};

/// Data of one message in bytes. containerd refuses messages over 16 MiB. 4 and 8 MiB were no
/// faster (measured on 1.6), and each message costs three times its size in memory.
pub(super) const MESSAGE_SIZE: usize = 1 << 20;

struct ApiWriter<'a> {
    store: &'a ContainerdStore,
    digest: Digest,
    size: u64,
    /// Bytes that containerd confirmed.
    confirmed: u64,
    messages: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl ContainerdStore {
    /// Sends a blob and commits it. `read` returns [`MESSAGE_SIZE`] bytes at an offset, or the rest
    /// of the blob. containerd uses an existing file unverified, see `stray.rs`.
    pub(super) async fn send_once<F: Future<Output = Result<Bytes, StoreError>>>(
        &self,
        slot: &IngestSlot,
        size: u64,
        metadata: &BlobMetadata,
        pin: &Pin,
        read: impl Fn(u64) -> F,
    ) -> Result<(), StoreError> {
        let mut writer = self.begin_write(slot, size, pin).await?;
        let mut offset = 0;
        loop {
            let data = read(offset).await?;
            let end = offset + data.len() as u64;
            if end == size {
                writer.send(WriteAction::Commit, offset, data, missing_labels(&HashMap::new(), metadata)).await?;
                break;
            }
            writer.send(WriteAction::Write, offset, data, HashMap::new()).await?;
            offset = end;
        }
        let committed = writer.wait_committed().await;
        self.finish_commit(slot, committed, metadata).await
    }

    async fn begin_write(&self, slot: &IngestSlot, size: u64, pin: &Pin) -> Result<ApiWriter<'_>, StoreError> {
        let digest = slot.digest();
        let mut failures = 0;
        let stream = loop {
            let mut stream = self.open_write(slot, size, pin).await?;
            // Another namespace has the blob, or a file has no record: containerd offers the bytes
            // unverified.
            if stream.offered == 0 {
                break stream;
            }
            let declined = stream.decline(write_request(WriteAction::Write, digest, size)).await;
            match declined.map_err(|status| self.client.blob_error(digest, &status)) {
                Ok(()) => break stream,
                // containerd made the offer before detecting the end of the last stream on the ref.
                Err(StoreError::Busy(_)) if failures < SETTLING_RETRIES => sleep(SETTLING.wait(failures)).await,
                Err(error) => return Err(error),
            }
            failures += 1;
        };
        let WriteStream { messages, answers, offered: _ } = stream;
        Ok(ApiWriter { store: self, digest, size, confirmed: 0, messages, answers })
    }
}

impl ApiWriter<'_> {
    /// Sends a message as soon as the queue has room, and reads the answers that have arrived.
    async fn send(
        &mut self,
        action: WriteAction,
        offset: u64,
        data: Bytes,
        labels: HashMap<String, String>,
    ) -> Result<(), StoreError> {
        // Offset 0 in the first message makes containerd drop the offer of another namespace's
        // copy.
        let message = WriteContentRequest {
            action: action.into(),
            total: self.size.cast_signed(),
            expected: self.digest.to_string(),
            offset: offset.cast_signed(),
            data: data.into(),
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
                        // The stream has ended; its last answer has the reason.
                        Err(_) => confirm(&mut self.confirmed, self.answers.message().await?)?,
                    },
                }
            }
        };
        let sent = with_deadline(MESSAGE_DEADLINE, sending).await;
        sent.map_err(|status| self.store.client.blob_error(self.digest, &status))
    }

    /// Waits until containerd has received, hashed and synced all bytes and has made the blob.
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

/// Every message except the last is full, so an answer advances by one full message or ends the
/// blob.
fn confirm(confirmed: &mut u64, answer: Option<WriteContentResponse>) -> Result<(), Status> {
    let answer = answer.ok_or_else(|| Status::unavailable("containerd ended the stream before the commit"))?;
    let offset = answer.offset.cast_unsigned();
    let step = offset.checked_sub(*confirmed);
    let whole = match answer.action() {
        WriteAction::Commit => step.is_some_and(|step| step <= MESSAGE_SIZE as u64),
        _ => step == Some(MESSAGE_SIZE as u64),
    };
    if !whole {
        return Err(Status::data_loss(format!("containerd is at byte {offset} after {confirmed}")));
    }
    *confirmed = offset;
    Ok(())
}
