//! The next layer of an image to unpack, and the size of unpacked layers.

use std::collections::HashSet;

use crate::oci::{Descriptor, Digest, StackedLayer};

/// An image's layers, some of them unpacked.
#[derive(Debug, Clone)]
pub struct LayerStack {
    layers: Vec<StackedLayer>,
    done: usize,
}

/// The next step of unpacking.
#[derive(Debug, PartialEq, Eq)]
pub enum NextLayer<'a> {
    /// Unpack this layer.
    Unpack(&'a StackedLayer),
    /// All layers are unpacked. Holds the chain ID of the topmost layer, if there is a layer.
    Complete(Option<Digest>),
}

impl LayerStack {
    /// `layers` begins with the lowest layer.
    pub fn new(layers: Vec<StackedLayer>) -> Self {
        Self { layers, done: 0 }
    }

    /// The lowest packed layer once its blob is here, because a snapshot is made on top of the
    /// layers below. `None` while the blob is missing.
    pub fn next(&self, present: &HashSet<Digest>) -> Option<NextLayer<'_>> {
        match self.layers.get(self.done) {
            Some(layer) => present.contains(&layer.blob.digest).then_some(NextLayer::Unpack(layer)),
            None => Some(NextLayer::Complete(self.layers.last().map(|layer| layer.chain_id))),
        }
    }

    /// Records that the layer of [`LayerStack::next`] is unpacked.
    pub fn mark_unpacked(&mut self) {
        self.done = self.layers.len().min(self.done + 1);
    }

    /// The number of the next layer, from 1, and the number of layers.
    pub fn position(&self) -> (usize, usize) {
        (self.layers.len().min(self.done + 1), self.layers.len())
    }
}

/// Bytes at the end of a layer that [`unpacked_bytes`] reads.
pub const TRAILER: usize = 4;

/// Assumed ratio of a zstd layer's unpacked size to its compressed size, because a zstd frame need
/// not state the size. Layers of distributions have 2 to 4.
const ZSTD_RATIO: u64 = 3;

/// Largest assumed ratio for a gzip layer with more than 4 GiB of files.
const GZIP_RATIO: u64 = 4;

/// The size of the archive in a layer. The layer's snapshot takes at least as much.
///
/// gzip ends with the size modulo 4 GiB (RFC 1952, ISIZE). Of the possible sizes, the smallest one
/// that is at least the compressed size counts. A file of several gzip members ends with the size
/// of the last member; where that yields no likely size, the compressed size counts.
pub fn unpacked_bytes(layer: &Descriptor, trailer: [u8; TRAILER]) -> u64 {
    let (media_type, size) = (layer.media_type.as_str(), layer.size);
    if media_type.ends_with("zstd") {
        return size.saturating_mul(ZSTD_RATIO);
    }
    if !media_type.ends_with("gzip") {
        return size;
    }
    let (low, wrap) = (u64::from(u32::from_le_bytes(trailer)), 1_u64 << 32);
    let wraps = size.saturating_sub(low).div_ceil(wrap);
    let whole = low.saturating_add(wraps.saturating_mul(wrap));
    if wraps == 0 || whole <= size.saturating_mul(GZIP_RATIO) { whole } else { size }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn stack(names: &[&str]) -> LayerStack {
        let layer = |name: &&str| {
            let (blob, chain_id) = (digest(name), digest(&format!("chain {name}")));
            let blob =
                Descriptor { media_type: String::new(), digest: blob, size: 1, platform: None, attestation: false };
            StackedLayer { blob, diff_id: digest(&format!("diff {name}")), parent: None, chain_id }
        };
        LayerStack::new(names.iter().map(layer).collect())
    }

    fn present(names: &[&str]) -> HashSet<Digest> {
        names.iter().map(|name| digest(name)).collect()
    }

    /// The digest of the layer to unpack.
    fn layer(next: Option<NextLayer<'_>>) -> Option<Digest> {
        if let Some(NextLayer::Unpack(layer)) = next { Some(layer.blob.digest) } else { None }
    }

    #[test]
    fn a_layer_waits_for_the_layers_beneath() {
        let mut stack = stack(&["base", "middle", "top"]);
        assert_eq!(stack.next(&present(&["middle", "top"])), None);
        assert_eq!(layer(stack.next(&present(&["base", "top"]))), Some(digest("base")));
        assert_eq!(stack.position(), (1, 3));
        stack.mark_unpacked();
        assert_eq!(stack.next(&present(&["base", "top"])), None);
        assert_eq!(stack.position(), (2, 3));
    }

    #[test]
    fn a_complete_stack_yields_the_chain_id_of_its_top_layer() {
        let mut stack = stack(&["base", "top"]);
        let all = present(&["base", "top"]);
        stack.mark_unpacked();
        assert_eq!(layer(stack.next(&all)), Some(digest("top")));
        stack.mark_unpacked();
        assert_eq!(stack.next(&all), Some(NextLayer::Complete(Some(digest("chain top")))));
        stack.mark_unpacked();
        assert_eq!(
            (stack.next(&all), stack.position()),
            (Some(NextLayer::Complete(Some(digest("chain top")))), (2, 2))
        );
    }

    #[test]
    fn an_image_without_layers_is_complete_at_once() {
        assert_eq!(stack(&[]).next(&present(&[])), Some(NextLayer::Complete(None)));
    }

    #[test]
    fn the_same_blob_in_two_places_is_unpacked_twice() {
        let mut stack = stack(&["base", "base"]);
        let all = present(&["base"]);
        stack.mark_unpacked();
        assert_eq!(layer(stack.next(&all)), Some(digest("base")));
    }

    #[test]
    fn a_gzip_layer_has_the_unpacked_size_of_its_trailer() {
        const MIB: u64 = 1 << 20;
        let layer = |kind: &str, size| Descriptor {
            media_type: format!("application/vnd.oci.image.layer.v1.tar{kind}"),
            digest: digest("layer"),
            size,
            platform: None,
            attestation: false,
        };
        let gzip = |size, isize: u64| unpacked_bytes(&layer("+gzip", size), (isize as u32).to_le_bytes());
        assert_eq!(gzip(30 * MIB, 75 * MIB), 75 * MIB);
        assert_eq!(gzip(2048 * MIB, 5000 * MIB), 5000 * MIB, "a size of more than 4 GiB");
        assert_eq!(gzip(50 * MIB, 1000), 50 * MIB, "the size of the last member");
        assert_eq!(gzip(u64::MAX, 7), u64::MAX);
        assert_eq!(unpacked_bytes(&layer("+zstd", 10), [9; 4]), 30);
        assert_eq!(unpacked_bytes(&layer("", 10), [9; 4]), 10);
    }
}
