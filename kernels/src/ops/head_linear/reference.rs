//! Oracle of `head_linear`: the oracle of `linear` on each head.

use crate::ops::linear;
use crate::weight::PackedWeight;

pub(crate) fn head_linear(x: &[f32], num_tokens: usize, weights: &[PackedWeight]) -> Vec<f32> {
    let (num_heads, out_features) = (weights.len(), weights.first().map_or(0, PackedWeight::rows));
    let mut out = vec![0.0; num_tokens * num_heads * out_features];
    for token in 0..num_tokens {
        for (head, weight) in weights.iter().enumerate() {
            let row = token * num_heads + head;
            let y = linear::reference(&x[row * weight.cols()..(row + 1) * weight.cols()], weight, None);
            out[row * out_features..(row + 1) * out_features].copy_from_slice(&y);
        }
    }
    out
}
