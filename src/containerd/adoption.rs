//! Adopts a blob without sending its bytes: the agent links the file among containerd's blobs, and
//! containerd records the file.
//!
//! Under the default content policy (`shared`) containerd starts a write at its end when the
//! expected digest has a file in the content store's folder (metadata/content.go, `Writer`; the
//! same in 1.6, 1.7 and 2). containerd does not read the file then, so a linked file must be
//! verified, on disk, and closed for writing. The collector leaves the file alone from the start of
//! the write. Before, the collector may remove the unrecorded file; the staging name keeps the
//! bytes, and the agent links the file again.
//!
//! Never unlink from `blobs/`: containerd may record the file between our check and the unlink.
//! containerd's collector removes unrecorded files itself. The two exceptions are the probe's
//! random file, and a file with wrong bytes.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ContainerdStore;
use super::content::blocking;
use super::ingest::IngestSlot;
use super::labels::missing_labels;
use crate::files::{StagingFile, blob_path, create_staging_folder, sync_folder};
use crate::oci::{Digest, Hasher};
use crate::ports::{BlobMetadata, Pin, StoreError};

/// Ingest mode: how new blobs enter containerd's content store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IngestMode {
    /// Files are linked into the content store's folder and adopted.
    Linked,
    /// Bytes are sent through the content API, which is slower; the text has the reason.
    Copied(String),
}

impl fmt::Display for IngestMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linked => f.write_str("linked"),
            Self::Copied(reason) => write!(f, "copied: {reason}"),
        }
    }
}

/// Attempts to link a file that the collector removed. Milliseconds pass between the link and
/// containerd's answer, and seconds at least between collections. Two removals of one blob are
/// unlikely, and a third has another cause.
const TRIES: usize = 3;

/// The agent's folder in the content store's root.
pub(super) const STAGING_FOLDER: &str = "lighterman-staging";

/// Extension of a file in the agent's folder that is removed because its bytes are wrong.
pub(super) const WRONG_EXTENSION: &str = "wrong";

/// Read size for the hash of a file at the path of a blob.
const READ_SIZE: usize = 1 << 20;

const CONTENT_NOT_VISIBLE: &str = "the files of containerd's content store cannot be seen here";
const FILES_NOT_ADOPTED: &str =
    "containerd does not adopt files in its folder (content_sharing_policy = \"isolated\"?)";

/// Reason why a blob was not adopted. The bytes can always be sent.
pub(super) struct AdoptionError(pub(super) String);

impl ContainerdStore {
    /// Probes the ingest mode, once after each start of containerd. `None` while the content store
    /// has no folder for blobs. An invisible folder is looked for on each call: containerd creates
    /// the folder with the first blob.
    pub(super) async fn ingest_mode(&self) -> Result<Option<IngestMode>, StoreError> {
        let mut cached = self.state.ingest_mode.lock().await;
        let not_visible = IngestMode::Copied(CONTENT_NOT_VISIBLE.into());
        if cached.as_ref().is_some_and(|cached| *cached != not_visible) {
            return Ok(cached.clone());
        }
        let found = match self.content_root().await? {
            Some(root) => self
                .probe(&root)
                .await?
                .map_or_else(|AdoptionError(reason)| IngestMode::Copied(reason), |()| IngestMode::Linked),
            None if self.is_without_content().await? => return Ok(None),
            None => not_visible,
        };
        if cached.as_ref() != Some(&found) {
            log_ingest_mode(&found);
        }
        Ok(cached.insert(found).clone().into())
    }

    /// Records that links do not work any more.
    pub(super) async fn record_adoption_error(&self, reason: String) {
        let (mut cached, found) = (self.state.ingest_mode.lock().await, IngestMode::Copied(reason));
        if cached.as_ref() != Some(&found) {
            log_ingest_mode(&found);
            *cached = Some(found);
        }
    }

