//! All images, and the selection of images on a node.

use std::collections::BTreeSet;

use lighterman::model::InventoryItem;
use lighterman::oci::{Digest, Repository};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

/// Index of an item in the catalogue.
pub(crate) type ItemNumber = u32;

/// All items that any node ever has.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    items: Vec<InventoryItem>,
    /// The items of each image: blobs and names.
    images: Vec<Vec<ItemNumber>>,
}

/// Blobs that only one image has: an index, a manifest, a config and seven layers.
const OWN_BLOBS: usize = 10;

/// Layers of distributions and language runtimes. Each image uses two of them.
const BASES: usize = 60;

impl Catalogue {
    /// Makes this number of images, of 12 blobs and two names each.
    pub(crate) fn new(images: usize, rng: &mut SmallRng) -> Self {
        let mut catalogue = Self::default();
        let bases: Vec<_> = (0..BASES).map(|number| catalogue.blob(&format!("base {number}"))).collect();
        for number in 0..images {
            let bases: Vec<_> = bases.choose_multiple(rng, 2).copied().collect();
            catalogue.image(number, &bases);
        }
        catalogue
    }

    /// Makes an image that no node has yet. Returns the image's number.
    pub(crate) fn new_image(&mut self) -> usize {
        let number = self.images.len();
        let bases: Vec<_> = (0..2).map(|base| self.blob(&format!("base {base} of {number}"))).collect();
        self.image(number, &bases);
        number
    }

    fn image(&mut self, number: usize, bases: &[ItemNumber]) {
        let mut items: Vec<_> = (0..OWN_BLOBS).map(|blob| self.blob(&format!("image {number} blob {blob}"))).collect();
        let InventoryItem::Blob(index) = self.items[items[0] as usize] else {
            unreachable!("the first part is the index")
        };
        items.extend(bases);
        let path = format!("team-{}/service-{number}", number % 37);
        let repository = Repository { registry: "registry.example.com".into(), path };
        for tag in [Some(format!("v1.{number}.0")), None] {
            items.push(self.add(InventoryItem::Image(repository.clone(), tag, index)));
        }
        self.images.push(items);
    }

    /// Makes a blob that no node has yet and that belongs to no image.
    pub(crate) fn new_blob(&mut self, name: &str) -> ItemNumber {
        self.blob(&format!("blob {name}"))
    }

    fn blob(&mut self, name: &str) -> ItemNumber {
        self.add(InventoryItem::Blob(Digest::of(name.as_bytes())))
    }

    fn add(&mut self, item: InventoryItem) -> ItemNumber {
        self.items.push(item);
        ItemNumber::try_from(self.items.len() - 1).expect("fewer items than 2^32")
    }

    pub(crate) fn item(&self, number: ItemNumber) -> &InventoryItem {
        &self.items[number as usize]
    }

    /// The number of items. All item numbers are smaller.
    pub(crate) fn items(&self) -> ItemNumber {
        ItemNumber::try_from(self.items.len()).expect("fewer items than 2^32")
    }

    pub(crate) fn image_items(&self, image: usize) -> &[ItemNumber] {
        &self.images[image]
    }

    /// The items of a node with this number of images. Few images are on all nodes, most are on
    /// some nodes: the probability of an image falls with the square root of its rank. At 300 of
    /// 2000 images per node, the rarest image is on one node in twelve.
    pub(crate) fn pick(&self, images: usize, rng: &mut SmallRng) -> BTreeSet<ItemNumber> {
        let mut picked = BTreeSet::new();
        while picked.len() < images.min(self.images.len()) {
            let position: f64 = rng.random();
            picked.insert((position * position * self.images.len() as f64) as usize);
        }
        picked.into_iter().flat_map(|image| self.images[image].iter().copied()).collect()
    }
}
