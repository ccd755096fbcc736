//! Writes a blob through containerd's content API.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use containerd_client::services::v1::{WriteAction, WriteContentRequest, WriteContentResponse};
use containerd_client::tonic::{Status, Streaming};
use tokio::sync::mpsc;
use tokio::time::sleep;

use super::ContainerdStore;
use super::client::{MESSAGE_DEADLINE, with_deadline};
use super::ingest::{COMMIT_DEADLINE, IngestSlot, MAX_BACKOFF, MIN_BACKOFF, WriteStream, write_request};
use super::labels::missing_labels;
use crate::oci::BlobProof;
use crate::ports::{BlobMetadata, BlobSink, Pin, StoreError};

/// Data of one message in bytes. containerd refuses messages over 16 MiB. 4 and 8 MiB were no
/// faster (measured on 1.6), and each message costs three times its size in memory.
pub(super) const MESSAGE_SIZE: usize = 1 << 20;

pub(super) struct ApiWriter {
    slot: Arc<IngestSlot>,
    size: u64,
    /// Accepted bytes, sent or not.
    written: u64,
    /// Bytes that containerd confirmed.
    confirmed: u64,
    /// Data of the next message.
    filling: Vec<u8>,
    messages: mpsc::Sender<WriteContentRequest>,
    answers: Streaming<WriteContentResponse>,
}

impl ContainerdStore {
    pub(super) async fn begin_write(
        &self,
        slot: Arc<IngestSlot>,
        size: u64,
        pin: &Pin,
    ) -> Result<ApiWriter, StoreError> {
        let digest = slot.digest();
        let mut backoff = MIN_BACKOFF;
        let stream = loop {
            let mut stream = self.open_write(&slot, size, pin).await?;
            // Another namespace has the blob, or a file has no record: containerd offers the bytes
            // unverified.
            if stream.offered == 0 {
                break stream;
            }
            let declined = stream.decline(write_request(WriteAction::Write, digest, size)).await;
            match declined.map_err(|status| self.client.blob_error(digest, &status)) {
                Ok(()) => break stream,
                // containerd made the offer before detecting the end of the last stream on the ref.
                Err(StoreError::Busy(_)) if backoff <= MAX_BACKOFF => sleep(backoff).await,
                Err(error) => return Err(error),
            }
            backoff *= 2;
        };
        let filling = Vec::with_capacity(MESSAGE_SIZE.min(usize::try_from(size).unwrap_or(MESSAGE_SIZE)));
        let WriteStream { messages, answers, offered: _ } = stream;
        Ok(ApiWriter { slot, size, written: 0, confirmed: 0, filling, messages, answers })
    }
}

impl ApiWriter {
    /// Sends the filled message as soon as the queue has room, and reads the answers that have
    /// arrived.
    async fn send(&mut self, action: WriteAction, labels: HashMap<String, String>) -> Result<(), StoreError> {
        let data = std::mem::take(&mut self.filling);
        let message = WriteContentRequest {
            action: action.into(),
            total: self.size.cast_signed(),
            expected: self.slot.digest().to_string(),
            // Offset 0 in the first message makes containerd drop the offer of another namespace's
            // copy.
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
                        // The stream has ended; its last answer has the reason.
                        Err(_) => confirm(&mut self.confirmed, self.answers.message().await?)?,
                    },
                }
            }
        };
        let sent = with_deadline(MESSAGE_DEADLINE, sending).await;
        sent.map_err(|status| self.slot.store.client.blob_error(self.slot.digest(), &status))
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

#[async_trait]
impl BlobSink for ApiWriter {
    async fn append(&mut self, chunks: &[Bytes]) -> Result<(), StoreError> {
        for chunk in chunks {
            let mut rest = &chunk[..];
            while !rest.is_empty() {
                // A full message is sent when more data follows: the last message goes with the
                // commit.
                if self.filling.len() == MESSAGE_SIZE {
                    self.send(WriteAction::Write, HashMap::new()).await?;
                    self.filling.reserve_exact(MESSAGE_SIZE);
                }
                let (now, later) = rest.split_at(rest.len().min(MESSAGE_SIZE - self.filling.len()));
                self.filling.extend_from_slice(now);
                self.written += now.len() as u64;
                rest = later;
                if self.written > self.size {
                    let (size, digest) = (self.size, self.slot.digest());
                    return Err(StoreError::Other(format!("more than {size} bytes for {digest}")));
                }
            }
        }
        Ok(())
    }
}

impl ApiWriter {
    /// Makes the blob readable. containerd uses an existing file unverified, see `stray.rs`.
    pub(super) async fn commit(mut self, proof: &BlobProof, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let digest = self.slot.digest();
        if proof.digest() != digest || proof.size() != self.written || self.size != self.written {
            let (proved, size, written) = (proof.digest(), proof.size(), self.written);
            return Err(StoreError::Other(format!(
                "the proof is for {size} bytes of {proved}, written were {written} of {digest}"
            )));
        }
        self.send(WriteAction::Commit, missing_labels(&HashMap::new(), metadata)).await?;
        let committed = self.wait_committed().await;
        self.slot.store.finish_commit(&self.slot, committed, metadata).await
    }
}
