//! A content store in a folder, as an OCI image layout that other tools can read and extend.
//!
//! ```text
//! oci-layout, index.json, blobs/sha256/    as in the specification; records have full names
//! ingest/                                  blobs that are being written, and staged blobs
//! pins/                                    one file per pin: its end and its digests
//! remembered/                              one file per blob with metadata
//! ```
//!
//! One process owns the folder at a time. Lists contain the additions of other tools, but the
//! change counter does not move for them.

mod collect;
mod index;
mod metadata;
mod pins;
mod staged_blob;
mod write_slot;

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use nix::fcntl::{Flock, FlockArg};
use parking_lot::{Mutex, MutexGuard};
use tokio::sync::watch;

use crate::decide::disk_floor::Disks;
use crate::files::{FileReader, blob_path, file_system, sync_folder};
use crate::oci::{BlobProof, Digest};
use crate::ports::{
    BlobInfo, BlobMetadata, BlobReader, Blobs, ImageRecord, ImageRecords, Pin, Pins, Snapshots, StagedBlob, StoreDisks,
    StoreError, verify_document,
};
use index::IndexFile;
use metadata::MetadataFile;
use staged_blob::LayoutStagedBlob;
use write_slot::WriteSlot;

/// An OCI image layout on disk.
#[derive(Clone)]
pub struct LayoutStore {
    folder: Arc<Folder>,
}

/// The locked folder. Writers share it, so the lock lasts until the last writer is gone.
struct Folder {
    root: PathBuf,
    /// Held while index, pins or metadata change, and during collection, so that no pin is missed.
    lock: Mutex<()>,
    writing: Mutex<HashSet<Digest>>,
    changes: watch::Sender<u64>,
    _folder_lock: Flock<File>,
}

/// Reason why the folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// A read or write failed.
    #[error("the image layout in {root}: {source}")]
    Io {
        /// Folder.
        root: PathBuf,
        /// Cause.
        source: io::Error,
    },
    /// Another process has the lock.
    #[error("the image layout in {0} is in use by another process; end that one or choose another folder")]
    InUse(PathBuf),
    /// The folder has files of another kind.
    #[error("{0} holds files but no image layout; choose an empty folder")]
    Foreign(PathBuf),
}

const LAYOUT_FILE: &str = "oci-layout";
const INDEX_FILE: &str = "index.json";
const BLOBS: &str = "blobs/sha256";
const INGEST: &str = "ingest";
const PINS: &str = "pins";
const METADATA: &str = "remembered";

impl LayoutStore {
    /// Locks the folder, makes an empty folder a layout, and removes the unfinished files of a
    /// killed process.
    ///
    /// # Errors
    /// [`LayoutError`]; a folder with files of another kind stays unchanged.
    pub fn open(root: &Path) -> Result<Self, LayoutError> {
        let layout_error = |source| LayoutError::Io { root: root.to_owned(), source };
        fs::create_dir_all(root).map_err(layout_error)?;
        let folder_lock = match Flock::lock(File::open(root).map_err(layout_error)?, FlockArg::LockExclusiveNonblock) {
            Ok(folder_lock) => folder_lock,
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => return Err(LayoutError::InUse(root.to_owned())),
            Err((_, errno)) => return Err(layout_error(errno.into())),
        };
        let is_layout = root.join(LAYOUT_FILE).try_exists().map_err(layout_error)?;
        if !is_layout && fs::read_dir(root).map_err(layout_error)?.next().is_some() {
            return Err(LayoutError::Foreign(root.to_owned()));
        }
        prepare(root).map_err(layout_error)?;
        let folder = Folder {
            root: root.to_owned(),
            lock: Mutex::new(()),
            writing: Mutex::new(HashSet::new()),
            changes: watch::Sender::new(0),
            _folder_lock: folder_lock,
        };
        folder.collect(&folder.lock()).map_err(|error| layout_error(io::Error::other(error)))?;
        Ok(Self { folder: Arc::new(folder) })
    }

    /// Removes content without a live pin and without a record, as do a release and the opening of
    /// the folder.
    ///
    /// # Errors
    /// [`StoreError::Other`] when the folder cannot be read or changed.
    pub async fn collect(&self) -> Result<(), StoreError> {
        self.blocking(|folder| folder.collect(&folder.lock())).await
    }

