//! Announces this node's content to peers: lists the store, compares the list with the earlier
//! announcements, and announces the difference.
//!
//! Level-triggered: an event of the store only causes a new list, so a lost event costs a minute
//! and never a wrong announcement. containerd's collector sends no events at all.

mod image_scanner;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::image_scanner::{ImageScan, ImageScanner};
use crate::control::{ImagesStatus, MAX_NAMES};
use crate::metrics::Metrics;
use crate::model::{InventoryChange, InventoryItem, MAX_ITEMS, Outage};
use crate::oci::Digest;
use crate::ports::{BlobInfo, ContentStore, MeshCommands, StoreError};

/// Interval of lists without an event, because collections send none.
const LIST_PERIOD: Duration = Duration::from_secs(60);

/// Delay between an event and the list. Events come in bursts: a pull commits a blob, labels the
/// blob, and commits the next one.
const SETTLE_DELAY: Duration = Duration::from_millis(200);

/// Retry delay after a failed list.
const RETRY_DELAY: Duration = Duration::from_secs(2);

/// Announced items besides the store's content. The senders bound both lists.
pub struct VolatileItems {
    /// Registries that this node itself found down.
    pub outages: watch::Receiver<Vec<Outage>>,
    /// Blobs that are being downloaded.
    pub fetching: watch::Receiver<BTreeSet<Digest>>,
}

/// Target of each image record of this node, by the record's name; `None` before the first list.
pub type RecordTargets = Option<Arc<BTreeMap<String, Digest>>>;

/// Keeps the announcements of this node true.
pub struct Announcer {
    store: Arc<dyn ContentStore>,
    mesh: Arc<dyn MeshCommands>,
    metrics: Metrics,
    ready: watch::Sender<bool>,
    outages: watch::Receiver<Vec<Outage>>,
    fetching: watch::Receiver<BTreeSet<Digest>>,
    record_targets: watch::Sender<RecordTargets>,
    status: watch::Sender<Option<ImagesStatus>>,
    scanner: ImageScanner,
}

impl Announcer {
    /// Announces the content of `store` over `mesh`. `ready` is the readiness check of the store.
    /// `names` receives the image records of this node, and `status` the counts of announced and
    /// incomplete images.
    pub fn new(
        store: Arc<dyn ContentStore>,
        mesh: Arc<dyn MeshCommands>,
        metrics: Metrics,
        ready: watch::Sender<bool>,
        volatile_items: VolatileItems,
        record_targets: watch::Sender<RecordTargets>,
        status: watch::Sender<Option<ImagesStatus>>,
    ) -> Self {
        let VolatileItems { outages, fetching } = volatile_items;
        Self {
            store,
            mesh,
            metrics,
            ready,
            outages,
            fetching,
            record_targets,
            status,
            scanner: ImageScanner::default(),
        }
    }

    /// Announces until stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.store.changes();
        let mut announced = BTreeSet::new();
        loop {
            changes.mark_unchanged();
            self.outages.mark_unchanged();
            self.fetching.mark_unchanged();
            let wait = match self.list_items().await {
                Ok(items) => {
                    self.ready.send_replace(true);
                    self.announce(&announced, &items).await;
                    announced = items;
                    LIST_PERIOD
                }
                Err(error) => {
                    if self.ready.send_replace(false) {
                        tracing::warn!(
                            %error,
                            "the content store cannot be listed; earlier announcements stay in force"
                        );
                    }
                    self.metrics.store_list_failed();
                    RETRY_DELAY
                }
            };
            let listed_again = tokio::time::sleep(wait);
            tokio::pin!(listed_again);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = changes.changed() => tokio::time::sleep(SETTLE_DELAY).await,
                    // A sender that ended sends no further changes.
                    Ok(()) = self.outages.changed() => {}
                    Ok(()) = self.fetching.changed() => {
                        self.announce_downloads(&mut announced).await;
                        continue;
                    }
                    () = &mut listed_again => {}
                }
                break;
            }
        }
    }

    /// All items that peers can fetch from this node: blobs, and the names of images that are whole
    /// for some platform. Also the outages that this node found.
    async fn list_items(&mut self) -> Result<BTreeSet<InventoryItem>, StoreError> {
        let blobs = self.store.blobs().await?;
        let records = self.store.images().await?;
        let targets = records.iter().map(|record| (record.name.clone(), record.target.digest));
        self.record_targets.send_replace(Some(Arc::new(targets.collect())));
        let scan = self.scanner.scan(&*self.store, &blobs, &records).await?;
        self.metrics.images_incomplete(scan.incomplete);
        let reasons = scan.reasons.iter().take(MAX_NAMES).map(|(reason, images)| (reason.clone(), *images)).collect();
        let status = ImagesStatus { announced: scan.names.len(), incomplete: scan.incomplete, reasons };
        self.status.send_replace(Some(status));
        let fetching = self.fetching.borrow().iter().copied().map(InventoryItem::Fetching).collect();
        Ok(announceable_items(&blobs, scan, &self.outages.borrow(), fetching))
    }

    /// Announces new downloads at once, because peers that need the same blobs are about to request
    /// them. Only the next list withdraws a finished download. The blob's commit causes that list,
    /// so the blob is announced by then.
    async fn announce_downloads(&mut self, announced: &mut BTreeSet<InventoryItem>) {
        let fetching: Vec<_> = self.fetching.borrow_and_update().iter().copied().map(InventoryItem::Fetching).collect();
        let mut items = announced.clone();
        items.extend(fetching);
        self.announce(announced, &items).await;
        *announced = items;
    }

    async fn announce(&self, announced: &BTreeSet<InventoryItem>, items: &BTreeSet<InventoryItem>) {
        self.metrics.items_announced(items.len());
        let changes = changes_between(announced, items);
        if !changes.is_empty() {
            self.mesh.announce(changes).await;
        }
    }
}

/// All items to announce, bounded by [`MAX_ITEMS`].
fn announceable_items(
    blobs: &[BlobInfo],
    scan: ImageScan,
    outages: &[Outage],
    fetching: BTreeSet<InventoryItem>,
) -> BTreeSet<InventoryItem> {
    let ImageScan { names, damaged, incomplete: _, reasons: _ } = scan;
    let undamaged = blobs.iter().map(|blob| blob.digest).filter(|digest| !damaged.contains(digest));
    let mut items: BTreeSet<_> = undamaged.map(InventoryItem::Blob).collect();
    items.extend(names);
    items.extend(outages.iter().cloned().map(InventoryItem::Outage));
    items.extend(fetching);
    if items.len() > MAX_ITEMS {
        tracing::warn!(
            items = items.len(),
            limit = MAX_ITEMS,
            "this node holds more than may be announced; some blobs are not announced"
        );
        // Blobs come first in the order and are dropped first.
        items = items.into_iter().rev().take(MAX_ITEMS).collect();
    }
    items
}

/// The removals and additions that turn the earlier announcements into the current list.
fn changes_between(announced: &BTreeSet<InventoryItem>, items: &BTreeSet<InventoryItem>) -> Vec<InventoryChange> {
    let removed = announced.difference(items).cloned().map(InventoryChange::Removed);
    removed.chain(items.difference(announced).cloned().map(InventoryChange::Added)).collect()
}
