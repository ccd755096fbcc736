//! Metadata of a blob: one small JSON file, replaced atomically.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::path::PathBuf;

use parking_lot::MutexGuard;
use serde::{Deserialize, Serialize};

use super::{Folder, METADATA, io_error, replace};
use crate::oci::{Digest, Repository};
use crate::ports::{BlobMetadata, StoreError};

/// Content of the file. A child's kind is not stored: it follows from the document that lists the
/// child.
#[derive(Default, PartialEq, Clone, Serialize, Deserialize)]
pub(super) struct MetadataFile {
    #[serde(default)]
    pub(super) sources: BTreeSet<Repository>,
    #[serde(default)]
    pub(super) children: BTreeSet<Digest>,
}

impl Folder {
    /// Metadata of a blob; empty without a file.
    pub(super) fn metadata(&self, digest: Digest) -> Result<MetadataFile, StoreError> {
        let path = self.metadata_path(digest);
        match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|error| io_error(&path, &error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(MetadataFile::default()),
            Err(error) => Err(io_error(&path, &error)),
        }
    }

    pub(super) fn add_metadata(
        &self,
        _folder_guard: &MutexGuard<'_, ()>,
        digest: Digest,
        metadata: &BlobMetadata,
    ) -> Result<(), StoreError> {
        let before = self.metadata(digest)?;
        let mut updated = before.clone();
        updated.sources.extend(metadata.source.clone());
        updated.children.extend(metadata.children.iter().map(|child| child.digest));
        if updated == before {
            return Ok(());
        }
        let path = self.metadata_path(digest);
        let written = serde_json::to_vec(&updated).map_err(io::Error::from);
        written.and_then(|bytes| replace(&path, &bytes)).map_err(|error| io_error(&path, &error))
    }

    /// Removes the metadata of absent blobs.
    pub(super) fn remove_other_metadata(
        &self,
        _folder_guard: &MutexGuard<'_, ()>,
        reachable: &HashSet<Digest>,
    ) -> Result<(), StoreError> {
        let folder = self.path(METADATA);
        for entry in fs::read_dir(&folder).map_err(|error| io_error(&folder, &error))? {
            let path = entry.map_err(|error| io_error(&folder, &error))?.path();
            let file_digest = path.file_stem().and_then(|hex| format!("sha256:{}", hex.to_str()?).parse().ok());
            if file_digest.is_none_or(|digest| !reachable.contains(&digest)) {
                fs::remove_file(&path).map_err(|error| io_error(&path, &error))?;
            }
        }
        Ok(())
    }

    fn metadata_path(&self, digest: Digest) -> PathBuf {
        self.path(METADATA).join(digest.hex()).with_extension("json")
    }
}
