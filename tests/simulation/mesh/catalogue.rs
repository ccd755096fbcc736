//! Which images there are, and which of them a node holds.

use std::collections::BTreeSet;

use lighterman::model::InventoryItem;
use lighterman::oci::{Digest, Repository};
use rand::Rng;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;

/// Stands for an item of the catalogue.
pub(crate) type ItemNumber = u32;

/// Every item that anybody ever holds.
#[derive(Debug, Default)]
pub(crate) struct Catalogue {
    items: Vec<InventoryItem>,
    /// What an image consists of: its blobs and its names.
    images: Vec<Vec<ItemNumber>>,
}

/// Blobs that an image has for itself: an index, a manifest, a config and seven layers.
const OWN_BLOBS: usize = 10;

/// Blobs of the distributions and language runtimes that images are built on, two of which an image takes.
const BASES: usize = 60;

impl Catalogue {
    /// So many images of 12 blobs and two names each.
    pub(crate) fn new(images: usize, rng: &mut SmallRng) -> Self {
        let mut catalogue = Self::default();
        let bases: Vec<_> = (0..BASES).map(|number| catalogue.blob(&format!("base {number}"))).collect();
        for number in 0..images {
            let bases: Vec<_> = bases.choose_multiple(rng, 2).copied().collect();
            catalogue.image(number, &bases);
        }
        catalogue
    }

    /// An image that nobody has yet; returns its number.
    pub(crate) fn new_image(&mut self) -> usize {
        let number = self.images.len();
        let bases: Vec<_> = (0..2).map(|base| self.blob(&format!("base {base} of {number}"))).collect();
        self.image(number, &bases);
        number
    }

    fn image(&mut self, number: usize, bases: &[ItemNumber]) {
        let mut parts: Vec<_> = (0..OWN_BLOBS).map(|blob| self.blob(&format!("image {number} blob {blob}"))).collect();
        let InventoryItem::Blob(root) = self.items[parts[0] as usize] else {
            unreachable!("the first part is the index")
        };
        parts.extend(bases);
        let path = format!("team-{}/service-{number}", number % 37);
        let repository = Repository { registry: "registry.example.com".into(), path };
        for tag in [Some(format!("v1.{number}.0")), None] {
            parts.push(self.add(InventoryItem::Image(repository.clone(), tag, root)));
        }
        self.images.push(parts);
    }

    /// A blob that nobody has yet, of no image.
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

    /// What a number stands for.
    pub(crate) fn item(&self, number: ItemNumber) -> &InventoryItem {
        &self.items[number as usize]
    }

    /// How many items there are; their numbers are smaller.
    pub(crate) fn items(&self) -> ItemNumber {
        ItemNumber::try_from(self.items.len()).expect("fewer items than 2^32")
    }

    /// The blobs and names of an image.
    pub(crate) fn parts(&self, image: usize) -> &[ItemNumber] {
        &self.images[image]
    }

    /// What a node with so many images holds. Few images are everywhere, most are on some nodes: the chance falls with the square root of
    /// the rank, so that the rarest of 2000 is still on one node in twelve.
    pub(crate) fn pick(&self, images: usize, rng: &mut SmallRng) -> BTreeSet<ItemNumber> {
        let mut picked = BTreeSet::new();
        while picked.len() < images.min(self.images.len()) {
            let place: f64 = rng.random();
            picked.insert((place * place * self.images.len() as f64) as usize);
        }
        picked.into_iter().flat_map(|image| self.images[image].iter().copied()).collect()
    }
}
