//! Giving containerd a blob without sending it: its file is linked beside the others, and containerd makes a record of what it finds.
//!
//! Under the default content policy (`shared`) a write whose expected digest is in the content store's folder already begins at its end
//! (metadata/content.go, `Writer`; the same in 1.6, 1.7 and 2). containerd does not look into the file then: what is linked has to be proved,
//! on disk, and closed for good. From the moment that the write is open, the collector leaves the file alone. Before that it may take it,
//! because no record names it; the staging name keeps it meanwhile, and it is linked again.
//!
//! Names among the blobs are only ever removed by containerd, under its own lock: between our look and our removal it could have made a record of
//! them. The two exceptions are a file that nobody can want, and one whose bytes are wrong.

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, Permissions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::ContainerdStore;
use super::content::blocking;
use super::labels::missing_labels;
use super::staged_blob::STAGING_FOLDER;
use super::writer::IngestSlot;
use crate::files::{StagingFile, blob_path, create_staging_folder, sync_folder};
use crate::oci::{Digest, Hasher};
use crate::ports::{BlobMetadata, Pin, StoreError};

/// How blobs come into containerd's content store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum IngestMode {
    /// Their files are linked into its folder and adopted.
    Linked,
    /// They are sent through the content API, which is slower. Says why.
    Copied(String),
}

impl fmt::Display for IngestMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Linked => f.write_str("linked"),
            Self::Copied(why) => write!(f, "copied: {why}"),
        }
    }
}

/// Times that a file is linked again after the collector took it. Between the link and containerd's answer are milliseconds, and a collection
/// comes in seconds at the soonest: that two hit the same blob is unlikely, and the third proves something else.
const TRIES: usize = 3;

/// What a file is called in our folder until it is removed because its bytes are wrong.
pub(super) const WRONG_EXTENSION: &str = "wrong";

/// Of a file that is hashed because another one is where ours should be.
const READ_SIZE: usize = 1 << 20;

const CONTENT_NOT_VISIBLE: &str = "the files of its content store cannot be seen here";
const FILES_NOT_ADOPTED: &str = "it does not take up files that it finds (content_sharing_policy = \"isolated\"?)";

/// Why a blob was not adopted; it can always be sent.
pub(super) struct AdoptionError(pub(super) String);

impl ContainerdStore {
    /// How blobs come in, tried once after each start of containerd. `None` while its content store has no folder for blobs yet. That the folder
    /// cannot be seen is looked at again each time: it is made with the first blob.
    pub(super) async fn ingest_mode(&self) -> Result<Option<IngestMode>, StoreError> {
        let mut known = self.state.ingest_mode.lock().await;
        let unseen = IngestMode::Copied(CONTENT_NOT_VISIBLE.into());
        if known.as_ref().is_some_and(|known| *known != unseen) {
            return Ok(known.clone());
        }
        let found = match self.content_root().await? {
            Some(root) => self
                .probe(&root)
                .await?
                .map_or_else(|AdoptionError(why)| IngestMode::Copied(why), |()| IngestMode::Linked),
            None if self.is_without_content().await? => return Ok(None),
            None => unseen,
        };
        if known.as_ref() != Some(&found) {
            log_ingest_mode(&found);
        }
        Ok(known.insert(found).clone().into())
    }

    /// What was found out does not hold any more.
    pub(super) async fn record_adoption_error(&self, why: String) {
        let (mut known, found) = (self.state.ingest_mode.lock().await, IngestMode::Copied(why));
        if known.as_ref() != Some(&found) {
            log_ingest_mode(&found);
            *known = Some(found);
        }
    }

    /// Links a file that nobody else can want, and asks whether containerd would take it. No record is made.
    async fn probe(&self, root: &Path) -> Result<Result<(), AdoptionError>, StoreError> {
        let bytes = rand::random::<[u8; 32]>();
        let (digest, size) = (Digest::of(&bytes), bytes.len() as u64);
        let names = ProbeFile { staged: root.join(STAGING_FOLDER).join(digest.hex()), linked: blob_path(root, digest) };
        let linking = move || names.create(&bytes).map(|()| names);
        let names = match blocking(linking).await? {
            Ok(names) => names,
            Err(error) => return Ok(Err(AdoptionError(format!("linking into its content store: {error}")))),
        };
        let opened = self.open_stream(digest, size, None).await.map(|stream| stream.offered);
        let aborted = self.abort(digest).await;
        blocking(move || drop(names)).await?;
        let offered = opened.map_err(|status| self.link.blob_error(digest, &status))?;
        aborted?;
        Ok(if offered == size { Ok(()) } else { Err(AdoptionError(FILES_NOT_ADOPTED.into())) })
    }

