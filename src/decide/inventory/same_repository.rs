//! The same-repository rule: a peer provides an image to a repository only if the peer records the
//! image in this repository.

use super::Inventory;
use super::peer_sets::Bitmap;
use crate::model::PeerId;
use crate::oci::{Digest, Repository};

impl Inventory {
    /// The peers that have an image's index or manifest *and* a record of it in this same
    /// repository.
    ///
    /// A digest alone gives no permission: a request with an invented registry could fetch any
    /// image.
    pub fn image_providers(&self, repository: &Repository, image: Digest) -> Vec<PeerId> {
        let Some(providers) = self.content.blob(image) else { return Vec::new() };
        let mut with_record = Bitmap::default();
        for recorded in self.content.records_of(repository, image) {
            with_record.extend(recorded.within(self.peers.up()));
        }
        self.peers.ids(providers.within(&with_record))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decide::inventory::tests::{blob, id, inventory, repository, tagged};
    use crate::model::InventoryItem;

    #[test]
    fn an_image_provider_has_the_blob_and_a_record_in_the_same_repository() {
        let image = blob("index");
        let inventory = inventory([
            (1, vec![InventoryItem::Blob(image), tagged("team/app", "v1", image)]),
            (2, vec![InventoryItem::Blob(image), tagged("other/app", "v1", image)]),
            (3, vec![tagged("team/app", "v1", image)]),
            (4, vec![InventoryItem::Blob(image), InventoryItem::Image(repository("team/app"), None, image)]),
            (5, vec![InventoryItem::Blob(image), tagged("team/app", "v1", blob("another"))]),
        ]);
        assert_eq!(inventory.image_providers(&repository("team/app"), image), [id(1), id(4)]);
        assert_eq!(inventory.image_providers(&repository("other/app"), image), [id(2)]);
        let elsewhere = Repository { registry: "invented.test".into(), path: "team/app".into() };
        assert_eq!(inventory.image_providers(&elsewhere, image), [], "an invented registry has no provider");
    }
}
