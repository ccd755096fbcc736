//! Contract of every [`ContentStore`], as checks for each implementation: in memory, on disk, every
//! containerd.
//!
//! A failed check returns a value instead of a panic, so a test can show that checks detect a
//! defect.

mod pinning;
mod reading;
mod records;
pub mod retaining;
mod staging;
#[cfg(test)]
mod tests;
pub mod unpacking;
mod writing;

use std::collections::BTreeSet;
use std::fmt;
use std::pin::Pin as Pinned;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;

use crate::oci::{BlobProof, Descriptor, Digest, Hasher, Repository};
use crate::ports::{BlobInfo, BlobMetadata, Child, ChildKind, ContentStore, ImageRecord, Pin, StagedBlob, StoreError};

/// A store under test, with further operations for the checks.
#[async_trait]
pub trait StoreUnderTest: Send + Sync {
    /// The store.
    fn store(&self) -> Arc<dyn ContentStore>;

    /// Removes all unreferenced content before it returns.
    async fn collect(&self);

    /// Kills the process of the store and starts another on the same content. No cleanup of
    /// `unfinished` runs before the kill.
    async fn restart(&mut self, unfinished: UnfinishedWrite);
}

/// Write that is unfinished at a kill; the store under test drops the write.
pub enum UnfinishedWrite {
    /// A call of `put` that was polled, or has ended.
    Put(Pinned<Box<dyn Future<Output = Result<(), StoreError>> + Send>>),
    /// In pieces.
    Staged(Arc<dyn StagedBlob>),
}

/// Runs every check on a new store and panics with all failures.
///
/// # Panics
/// When the store violates the contract; the message names the check.
pub async fn assert_contract<S: StoreUnderTest>(name: &str, make: impl AsyncFn() -> S) {
    let violations = contract_violations(make).await;
    assert!(violations.is_empty(), "{name} violates the contract:\n{}", violations.join("\n"));
}

/// Runs every check on a new store. Returns one line per failure, which begins with the check's
/// name.
pub async fn contract_violations<S: StoreUnderTest>(make: impl AsyncFn() -> S) -> Vec<String> {
    let mut violations = Vec::new();
    for (name, check) in checks() {
        let mut subject = make().await;
        match tokio::time::timeout(DEADLINE, check(&mut subject)).await {
            Ok(Ok(())) => {}
            Ok(Err(failure)) => violations.push(format!("{name}: {failure}")),
            Err(_) => violations.push(format!("{name}: not done after {} s", DEADLINE.as_secs())),
        }
    }
    violations
}

/// Of one check. The longest moves some 4 MiB and collects three times: a few seconds on the
/// slowest store.
const DEADLINE: Duration = Duration::from_secs(60);

type Check = for<'a> fn(&'a mut dyn StoreUnderTest) -> Pinned<Box<dyn Future<Output = CheckResult> + 'a>>;

/// Pairs each check with its name.
macro_rules! named {
    ($($module:ident::$check:ident),* $(,)?) => {
        [$((stringify!($check), (|subject| Box::pin($module::$check(subject))) as Check)),*]
    };
}

fn checks() -> impl IntoIterator<Item = (&'static str, Check)> {
    named![
        reading::an_absent_blob_is_none,
        reading::a_committed_blob_reads_back_at_any_offset,
        reading::the_list_contains_exactly_the_whole_blobs,
        writing::a_canceled_put_leaves_the_whole_blob_or_nothing,
        writing::a_proof_of_another_blob_is_rejected,
        writing::a_blob_of_another_length_is_rejected,
        writing::a_document_over_the_limit_is_rejected,
        writing::a_blob_has_one_writer_at_a_time,
        writing::only_whole_blobs_survive_a_kill,
        writing::changes_are_counted,
        pinning::a_pin_protects_blobs_written_under_the_pin,
        pinning::a_pin_protects_blobs_that_existed_before,
        pinning::a_pin_expires,
        pinning::a_renewed_pin_protects_earlier_and_later_blobs,
        pinning::a_renewed_pin_expires,
        pinning::a_second_release_is_no_error,
        pinning::added_metadata_replaces_nothing,
        pinning::blobs_reachable_from_a_record_are_kept,
        pinning::metadata_of_a_written_blob_is_listed,
        pinning::a_discarded_blob_can_be_written_again,
        records::a_record_needs_its_target,
        records::a_record_replaces_the_record_of_the_same_name,
        records::a_record_is_removed_only_with_the_right_target,
        records::concurrent_record_writes_all_succeed,
        staging::pieces_in_any_order_make_the_blob,
        staging::a_staged_blob_is_invisible_before_the_commit,
        staging::a_staged_blob_rejects_the_proof_of_another_blob,
        staging::writes_after_the_commit_are_rejected,
        staging::a_dropped_staged_blob_is_resumed,
        staging::a_staged_blob_is_resumed_after_a_kill,
        staging::an_abandoned_staged_blob_is_not_resumed,
        staging::a_blob_is_staged_once_and_only_while_absent,
        staging::a_pin_protects_blobs_staged_under_the_pin,
        staging::metadata_of_a_staged_blob_is_listed,
    ]
}