    /// Links a file with random bytes, and opens a write to see containerd's offer. Makes no
    /// record.
    async fn probe(&self, root: &Path) -> Result<Result<(), AdoptionError>, StoreError> {
        let bytes = rand::random::<[u8; 32]>();
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        let probe_file =
            ProbeFile { staged: root.join(STAGING_FOLDER).join(digest.hex()), linked: blob_path(root, digest) };
        let linking = move || probe_file.create(&bytes).map(|()| probe_file);
        let probe_file = match blocking(linking).await? {
            Ok(probe_file) => probe_file,
            Err(error) => return Ok(Err(AdoptionError(format!("linking into containerd's content store: {error}")))),
        };
        let opened = self.open_stream(digest, size, None).await.map(|stream| stream.offered);
        let aborted = self.abort(digest).await;
        blocking(move || drop(probe_file)).await?;
        let offered = opened.map_err(|status| self.client.blob_error(digest, &status))?;
        aborted?;
        Ok(if offered == size { Ok(()) } else { Err(AdoptionError(FILES_NOT_ADOPTED.into())) })
    }

    /// Links the sealed file, and commits the record with its labels.
    pub(super) async fn adopt(
        &self,
        slot: &IngestSlot,
        file: &Arc<StagingFile>,
        root: &Arc<Path>,
        pin: &Pin,
        metadata: &BlobMetadata,
    ) -> Result<Result<(), AdoptionError>, StoreError> {
        let (digest, size) = (slot.digest(), file.size());
        for _ in 0..TRIES {
            // Another client wrote the blob, which the pin holds since it was staged.
            if self.find_blob(digest).await?.is_some() {
                return self.add_labels(digest, metadata).await.map(Ok);
            }
            let (linked, to) = (Arc::clone(file), blob_path(root, digest));
            if let Err(error) = blocking(move || link_blob(&linked, &to, digest)).await? {
                return Ok(Err(AdoptionError(format!("linking into containerd's content store: {error}"))));
            }
            let stream = match self.open_write(slot, size, pin).await {
                Err(StoreError::AlreadyExists(_)) => return self.add_labels(digest, metadata).await.map(Ok),
                stream => stream?,
            };
            if stream.offered == size {
                let committed = stream.accept(digest, size, missing_labels(&HashMap::new(), metadata)).await;
                self.finish_commit(slot, committed, metadata).await?;
                if self.find_blob(digest).await?.is_some() {
                    return Ok(Ok(()));
                }
                continue;
            }
            let (linked, to) = (Arc::clone(file), blob_path(root, digest));
            if blocking(move || linked.is_linked_at(&to).unwrap_or(false)).await? {
                return Ok(Err(AdoptionError(FILES_NOT_ADOPTED.into())));
            }
        }
        Ok(Err(AdoptionError("containerd's collector removes the files before containerd records them".into())))
    }

