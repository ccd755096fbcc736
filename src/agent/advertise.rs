//! What this node holds, told to its peers: the store is listed, compared with what was said, and the difference announced.
//!
//! Level-triggered on purpose: an event of the store only says "look again", so that a missed one costs a minute and never
//! a wrong announcement. containerd's collector sends no events at all.

mod images;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use self::images::{Images, Looked};
use crate::mesh::Mesh;
use crate::metrics::Metrics;
use crate::model::{ContentChange, Item, MAX_ITEMS, Outage};
use crate::oci::Digest;
use crate::ports::{BlobInfo, ContentStore, ImagesStatus, MAX_NAMES, StoreError};

/// The store is listed again after so long without an event, because collections are silent.
const RELIST: Duration = Duration::from_secs(60);

/// Events come in bursts (a pull commits a blob, labels it, commits the next): wait this long after one before listing.
const SETTLE: Duration = Duration::from_millis(200);

/// How soon a store that could not be listed is tried again.
const RETRY: Duration = Duration::from_secs(2);

/// What is told besides what the store holds. Both are bounded by whoever sends them.
pub struct Besides {
    /// The registries that this node itself cannot reach now.
    pub outages: watch::Receiver<Vec<Outage>>,
    /// The blobs that are on their way.
    pub fetching: watch::Receiver<BTreeSet<Digest>>,
}

/// The target of each image record of this node, by the record's name; `None` before the first list.
pub type NamesHere = Option<Arc<BTreeMap<String, Digest>>>;

/// Keeps what peers know about this node true.
pub struct Advertiser {
    store: Arc<dyn ContentStore>,
    mesh: Mesh,
    metrics: Metrics,
    ready: watch::Sender<bool>,
    outages: watch::Receiver<Vec<Outage>>,
    fetching: watch::Receiver<BTreeSet<Digest>>,
    names: watch::Sender<NamesHere>,
    status: watch::Sender<Option<ImagesStatus>>,
    images: Images,
}

impl Advertiser {
    /// Lists `store` and tells `mesh`. `ready` says whether the store answers; it is part of readiness. `names` takes the image records that are here, `status` how
    /// many of them are told.
    pub fn new(
        store: Arc<dyn ContentStore>,
        mesh: Mesh,
        metrics: Metrics,
        ready: watch::Sender<bool>,
        besides: Besides,
        names: watch::Sender<NamesHere>,
        status: watch::Sender<Option<ImagesStatus>>,
    ) -> Self {
        let Besides { outages, fetching } = besides;
        Self { store, mesh, metrics, ready, outages, fetching, names, status, images: Images::default() }
    }

    /// Announces until stopped.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut changes = self.store.changes();
        let mut told = BTreeSet::new();
        loop {
            changes.mark_unchanged();
            self.outages.mark_unchanged();
            self.fetching.mark_unchanged();
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
            let listed_again = tokio::time::sleep(wait);
            tokio::pin!(listed_again);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    _ = changes.changed() => tokio::time::sleep(SETTLE).await,
                    // A sender that is gone has nothing more to say.
                    Ok(()) = self.outages.changed() => {}
                    Ok(()) = self.fetching.changed() => {
                        self.tell_fetching(&mut told).await;
                        continue;
                    }
                    () = &mut listed_again => {}
                }
                break;
            }
        }
    }

    /// Everything that can be fetched from here: blobs that are there, and the names of images that are whole for some platform. Also what
    /// this node itself knows of registries.
    async fn list(&mut self) -> Result<BTreeSet<Item>, StoreError> {
        let blobs = self.store.blobs().await?;
        let records = self.store.images().await?;
        let targets = records.iter().map(|record| (record.name.clone(), record.target.digest));
        self.names.send_replace(Some(Arc::new(targets.collect())));
        let looked = self.images.look(&*self.store, &blobs, &records).await?;
        self.metrics.images_incomplete(looked.incomplete);
        let reasons = looked.reasons.iter().take(MAX_NAMES).map(|(reason, images)| (reason.clone(), *images)).collect();
        let status = ImagesStatus { announced: looked.names.len(), incomplete: looked.incomplete, reasons };
        self.status.send_replace(Some(status));
        let fetching = self.fetching.borrow().iter().copied().map(Item::Fetching).collect();
        Ok(everything(&blobs, looked, &self.outages.borrow(), fetching))
    }

    /// That blobs are on their way is told at once: those who want them too are about to ask. That they are not any more is found when the store
    /// is listed next, which is soon after a blob has come; so nobody misses the moment between.
    async fn tell_fetching(&mut self, told: &mut BTreeSet<Item>) {
        let fetching: Vec<_> = self.fetching.borrow_and_update().iter().copied().map(Item::Fetching).collect();
        let mut held = told.clone();
        held.extend(fetching);
        self.tell(told, &held).await;
        *told = held;
    }

    async fn tell(&self, told: &BTreeSet<Item>, held: &BTreeSet<Item>) {
        self.metrics.announcing(held.len());
        let changes = difference(told, held);
        if !changes.is_empty() {
            self.mesh.announce(changes).await;
        }
    }
}

/// All that is to be told, bounded.
fn everything(blobs: &[BlobInfo], looked: Looked, outages: &[Outage], fetching: BTreeSet<Item>) -> BTreeSet<Item> {
    let Looked { names, damaged, incomplete: _, reasons: _ } = looked;
    let sound = blobs.iter().map(|blob| blob.digest).filter(|digest| !damaged.contains(digest));
    let mut held: BTreeSet<_> = sound.map(Item::Blob).collect();
    held.extend(names);
    held.extend(outages.iter().cloned().map(Item::Outage));
    held.extend(fetching);
    if held.len() > MAX_ITEMS {
        tracing::warn!(
            items = held.len(),
            limit = MAX_ITEMS,
            "this node holds more than may be announced; the rest is not"
        );
        // Blobs are the first in order and go first.
        held = held.into_iter().rev().take(MAX_ITEMS).collect();
    }
    held
}

/// What makes of those who were told the one what they need to know the other.
fn difference(told: &BTreeSet<Item>, held: &BTreeSet<Item>) -> Vec<ContentChange> {
    let gone = told.difference(held).cloned().map(ContentChange::Removed);
    gone.chain(held.difference(told).cloned().map(ContentChange::Added)).collect()
}
