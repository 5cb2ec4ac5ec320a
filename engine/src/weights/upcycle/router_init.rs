//! Random router weights that depend on (seed, layer, index) alone, so any part can be drawn in any order.

/// Standard deviation of a fresh router, Mixtral's `initializer_range`.
pub(super) const STANDARD_DEVIATION: f64 = 0.02;

/// Row-major router weights `[num_experts, hidden_size]` of one layer, normal(0, 0.02).
pub(super) fn router_weights(seed: u64, layer_idx: u64, num_weights: usize) -> Vec<f32> {
    let stream = mix(mix(seed).wrapping_add(layer_idx));
    (0..num_weights as u64).map(|idx| (normal(stream, idx) * STANDARD_DEVIATION) as f32).collect()
}

/// One draw from normal(0, 1) by the Box-Muller transform of two counters.
fn normal(stream: u64, idx: u64) -> f64 {
    let radius = (-2.0 * uniform(mix(stream.wrapping_add(2 * idx))).ln()).sqrt();
    radius * (std::f64::consts::TAU * uniform(mix(stream.wrapping_add(2 * idx + 1)))).cos()
}

/// A number in (0, 1): 53 bits and a half, so never 0, whose logarithm is infinite.
fn uniform(bits: u64) -> f64 {
    ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
}

/// SplitMix64's output function (Steele, Lea, Flood 2014): a bijection of 64 bits without visible structure.
fn mix(counter: u64) -> u64 {
    let mut bits = counter.wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    bits ^ (bits >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_normal_and_differ_by_seed_and_layer() {
        let weights = router_weights(7, 3, 100_000);
        let mean = weights.iter().map(|&w| f64::from(w)).sum::<f64>() / 1e5;
        let variance = weights.iter().map(|&w| f64::from(w).powi(2)).sum::<f64>() / 1e5;
        assert!(mean.abs() < 3e-4, "mean {mean}");
        assert!((variance.sqrt() - STANDARD_DEVIATION).abs() < 2e-4, "deviation {}", variance.sqrt());
        let beyond_two = weights.iter().filter(|w| w.abs() > 0.04).count();
        assert!((4_200..4_900).contains(&beyond_two), "{beyond_two} of 100000 beyond two deviations");
        assert_eq!(weights[..64], router_weights(7, 3, 64));
        assert_ne!(weights[..64], router_weights(8, 3, 64));
        assert_ne!(weights[..64], router_weights(7, 4, 64));
    }
}