    /// Records a blob that a killed process has linked, if the bytes are right; else removes both
    /// names. The labels stay missing, like those of any blob that exists already.
    pub(super) async fn adopt_leftover(
        &self,
        slot: &IngestSlot,
        staged: &Path,
        size: u64,
        pin: &Pin,
    ) -> Result<bool, StoreError> {
        let digest = slot.digest();
        let root = self.content_root().await?.filter(|root| staged.starts_with(root.join(STAGING_FOLDER)));
        let Some(linked) = root.map(|root| blob_path(&root, digest)) else { return Ok(false) };
        let staged = staged.to_owned();
        match blocking(move || verify_linked(&staged, &linked, digest)).await? {
            Ok(true) => {}
            Ok(false) => return Ok(false),
            Err(error) => {
                tracing::debug!(%digest, %error, "a file that a killed process linked cannot be verified");
                return Ok(false);
            }
        }
        match self.open_write(slot, size, pin).await {
            Ok(stream) if stream.offered == size && size > 0 => {
                let committed = stream.accept(digest, size, HashMap::new()).await;
                self.finish_commit(slot, committed, &BlobMetadata::default()).await.map(|()| true)
            }
            // The content policy has changed. The collector removes the file after the next removal
            // of any blob.
            Ok(_) => Ok(false),
            Err(StoreError::AlreadyExists(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// Whether both paths name one file with the right bytes. Removes both names of a file with wrong
/// bytes.
fn verify_linked(staged: &Path, linked: &Path, digest: Digest) -> io::Result<bool> {
    let this = fs::symlink_metadata(staged)?;
    if !fs::symlink_metadata(linked).is_ok_and(|that| (this.dev(), this.ino()) == (that.dev(), that.ino())) {
        return Ok(false);
    }
    let is_intact = has_digest(staged, digest)?;
    if !is_intact {
        remove_wrong_file(linked, &staged.with_extension(WRONG_EXTENSION), digest)?;
        fs::remove_file(staged)?;
    }
    Ok(is_intact)
}

fn log_ingest_mode(found: &IngestMode) {
    match found {
        IngestMode::Linked => tracing::info!("blobs are linked into containerd's content store"),
        IngestMode::Copied(reason) => {
            tracing::warn!(reason, "blobs are sent through containerd's content API, which is slower")
        }
    }
}

/// The probe's file with both names, removed on drop. The sweep handles the names after a kill.
struct ProbeFile {
    staged: PathBuf,
    linked: PathBuf,
}

impl ProbeFile {
    fn create(&self, bytes: &[u8]) -> io::Result<()> {
        create_staging_folder(self.staged.parent().expect("a staging file is in a folder"))?;
        fs::write(&self.staged, bytes)?;
        fs::set_permissions(&self.staged, Permissions::from_mode(0o444))?;
        fs::hard_link(&self.staged, &self.linked)
    }
}

impl Drop for ProbeFile {
    fn drop(&mut self) {
        // In this order, because the sweep finds a linked file only through its staged name.
        let _ = fs::remove_file(&self.linked);
        let _ = fs::remove_file(&self.staged);
    }
}

/// Links the file among the blobs, and syncs the folder. An existing file is never overwritten: a
/// file with the right bytes stays, and a file with wrong bytes is removed first.
fn link_blob(file: &StagingFile, to: &Path, digest: Digest) -> io::Result<()> {
    let aside = file.path().with_extension(WRONG_EXTENSION);
    for _ in 0..TRIES {
        match fs::hard_link(file.path(), to) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            linked => {
                linked?;
                break;
            }
        }
        if file.is_linked_at(to).or_else(unless_absent(false))?
            || has_digest(to, digest).or_else(unless_absent(false))?
        {
            break;
        }
        remove_wrong_file(to, &aside, digest).or_else(unless_absent(()))?;
    }
    sync_folder(to.parent().expect("blobs are in a folder"))
}

fn unless_absent<T>(default: T) -> impl FnOnce(io::Error) -> io::Result<T> {
    |error| if error.kind() == io::ErrorKind::NotFound { Ok(default) } else { Err(error) }
}

/// Removes a file with wrong bytes from the blobs. Puts the file back if its bytes are right now.
pub(super) fn remove_wrong_file(wrong: &Path, aside: &Path, digest: Digest) -> io::Result<()> {
    fs::rename(wrong, aside)?;
    if has_digest(aside, digest)? {
        let _ = fs::hard_link(aside, wrong);
    } else {
        tracing::warn!(%digest, "an unrecorded file among containerd's blobs had other bytes; the file was removed");
    }
    fs::remove_file(aside)
}

pub(super) fn has_digest(path: &Path, digest: Digest) -> io::Result<bool> {
    let mut file = File::open(path)?;
    let (mut hasher, mut bytes, mut size) = (Hasher::default(), vec![0; READ_SIZE], 0);
    loop {
        let read = file.read(&mut bytes)?;
        if read == 0 {
            return Ok(hasher.verify(digest, size).is_ok());
        }
        hasher.update(&bytes[..read]);
        size += read as u64;
    }
}