    /// Runs file operations on a blocking thread.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Arc<Folder>) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let folder = self.folder.clone();
        let done = tokio::task::spawn_blocking(move || work(&folder)).await;
        done.unwrap_or_else(|panicked| Err(StoreError::Other(format!("a file operation panicked: {panicked}"))))
    }
}

/// Creates missing files and folders, and removes the files of unfinished writers.
fn prepare(root: &Path) -> io::Result<()> {
    // The marker first: this process may complete any folder with the marker.
    if !root.join(LAYOUT_FILE).try_exists()? {
        replace(&root.join(LAYOUT_FILE), br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    }
    if !root.join(INDEX_FILE).try_exists()? {
        replace(&root.join(INDEX_FILE), IndexFile::empty().as_slice())?;
    }
    staged_blob::sweep_unstaged(&root.join(INGEST))?;
    for folder in [BLOBS, INGEST, PINS, METADATA] {
        fs::create_dir_all(root.join(folder))?;
    }
    sync_folder(root)
}

/// Replaces a file atomically, also across a power cut.
fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let staged = path.with_extension("new");
    write_synced(&staged, content)?;
    fs::rename(&staged, path)?;
    sync_folder(path.parent().unwrap_or(Path::new(".")))
}

fn write_synced(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut file = File::create(path)?;
    file.write_all(content)?;
    file.sync_all()
}

/// Adds the path to an error.
fn io_error(path: &Path, error: &io::Error) -> StoreError {
    StoreError::Other(format!("{}: {error}", path.display()))
}

impl Folder {
    fn path(&self, part: &str) -> PathBuf {
        self.root.join(part)
    }

    fn lock(&self) -> MutexGuard<'_, ()> {
        // The lock guards files, each of which is replaced atomically: a panic leaves no half
        // change.
        self.lock.lock()
    }

    fn record_change(&self) {
        self.changes.send_modify(|changes| *changes += 1);
    }

    fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        let path = blob_path(&self.root, digest);
        match fs::metadata(&path) {
            Ok(metadata) => self.info(digest, metadata.len()).map(Some),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(io_error(&path, &error)),
        }
    }

    fn info(&self, digest: Digest, size: u64) -> Result<BlobInfo, StoreError> {
        let MetadataFile { sources, children } = self.metadata(digest)?;
        Ok(BlobInfo { digest, size, sources: sources.into_iter().collect(), has_children: !children.is_empty() })
    }

    fn require_blob(&self, digest: Digest) -> Result<(), StoreError> {
        self.blob(digest)?.map(|_| ()).ok_or(StoreError::Absent(digest))
    }

    fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        let path = self.path(BLOBS);
        let unreadable = |error| io_error(&path, &error);
        let mut blobs = Vec::new();
        for entry in fs::read_dir(&path).map_err(unreadable)? {
            let entry = entry.map_err(unreadable)?;
            // Skips other tools' temporary files.
            let Some(digest) = entry.file_name().to_str().and_then(|hex| format!("sha256:{hex}").parse().ok()) else {
                continue;
            };
            match entry.metadata() {
                Ok(metadata) => blobs.push(self.info(digest, metadata.len())?),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(unreadable(error)),
            }
        }
        Ok(blobs)
    }
}

#[async_trait]
impl Blobs for LayoutStore {
    async fn blob(&self, digest: Digest) -> Result<Option<BlobInfo>, StoreError> {
        self.blocking(move |folder| folder.blob(digest)).await
    }

    async fn blobs(&self) -> Result<Vec<BlobInfo>, StoreError> {
        self.blocking(|folder| folder.blobs()).await
    }

