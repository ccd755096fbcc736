//! Which layer of an image may be unpacked next.

use std::collections::HashSet;

use crate::oci::{Digest, StackedLayer};

/// An image's layers, some of them unpacked.
#[derive(Debug, Clone)]
pub struct Stack {
    layers: Vec<StackedLayer>,
    done: usize,
}

/// What there is to do.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<'a> {
    /// This layer.
    Unpack(&'a StackedLayer),
    /// Nothing more. The name of the topmost layer, if there are any.
    Whole(Option<Digest>),
}

impl Stack {
    /// All of these, the lowest first.
    pub fn new(layers: Vec<StackedLayer>) -> Self {
        Self { layers, done: 0 }
    }

    /// The lowest layer that is left, once its blob is here: a snapshot is made on top of those beneath it. `None` while it has to come.
    pub fn next(&self, here: &HashSet<Digest>) -> Option<Next<'_>> {
        match self.layers.get(self.done) {
            Some(layer) => here.contains(&layer.blob.digest).then_some(Next::Unpack(layer)),
            None => Some(Next::Whole(self.layers.last().map(|layer| layer.chain_id))),
        }
    }

    /// What was next is unpacked.
    pub fn unpacked(&mut self) {
        self.done = self.layers.len().min(self.done + 1);
    }

    /// The number of the layer that is next, counted from 1, and of how many.
    pub fn position(&self) -> (usize, usize) {
        (self.layers.len().min(self.done + 1), self.layers.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oci::Descriptor;

    fn digest(name: &str) -> Digest {
        Digest::of(name.as_bytes())
    }

    fn stack(names: &[&str]) -> Stack {
        let layer = |name: &&str| {
            let (blob, chain_id) = (digest(name), digest(&format!("chain {name}")));
            let blob =
                Descriptor { media_type: String::new(), digest: blob, size: 1, platform: None, attestation: false };
            StackedLayer { blob, diff_id: digest(&format!("diff {name}")), parent: None, chain_id }
        };
        Stack::new(names.iter().map(layer).collect())
    }

    fn here(names: &[&str]) -> HashSet<Digest> {
        names.iter().map(|name| digest(name)).collect()
    }

    /// The layer that is next.
    fn layer(next: Option<Next<'_>>) -> Option<Digest> {
        if let Some(Next::Unpack(layer)) = next { Some(layer.blob.digest) } else { None }
    }

    #[test]
    fn a_layer_waits_for_those_beneath_it() {
        let mut stack = stack(&["base", "middle", "top"]);
        assert_eq!(stack.next(&here(&["middle", "top"])), None);
        assert_eq!(layer(stack.next(&here(&["base", "top"]))), Some(digest("base")));
        assert_eq!(stack.position(), (1, 3));
        stack.unpacked();
        assert_eq!(stack.next(&here(&["base", "top"])), None);
        assert_eq!(stack.position(), (2, 3));
    }

    #[test]
    fn the_last_layer_s_name_is_what_is_left() {
        let mut stack = stack(&["base", "top"]);
        let all = here(&["base", "top"]);
        stack.unpacked();
        assert_eq!(layer(stack.next(&all)), Some(digest("top")));
        stack.unpacked();
        assert_eq!(stack.next(&all), Some(Next::Whole(Some(digest("chain top")))));
        stack.unpacked();
        assert_eq!((stack.next(&all), stack.position()), (Some(Next::Whole(Some(digest("chain top")))), (2, 2)));
    }

    #[test]
    fn an_image_without_layers_is_whole_at_once() {
        assert_eq!(stack(&[]).next(&here(&[])), Some(Next::Whole(None)));
    }

    #[test]
    fn the_same_blob_in_two_places_is_unpacked_twice() {
        let mut stack = stack(&["base", "base"]);
        let all = here(&["base"]);
        stack.unpacked();
        assert_eq!(layer(stack.next(&all)), Some(digest("base")));
    }
}
