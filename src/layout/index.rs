//! `index.json`: the image records.

use parking_lot::MutexGuard;
use serde_json::{Map, Value, json};

use super::{Folder, INDEX_FILE, io_error, replace};
use crate::oci::{Descriptor, Digest};
use crate::ports::{ImageRecord, StoreError};

/// The annotation with an image's name (OCI image specification, "Annotations"). The store writes
/// the record's full name, which is what `skopeo` takes after the folder's name.
const NAME_ANNOTATION: &str = "org.opencontainers.image.ref.name";

/// Largest index: a hundred thousand records of half a kilobyte, far more than a node ever has.
const MAX_INDEX_BYTES: u64 = 50 << 20;

/// The index, maybe of another tool: unknown fields are preserved.
pub(super) struct IndexFile {
    document: Map<String, Value>,
    entries: Vec<Value>,
}

impl IndexFile {
    /// Content of the file for a layout without images.
    pub(super) fn empty() -> Vec<u8> {
        let document = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [],
        });
        document.to_string().into_bytes()
    }

    pub(super) fn read(folder: &Folder) -> Result<Self, StoreError> {
        let path = folder.path(INDEX_FILE);
        let unreadable = |error| io_error(&path, &error);
        let invalid = |reason: &str| StoreError::Other(format!("{}: {reason}", path.display()));
        if std::fs::metadata(&path).map_err(unreadable)?.len() > MAX_INDEX_BYTES {
            return Err(invalid("too large for an image index"));
        }
        let bytes = std::fs::read(&path).map_err(unreadable)?;
        let mut document: Map<String, Value> =
            serde_json::from_slice(&bytes).map_err(|error| invalid(&error.to_string()))?;
        match document.remove("manifests") {
            Some(Value::Array(entries)) => Ok(Self { document, entries }),
            _ => Err(invalid("not an image index: the list of manifests is missing")),
        }
    }

    /// Replaces the file; `changing` proves the lock.
    pub(super) fn write(mut self, _folder_guard: &MutexGuard<'_, ()>, folder: &Folder) -> Result<(), StoreError> {
        self.document.insert("manifests".into(), Value::Array(self.entries));
        let bytes = Value::Object(self.document).to_string();
        let path = folder.path(INDEX_FILE);
        replace(&path, bytes.as_bytes()).map_err(|error| io_error(&path, &error))
    }

    /// Images with a name.
    pub(super) fn records(&self) -> Vec<ImageRecord> {
        let record = |entry: &Value| {
            Some(ImageRecord { name: name(entry)?.to_owned(), target: serde_json::from_value(entry.clone()).ok()? })
        };
        self.entries.iter().filter_map(record).collect()
    }

    /// Targets of all entries, with or without a name.
    pub(super) fn targets(&self) -> impl Iterator<Item = Digest> {
        self.entries.iter().filter_map(digest)
    }

    /// Adds the record and removes another record of the name.
    pub(super) fn put(&mut self, record: &ImageRecord) {
        self.entries.retain(|entry| name(entry) != Some(&record.name));
        self.entries.push(entry(&record.name, &record.target));
    }

    /// Removes the record if its target is `target`, and returns whether there was such a record.
    pub(super) fn remove(&mut self, name: &str, target: Digest) -> bool {
        let before = self.entries.len();
        self.entries.retain(|entry| self::name(entry) != Some(name) || digest(entry) != Some(target));
        self.entries.len() < before
    }
}

fn name(entry: &Value) -> Option<&str> {
    entry.get("annotations")?.get(NAME_ANNOTATION)?.as_str()
}

fn digest(entry: &Value) -> Option<Digest> {
    entry.get("digest")?.as_str()?.parse().ok()
}

fn entry(name: &str, target: &Descriptor) -> Value {
    let mut entry = json!(target);
    entry["annotations"][NAME_ANNOTATION] = name.into();
    entry
}
