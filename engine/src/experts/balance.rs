//! How evenly a router spreads its tokens: the numbers of a layer's loads.

use super::loads::LayerLoads;

/// Most shares of [`LayerLoads::hot_shares`].
pub const NUM_HOT: usize = 8;

impl LayerLoads {
    /// Choices of all tokens together.
    pub fn total(&self) -> u64 {
        self.loads.iter().sum()
    }

    /// The largest load over the mean: 1 where all are alike, the number of experts where one has all. `None` without load.
    pub fn imbalance(&self) -> Option<f64> {
        let total = self.total();
        let largest = self.loads.iter().copied().max()?;
        (total > 0).then(|| largest as f64 * self.loads.len() as f64 / total as f64)
    }

    /// Gini coefficient (1912): 0 where all are alike, `1 - 1 / experts` where one has all. `None` without load.
    pub fn gini(&self) -> Option<f64> {
        let total = self.total();
        let mut sorted = self.loads.clone();
        sorted.sort_unstable();
        let weighted: f64 = (1u64..).zip(sorted).map(|(rank, load)| rank as f64 * load as f64).sum();
        let num_experts = self.loads.len() as f64;
        (total > 0).then(|| (2.0 * weighted / total as f64 - num_experts - 1.0) / num_experts)
    }

    /// Shannon entropy of the shares in bits: `2^entropy` experts that are alike would be as hard to guess. `None` without load.
    pub fn entropy_bits(&self) -> Option<f64> {
        let total = self.total() as f64;
        let shares = self.loads.iter().filter(|&&load| load > 0).map(|&load| load as f64 / total);
        (total > 0.0).then(|| shares.map(|share| -share * share.log2()).sum::<f64>().max(0.0))
    }

    /// Of the tokens that the experts could have taken, the share that they took. `None` where they have no capacity.
    pub fn utilization(&self) -> Option<f64> {
        let taken = self.total().saturating_sub(self.num_dropped);
        (self.num_places > 0).then(|| taken as f64 / self.num_places as f64)
    }

    /// Shares of the load, largest first, [`NUM_HOT`] at most; empty without load.
    pub fn hot_shares(&self) -> Vec<f64> {
        let total = self.total();
        let mut sorted = self.loads.clone();
        sorted.sort_unstable_by(|a, b| b.cmp(a));
        sorted.truncate(if total > 0 { NUM_HOT } else { 0 });
        sorted.into_iter().map(|load| load as f64 / total as f64).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(loads: &[u64]) -> LayerLoads {
        LayerLoads { top_k: 1, num_tokens: loads.iter().sum(), loads: loads.into(), num_places: 0, num_dropped: 0 }
    }

    /// Imbalance, Gini, entropy.
    fn check(loads: &[u64], expected: [f64; 3]) {
        let layer = layer(loads);
        let found =
            [layer.imbalance(), layer.gini(), layer.entropy_bits()].map(|number| number.expect("there is load"));
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-12, "{loads:?}: {found} is not {expected}");
        }
    }

    #[test]
    fn known_distributions_have_known_numbers() {
        check(&[5, 5, 5, 5], [1.0, 0.0, 2.0]);
        check(&[0, 0, 8, 0], [4.0, 0.75, 0.0]);
        check(&[9], [1.0, 0.0, 0.0]);
        check(&[0, 2, 2, 0], [2.0, 0.5, 1.0]);
        check(
            &[1, 2, 3, 4],
            [1.6, 0.25, 0.1 * 10f64.log2() + 0.2 * 5f64.log2() + 0.3 * (10.0 / 3.0f64).log2() + 0.4 * 2.5f64.log2()],
        );
        check(&[4, 2, 1, 1], [2.0, 0.3125, 1.75]);
    }

    #[test]
    fn without_load_there_is_nothing_to_say() {
        for loads in [&[][..], &[0, 0, 0]] {
            let layer = layer(loads);
            assert_eq!(
                (layer.imbalance(), layer.gini(), layer.entropy_bits(), layer.utilization()),
                (None, None, None, None)
            );
            assert!(layer.hot_shares().is_empty());
        }
    }

    #[test]
    fn the_hottest_come_first() {
        assert_eq!(layer(&[1, 5, 0, 2]).hot_shares(), [0.625, 0.25, 0.125, 0.0]);
        assert_eq!(layer(&[1; 64]).hot_shares(), [1.0 / 64.0; NUM_HOT]);
    }

    #[test]
    fn utilization_is_what_was_taken_of_the_places() {
        let layer = LayerLoads { num_places: 16, num_dropped: 2, ..layer(&[8, 6]) };
        assert_eq!(layer.utilization(), Some(0.75));
    }
}