    async fn open(&self, digest: Digest) -> Result<Box<dyn BlobReader>, StoreError> {
        match FileReader::open(&self.folder.root, digest).await {
            Ok(reader) => Ok(Box::new(reader)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(StoreError::Absent(digest)),
            Err(error) => Err(io_error(&blob_path(&self.folder.root, digest), &error)),
        }
    }

    async fn put(&self, bytes: Bytes, proof: BlobProof, metadata: &BlobMetadata, pin: &Pin) -> Result<(), StoreError> {
        verify_document(&bytes, proof)?;
        let (digest, metadata, pin) = (proof.digest(), metadata.clone(), pin.clone());
        self.blocking(move |folder| {
            folder.add_to_pin(&folder.lock(), &pin, digest)?;
            let slot = WriteSlot::take(folder, digest)?;
            folder.put(&slot, &bytes, &metadata)
        })
        .await
    }

    async fn stage(&self, digest: Digest, size: u64, pin: &Pin) -> Result<Arc<dyn StagedBlob>, StoreError> {
        let pin = pin.clone();
        let staged = self.blocking(move |folder| {
            folder.add_to_pin(&folder.lock(), &pin, digest)?;
            if folder.blob(digest)?.is_some() {
                return Err(StoreError::AlreadyExists(digest));
            }
            LayoutStagedBlob::begin(folder, digest, size)
        });
        Ok(Arc::new(staged.await?))
    }

    async fn add_metadata(&self, digest: Digest, metadata: &BlobMetadata) -> Result<(), StoreError> {
        let metadata = metadata.clone();
        self.blocking(move |folder| {
            let folder_guard = folder.lock();
            folder.require_blob(digest)?;
            folder.add_metadata(&folder_guard, digest, &metadata)
        })
        .await
    }

    async fn discard(&self, digest: Digest, pin: &Pin) -> Result<(), StoreError> {
        let pin = pin.clone();
        self.blocking(move |folder| {
            let folder_guard = folder.lock();
            for child in folder.metadata(digest)?.children {
                folder.add_to_pin(&folder_guard, &pin, child)?;
            }
            let path = blob_path(&folder.root, digest);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(io_error(&path, &error)),
                _ => folder.record_change(),
            }
            Ok(())
        })
        .await
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.folder.changes.subscribe()
    }
}

#[async_trait]
impl ImageRecords for LayoutStore {
    async fn images(&self) -> Result<Vec<ImageRecord>, StoreError> {
        self.blocking(|folder| Ok(IndexFile::read(folder)?.records())).await
    }

    async fn put_image(&self, record: &ImageRecord) -> Result<(), StoreError> {
        let record = record.clone();
        self.blocking(move |folder| {
            let folder_guard = folder.lock();
            folder.require_blob(record.target.digest)?;
            let mut index = IndexFile::read(folder)?;
            index.put(&record);
            index.write(&folder_guard, folder)?;
            folder.record_change();
            Ok(())
        })
        .await
    }

    async fn remove_image(&self, name: &str, target: Digest) -> Result<(), StoreError> {
        let name = name.to_owned();
        self.blocking(move |folder| {
            let folder_guard = folder.lock();
            let mut index = IndexFile::read(folder)?;
            if index.remove(&name, target) {
                index.write(&folder_guard, folder)?;
                folder.record_change();
            }
            Ok(())
        })
        .await
    }

    /// A layout has no runtime.
    async fn snapshots(&self, _: Digest) -> Result<Snapshots, StoreError> {
        Ok(Snapshots::default())
    }
}

#[async_trait]
impl Pins for LayoutStore {
    async fn pin(&self, life: Duration) -> Result<Pin, StoreError> {
        self.blocking(move |folder| folder.pin(life)).await
    }

    async fn renew(&self, pin: &Pin, life: Duration) -> Result<(), StoreError> {
        let pin = pin.clone();
        self.blocking(move |folder| folder.renew(&folder.lock(), &pin, life)).await
    }

    async fn release(&self, pin: Pin) -> Result<(), StoreError> {
        self.blocking(move |folder| {
            let folder_guard = folder.lock();
            folder.release(&folder_guard, &pin)?;
            folder.collect(&folder_guard)?;
            folder.record_change();
            Ok(())
        })
        .await
    }
}

#[async_trait]
impl StoreDisks for LayoutStore {
    async fn disks(&self) -> Result<Disks, StoreError> {
        let measure = |folder: &Arc<Folder>| file_system(&folder.root).map_err(|error| io_error(&folder.root, &error));
        let content = self.blocking(measure).await?;
        Ok(Disks { content: Some(content), snapshots: None })
    }
}

#[cfg(test)]
mod tests;
