//! Removes unreferenced blobs.

use std::collections::HashSet;
use std::fs;
use std::io::Read;

use parking_lot::MutexGuard;

use super::index::IndexFile;
use super::{Folder, io_error};
use crate::files::blob_path;
use crate::oci::{Digest, Document, MAX_DOCUMENT_BYTES};
use crate::ports::StoreError;

impl Folder {
    /// Every blob of this process is pinned before it enters `blobs/`, and `changing` keeps pins
    /// from changing.
    pub(super) fn collect(&self, folder_guard: &MutexGuard<'_, ()>) -> Result<(), StoreError> {
        let mut unvisited: Vec<Digest> = IndexFile::read(self)?.targets().collect();
        unvisited.extend(self.pinned_digests(folder_guard)?);
        let mut reachable = HashSet::new();
        while let Some(digest) = unvisited.pop() {
            if reachable.insert(digest) {
                unvisited.extend(self.referenced_digests(digest)?);
            }
        }
        let mut is_changed = false;
        for blob in self.blobs()? {
            if !reachable.contains(&blob.digest) {
                let path = blob_path(&self.root, blob.digest);
                fs::remove_file(&path).map_err(|error| io_error(&path, &error))?;
                is_changed = true;
            }
        }
        self.remove_other_metadata(folder_guard, &reachable)?;
        if is_changed {
            self.record_change();
        }
        Ok(())
    }

    /// Children in the metadata, and in the blob if it is a document: other tools write no
    /// metadata.
    fn referenced_digests(&self, digest: Digest) -> Result<HashSet<Digest>, StoreError> {
        let mut children: HashSet<_> = self.metadata(digest)?.children.into_iter().collect();
        if let Some(document) = self.document(digest) {
            children.extend(document.children().map(|child| child.digest));
        }
        Ok(children)
    }

    fn document(&self, digest: Digest) -> Option<Document> {
        let file = fs::File::open(blob_path(&self.root, digest)).ok()?;
        if file.metadata().ok()?.len() > MAX_DOCUMENT_BYTES {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(MAX_DOCUMENT_BYTES).read_to_end(&mut bytes).ok()?;
        Document::parse(&bytes).ok()
    }
}
