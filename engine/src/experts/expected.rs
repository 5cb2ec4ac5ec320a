//! What a prompt's blocks are expected to take before they are computed, and how right that was.

use std::sync::OnceLock;

use metrics::{counter, gauge};

use super::routed_rows::RoutedLayout;

/// The experts that the leading blocks of a prompt took when they were computed before, here or elsewhere. Blocks may become
/// known while the request already runs.
#[derive(Debug)]
pub struct ExpectedExperts {
    blocks: Box<[OnceLock<Box<[u8]>>]>,
}

impl ExpectedExperts {
    /// Nothing is expected of so many blocks yet.
    pub fn new(num_blocks: usize) -> Self {
        Self { blocks: (0..num_blocks).map(|_| OnceLock::new()).collect() }
    }

    /// `used`: for each layer of [`crate::ModelSummary::routed`] a map of ceil(E / 8) bytes, with a bit for each expert that is
    /// expected, expert 0 the lowest of the first byte. What was said first of a block counts.
    ///
    /// # Panics
    /// There is no such block.
    pub fn expect(&self, block_idx: usize, used: Vec<u8>) {
        self.blocks[block_idx].get_or_init(|| used.into());
    }

    pub(crate) fn of_block(&self, block_idx: usize) -> Option<&[u8]> {
        self.blocks.get(block_idx)?.get().map(AsRef::as_ref)
    }
}

/// Experts of blocks that somebody expected and that were computed then, over all layers and blocks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct RoutingAccuracy {
    num_expected: u64,
    num_used: u64,
    /// Expected and used.
    num_confirmed: u64,
}

impl RoutingAccuracy {
    /// Compares what was expected of a block with what its tokens took: `[token][layer][top_k]`.
    pub(crate) fn compare(&mut self, layout: &RoutedLayout, expected: &[u8], experts: &[u16]) {
        let before = *self;
        let (mut rest, mut offset) = (expected, 0);
        for layer in layout.layers() {
            let (map, behind) = rest.split_at(layer.num_experts.div_ceil(8));
            rest = behind;
            let mut used = vec![false; layer.num_experts];
            for token in experts.chunks_exact(layout.ids_per_token()) {
                token[offset..offset + layer.top_k].iter().for_each(|&expert| used[usize::from(expert)] = true);
            }
            offset += layer.top_k;
            for (expert, &was_used) in used.iter().enumerate() {
                let was_expected = map[expert / 8] >> (expert % 8) & 1 == 1;
                self.num_expected += u64::from(was_expected);
                self.num_used += u64::from(was_used);
                self.num_confirmed += u64::from(was_expected && was_used);
            }
        }
        counter!("moesaic_routing_expected_experts_total").increment(self.num_expected - before.num_expected);
        counter!("moesaic_routing_used_experts_total").increment(self.num_used - before.num_used);
        counter!("moesaic_routing_confirmed_experts_total").increment(self.num_confirmed - before.num_confirmed);
        gauge!("moesaic_routing_accuracy").set(self.recall());
        gauge!("moesaic_routing_precision").set(self.precision());
    }

    /// Of the experts that were used, the share that was expected.
    fn recall(self) -> f64 {
        self.num_confirmed as f64 / self.num_used.max(1) as f64
    }

    /// Of the experts that were expected, the share that was used.
    fn precision(self) -> f64 {
        self.num_confirmed as f64 / self.num_expected.max(1) as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::experts::MoeShape;

    #[test]
    fn experts_are_compared_layer_by_layer() {
        let layout = RoutedLayout::new(&[MoeShape { num_experts: 9, top_k: 2 }, MoeShape { num_experts: 3, top_k: 1 }]);
        let mut accuracy = RoutingAccuracy::default();
        // Used are 0, 1, 8 of the first layer and 2 of the second; expected 1, 7, 8 and 2.
        accuracy.compare(&layout, &[0b1000_0010, 1, 0b100], &[0, 8, 2, 1, 8, 2]);
        assert_eq!(accuracy, RoutingAccuracy { num_expected: 4, num_used: 4, num_confirmed: 3 });
        accuracy.compare(&layout, &[0, 0, 0b111], &[0, 1, 0]);
        assert_eq!((accuracy.recall(), accuracy.precision()), (4.0 / 7.0, 4.0 / 7.0));
    }

    #[test]
    fn what_was_expected_first_counts() {
        let expected = ExpectedExperts::new(2);
        expected.expect(1, vec![1]);
        expected.expect(1, vec![2]);
        assert_eq!([0, 1, 2].map(|idx| expected.of_block(idx)), [None, Some(&[1][..]), None]);
    }
}
