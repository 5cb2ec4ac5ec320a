//! What a prompt's blocks are expected to take before they are computed, and how right that was.

use std::sync::OnceLock;

use metrics::{counter, gauge};

use super::residency::ExpertId;
use super::routed_rows::{NO_EXPERT, RoutedLayout};

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

    /// What a block behind known ones will take, by them: the experts that half of the nearest ones took, or more. `None`
    /// where none is known before it.
    pub(crate) fn prior_of(&self, block_idx: usize) -> Option<Vec<u8>> {
        let before = (0..block_idx.min(self.blocks.len())).rev();
        let nearest: Vec<&[u8]> = before.filter_map(|idx| self.of_block(idx)).take(NUM_NEAREST).collect();
        let mut prior = vec![0; nearest.first()?.len()];
        for (place, byte) in prior.iter_mut().enumerate() {
            for bit in 0..8 {
                let num_takers = nearest.iter().filter(|map| map[place] >> bit & 1 == 1).count();
                *byte |= u8::from(2 * num_takers >= nearest.len()) << bit;
            }
        }
        Some(prior)
    }
}

/// Known blocks that say what follows them: topics change.
const NUM_NEAREST: usize = 8;

/// Experts of all layers, as [`ExpectedExperts::expect`] takes them.
#[derive(Debug)]
pub(crate) struct ExpertMap<'a> {
    layout: &'a RoutedLayout,
    bits: Vec<u8>,
}

impl<'a> ExpertMap<'a> {
    /// None yet.
    pub(crate) fn new(layout: &'a RoutedLayout) -> Self {
        let num_bytes = layout.layers().iter().map(|layer| layer.num_experts.div_ceil(8)).sum();
        Self { layout, bits: vec![0; num_bytes] }
    }

    pub(crate) fn add(&mut self, experts: &[u8]) {
        self.bits.iter_mut().zip(experts).for_each(|(bits, experts)| *bits |= experts);
    }

    /// The first layer first.
    pub(crate) fn ids(&self) -> Vec<ExpertId> {
        let (mut ids, mut rest) = (Vec::new(), self.bits.as_slice());
        for (layer, shape) in (0..).zip(self.layout.layers()) {
            let (map, behind) = rest.split_at(shape.num_experts.div_ceil(8));
            rest = behind;
            let here =
                (0..shape.num_experts as u32).filter(|expert| map[*expert as usize / 8] >> (expert % 8) & 1 == 1);
            ids.extend(here.map(|expert| ExpertId { layer, expert }));
        }
        ids
    }
}

/// The `predictor` that says what known blocks take.
pub(crate) const KNOWN_BLOCKS: &str = "known_blocks";

/// The one that says by them what those behind them take.
pub(crate) const PRIOR_BLOCKS: &str = "prior_blocks";

/// Experts of blocks that somebody expected and that were computed then, over all layers and blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RoutingAccuracy {
    predictor: &'static str,
    num_expected: u64,
    num_used: u64,
    /// Expected and used.
    num_confirmed: u64,
}

impl RoutingAccuracy {
    /// `predictor`: a label of the metrics.
    pub(crate) fn new(predictor: &'static str) -> Self {
        Self { predictor, num_expected: 0, num_used: 0, num_confirmed: 0 }
    }

    /// Compares what was expected of a block with what its tokens took: `[token][layer][top_k]`.
    pub(crate) fn compare(&mut self, layout: &RoutedLayout, expected: &[u8], experts: &[u16]) {
        let before = *self;
        let (mut rest, mut offset) = (expected, 0);
        for layer in layout.layers() {
            let (map, behind) = rest.split_at(layer.num_experts.div_ceil(8));
            rest = behind;
            let mut used = vec![false; layer.num_experts];
            for token in experts.chunks_exact(layout.ids_per_token()) {
                let ran = token[offset..offset + layer.top_k].iter().filter(|&&expert| expert != NO_EXPERT);
                ran.for_each(|&expert| used[usize::from(expert)] = true);
            }
            offset += layer.top_k;
            for (expert, &was_used) in used.iter().enumerate() {
                let was_expected = map[expert / 8] >> (expert % 8) & 1 == 1;
                self.num_expected += u64::from(was_expected);
                self.num_used += u64::from(was_used);
                self.num_confirmed += u64::from(was_expected && was_used);
            }
        }
        let predictor = self.predictor;
        for (name, added) in [
            ("moesaic_routing_expected_experts_total", self.num_expected - before.num_expected),
            ("moesaic_routing_used_experts_total", self.num_used - before.num_used),
            ("moesaic_routing_confirmed_experts_total", self.num_confirmed - before.num_confirmed),
        ] {
            counter!(name, "predictor" => predictor).increment(added);
        }
        gauge!("moesaic_routing_accuracy", "predictor" => predictor).set(self.recall());
        gauge!("moesaic_routing_precision", "predictor" => predictor).set(self.precision());
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
        let mut accuracy = RoutingAccuracy::new(KNOWN_BLOCKS);
        // Used are 0, 1, 8 of the first layer and 2 of the second; expected 1, 7, 8 and 2.
        accuracy.compare(&layout, &[0b1000_0010, 1, 0b100], &[0, 8, 2, 1, NO_EXPERT, 2]);
        let expected = RoutingAccuracy { predictor: KNOWN_BLOCKS, num_expected: 4, num_used: 4, num_confirmed: 3 };
        assert_eq!(accuracy, expected);
        accuracy.compare(&layout, &[0, 0, 0b111], &[0, 1, 0]);
        assert_eq!((accuracy.recall(), accuracy.precision()), (4.0 / 7.0, 4.0 / 7.0));
    }

    #[test]
    fn maps_are_added_and_read_layer_by_layer() {
        let layout = RoutedLayout::new(&[MoeShape { num_experts: 9, top_k: 2 }, MoeShape { num_experts: 3, top_k: 1 }]);
        let mut map = ExpertMap::new(&layout);
        assert_eq!(map.ids(), []);
        map.add(&[0b1000_0010, 1, 0b100]);
        map.add(&[0b10, 0, 0b1]);
        let found: Vec<(u32, u32)> = map.ids().into_iter().map(|id| (id.layer, id.expert)).collect();
        assert_eq!(found, [(0, 1), (0, 7), (0, 8), (1, 0), (1, 2)]);
    }

    #[test]
    fn what_follows_takes_what_half_of_the_nearest_took() {
        let expected = ExpectedExperts::new(20);
        assert_eq!(expected.prior_of(5), None);
        (0..12).for_each(|idx| expected.expect(idx, vec![if idx < 4 { 0b1000 } else { 0b1 }, u8::from(idx % 2 == 0)]));
        expected.expect(12, vec![0b111, 0]);
        // Of 5 to 12, all took the first, one the second and third; of the second layer three.
        assert_eq!(expected.prior_of(13), Some(vec![0b1, 0]));
        assert_eq!(expected.prior_of(12), Some(vec![0b1, 1]), "four of 4 to 11");
        assert_eq!((expected.prior_of(100), expected.prior_of(0)), (Some(vec![0b1, 0]), None));
        assert_eq!(expected.prior_of(2), Some(vec![0b1000, 1]));
    }

    #[test]
    fn what_was_expected_first_counts() {
        let expected = ExpectedExperts::new(2);
        expected.expect(1, vec![1]);
        expected.expect(1, vec![2]);
        assert_eq!([0, 1, 2].map(|idx| expected.of_block(idx)), [None, Some(&[1][..]), None]);
    }
}