/// A check's result.
type CheckResult = Result<(), Violation>;

/// Difference between the store's behavior and the contract.
struct Violation(String);

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl From<StoreError> for Violation {
    fn from(error: StoreError) -> Self {
        Self(format!("a call failed: {error}"))
    }
}

fn ensure(condition: bool, violation: impl fmt::Display) -> CheckResult {
    if condition { Ok(()) } else { Err(Violation(violation.to_string())) }
}

/// Life of a check's own pins: longer than any check, however slow the machine.
const HOUR: Duration = Duration::from_secs(3600);

/// Polls the inner future this many times. `None` when that future was not ready by then.
pub struct AbortAfter<F> {
    /// The inner future.
    pub inner: F,
    /// Polls that are left.
    pub polls: usize,
}

impl<F: Future + Unpin> Future for AbortAfter<F> {
    type Output = Option<F::Output>;

    fn poll(mut self: Pinned<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(left) = self.polls.checked_sub(1) else { return Poll::Ready(None) };
        self.polls = left;
        Pinned::new(&mut self.inner).poll(context).map(Some)
    }
}

/// Content of one check, so that stores with a shared backend have no blob of another check.
struct TestBlob {
    bytes: Bytes,
    digest: Digest,
}

impl TestBlob {
    /// `size` bytes, derived from `seed`.
    fn of(seed: &str, size: usize) -> Self {
        let first = Digest::of(seed.as_bytes());
        // Xorshift has no repeated positions, so a misplaced piece is detected. Its state must not
        // be 0.
        let mut state =
            first.as_bytes().iter().fold(1_u64, |state, &byte| state << 5 ^ state >> 59 ^ u64::from(byte)) | 1;
        let mut bytes = Vec::with_capacity(size + 8);
        while bytes.len() < size {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            bytes.extend_from_slice(&state.to_le_bytes());
        }
        bytes.truncate(size);
        Self { digest: Digest::of(&bytes), bytes: bytes.into() }
    }

    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn proof(&self) -> Result<BlobProof, Violation> {
        let mut hasher = Hasher::default();
        hasher.update(&self.bytes);
        hasher.verify(self.digest, self.size()).map_err(|error| Violation(error.to_string()))
    }

    /// Writes the blob as a document.
    async fn write(&self, store: &dyn ContentStore, pin: &Pin, children: &[(&TestBlob, ChildKind)]) -> CheckResult {
        Ok(store.put(self.bytes.clone(), self.proof()?, &blob_metadata(children), pin).await?)
    }

    /// A record with the blob as target.
    fn record(&self, name: &str) -> ImageRecord {
        let media_type = "application/vnd.oci.image.manifest.v1+json".into();
        let target =
            Descriptor { media_type, digest: self.digest, size: self.size(), platform: None, attestation: false };
        ImageRecord { name: name.into(), target }
    }

    async fn is_in(&self, store: &dyn ContentStore) -> Result<bool, Violation> {
        Ok(store.blob(self.digest).await?.is_some())
    }

    /// Verifies that exactly the blob's bytes can be read.
    async fn check_content(&self, store: &dyn ContentStore) -> CheckResult {
        let mut reader = store.open(self.digest).await?;
        ensure(reader.size() == self.size(), format!("{} bytes have the size {}", self.size(), reader.size()))?;
        let mut offset = 0;
        loop {
            let read = reader.read_at(offset as u64, 100_000).await?;
            if read.is_empty() {
                break;
            }
            let expected = self.bytes.get(offset..offset + read.len());
            ensure(expected == Some(&read[..]), format!("other bytes at {offset} of {}", self.size()))?;
            offset += read.len();
        }
        ensure(offset == self.bytes.len(), format!("{} bytes end at {offset}", self.size()))
    }
}

fn blob_metadata(children: &[(&TestBlob, ChildKind)]) -> BlobMetadata {
    let child = |&(blob, kind): &(&TestBlob, ChildKind)| Child { digest: blob.digest, kind };
    BlobMetadata { source: None, children: children.iter().map(child).collect() }
}

/// The digests that the store lists.
async fn list_digests(store: &dyn ContentStore) -> Result<BTreeSet<Digest>, Violation> {
    Ok(store.blobs().await?.into_iter().map(|blob| blob.digest).collect())
}

fn digests(blobs: &[&TestBlob]) -> BTreeSet<Digest> {
    blobs.iter().map(|blob| blob.digest).collect()
}