    /// Links the sealed file and has it recorded, with what is to be remembered.
    pub(super) async fn adopt(
        &self,
        slot: &Arc<IngestSlot>,
        file: &Arc<StagingFile>,
        root: &Arc<Path>,
        pin: &Pin,
        remembered: &BlobMetadata,
    ) -> Result<Result<(), AdoptionError>, StoreError> {
        let (digest, size) = (slot.digest(), file.size());
        for _ in 0..TRIES {
            // A record that is whole already: the pin holds it since the blob was staged.
            if self.find_blob(digest).await?.is_some() {
                return self.add_labels(digest, remembered).await.map(Ok);
            }
            let (linked, to) = (Arc::clone(file), blob_path(root, digest));
            if let Err(error) = blocking(move || link_blob(&linked, &to, digest)).await? {
                return Ok(Err(AdoptionError(format!("linking into its content store: {error}"))));
            }
            let stream = match self.open_write(slot, size, pin).await {
                Err(StoreError::AlreadyExists(_)) => return self.add_labels(digest, remembered).await.map(Ok),
                stream => stream?,
            };
            if stream.offered == size {
                let committed = stream.accept(digest, size, missing_labels(&HashMap::new(), remembered)).await;
                self.finish_commit(slot, committed, remembered).await?;
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
        Ok(Err(AdoptionError("its collector takes the files before it can record them".into())))
    }

    /// Finishes what a killed process left between linking and recording, if its bytes are right; else both names are removed. The labels are
    /// missing then, as those of any blob that is there already.
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
                tracing::debug!(%digest, %error, "what a killed process linked cannot be checked");
                return Ok(false);
            }
        }
        match self.open_write(slot, size, pin).await {
            Ok(stream) if stream.offered == size && size > 0 => {
                let committed = stream.accept(digest, size, HashMap::new()).await;
                self.finish_commit(slot, committed, &BlobMetadata::default()).await.map(|()| true)
            }
            // The policy has changed since. The collector finds the file by itself after the next removal of any blob.
            Ok(_) => Ok(false),
            Err(StoreError::AlreadyExists(_)) => Ok(true),
            Err(error) => Err(error),
        }
    }
}

/// Whether both are names of one file that is the blob; wrong ones are removed.
fn verify_linked(staged: &Path, linked: &Path, digest: Digest) -> io::Result<bool> {
    let this = fs::symlink_metadata(staged)?;
    if !fs::symlink_metadata(linked).is_ok_and(|that| (this.dev(), this.ino()) == (that.dev(), that.ino())) {
        return Ok(false);
    }
    let is_right = has_digest(staged, digest)?;
    if !is_right {
        remove_wrong_file(linked, &staged.with_extension(WRONG_EXTENSION), digest)?;
        fs::remove_file(staged)?;
    }
    Ok(is_right)
}

fn log_ingest_mode(found: &IngestMode) {
    match found {
        IngestMode::Linked => tracing::info!("blobs are linked into containerd's content store"),
        IngestMode::Copied(why) => {
            tracing::warn!(why, "blobs are sent through containerd's content API, which is slower")
        }
    }
}

/// A probe's file, under both of its names; removed when dropped. A kill leaves what the sweep knows.
struct ProbeFile {
    staged: PathBuf,
    linked: PathBuf,
}

impl ProbeFile {
    fn create(&self, bytes: &[u8]) -> io::Result<()> {
        create_staging_folder(self.staged.parent().expect("it is in a folder"))?;
        fs::write(&self.staged, bytes)?;
        fs::set_permissions(&self.staged, Permissions::from_mode(0o444))?;
        fs::hard_link(&self.staged, &self.linked)
    }
}

impl Drop for ProbeFile {
    fn drop(&mut self) {
        // In this order: as long as the first is there, what the second leaves is swept.
        let _ = fs::remove_file(&self.linked);
        let _ = fs::remove_file(&self.staged);
    }
}

/// Gives the file its name among the blobs, and makes sure that both are on disk. What is there under that name is never written over: it stays if
/// it is right, whosever it is.
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

fn unless_absent<T>(otherwise: T) -> impl FnOnce(io::Error) -> io::Result<T> {
    |error| if error.kind() == io::ErrorKind::NotFound { Ok(otherwise) } else { Err(error) }
}

/// Takes a file with wrong bytes from among the blobs. Should the right one have come there in the meantime, it is put back.
pub(super) fn remove_wrong_file(wrong: &Path, aside: &Path, digest: Digest) -> io::Result<()> {
    fs::rename(wrong, aside)?;
    if has_digest(aside, digest)? {
        let _ = fs::hard_link(aside, wrong);
    } else {
        tracing::warn!(%digest, "a file among containerd's blobs, which no record named, had other bytes; it was removed");
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
