//! What this node holds, told to its peers: the store is listed, compared with what was said, and the difference announced.
//!
//! Level-triggered on purpose: an event of the store only says "look again", so that a missed one costs a minute and never
//! a wrong announcement. containerd's collector sends no events at all.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::model::ContentChange;
use crate::model::MAX_ITEMS;
use crate::oci::{Digest, Reference};
use crate::ports::{ContentStore, StoreError};

/// The store is listed again after so long without an event, because collections are silent.
const RELIST: Duration = Duration::from_secs(60);

/// Events come in bursts (a pull commits a blob, labels it, commits the next): wait this long after one before listing.
const SETTLE: Duration = Duration::from_millis(200);

/// How soon a store that could not be listed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// Keeps what peers know about this node true.
pub struct Advertiser {
    /// What is listed.
    pub store: Arc<dyn ContentStore>,
    /// Who is told.
    pub mesh: Mesh,
    /// Counts items.
    pub metrics: Metrics,
    /// Whether the store answers; part of readiness.
    pub ready: watch::Sender<bool>,
}

impl Advertiser {
    /// Announces until stopped.
    pub async fn run(self, stop: CancellationToken) {
        let mut changes = self.store.changes();
        let mut told = BTreeSet::new();
        loop {
            changes.mark_unchanged();
            let wait = match self.list().await {
                Ok(held) => {
                    self.ready.send_replace(true);
                    self.tell(&told, &held).await;
                    told = held;
                    RELIST
                }
                Err(error) => {
                    if self.ready.send_replace(false) {
                        tracing::warn!(%error, "the content store cannot be listed; what was announced stays announced");
                    }
                    self.metrics.store_list_failed();
                    RETRY
                }
            };
            tokio::select! {
                () = stop.cancelled() => return,
                _ = changes.changed() => tokio::time::sleep(SETTLE).await,
                () = tokio::time::sleep(wait) => {}
            }
        }
    }

    /// Everything that can be fetched from here: blobs that are there, and names whose target is there.
    async fn list(&self) -> Result<BTreeSet<ContentChange>, StoreError> {
        let blobs: BTreeSet<Digest> = self.store.blobs().await?.into_iter().map(|blob| blob.digest).collect();
        let images = self.store.images().await?;
        let names = images.into_iter().filter(|record| blobs.contains(&record.target.digest)).filter_map(|record| {
            // Names that are no references (image IDs, what people chose) mean nothing to another node.
            let reference: Reference = record.name.parse().ok()?;
            let root = record.target.digest;
            match reference {
                Reference::Tag(repository, tag) => Some(ContentChange::Tagged(repository, Some(tag), root)),
                Reference::Digest(repository, named) if named == root => {
                    Some(ContentChange::Tagged(repository, None, root))
                }
                Reference::Digest(..) => None,
            }
        });
        // Names first: if there is more than may be told, an image whose blobs are missing is at least known of.
        let mut held: BTreeSet<_> = names.collect();
        held.extend(blobs.iter().copied().map(ContentChange::BlobAdded));
        if held.len() > MAX_ITEMS {
            tracing::warn!(
                items = held.len(),
                limit = MAX_ITEMS,
                "this node holds more than may be announced; the rest is not"
            );
            held = held.into_iter().rev().take(MAX_ITEMS).collect();
        }
        Ok(held)
    }

    async fn tell(&self, told: &BTreeSet<ContentChange>, held: &BTreeSet<ContentChange>) {
        self.metrics.announcing(held.len());
        let changes = difference(told, held);
        if !changes.is_empty() {
            self.mesh.announce(changes).await;
        }
    }
}

/// What makes of those who were told the one what they need to know the other.
fn difference(told: &BTreeSet<ContentChange>, held: &BTreeSet<ContentChange>) -> Vec<ContentChange> {
    told.difference(held).cloned().map(withdrawn).chain(held.difference(told).cloned()).collect()
}

/// The change that undoes an addition.
fn withdrawn(item: ContentChange) -> ContentChange {
    match item {
        ContentChange::BlobAdded(digest) | ContentChange::BlobRemoved(digest) => ContentChange::BlobRemoved(digest),
        ContentChange::Tagged(repository, tag, root) | ContentChange::Untagged(repository, tag, root) => {
            ContentChange::Untagged(repository, tag, root)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_gone_is_withdrawn_and_only_what_is_new_is_told() {
        let blob = |name: &str| ContentChange::BlobAdded(Digest::of(name.as_bytes()));
        let Ok(Reference::Tag(repository, tag)) = "r.test/a:1".parse() else { panic!("a tag") };
        let root = Digest::of(b"root");
        let name = ContentChange::Tagged(repository.clone(), Some(tag.clone()), root);
        let changes = difference(&[blob("old"), blob("same"), name].into(), &[blob("same"), blob("new")].into());
        let expected = [
            ContentChange::BlobRemoved(Digest::of(b"old")),
            ContentChange::Untagged(repository, Some(tag), root),
            blob("new"),
        ];
        assert_eq!(changes, expected);
    }
}
