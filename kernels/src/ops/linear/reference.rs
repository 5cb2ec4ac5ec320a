//! Oracle of `linear`: plain loops, f64 sums.

use crate::weight::PackedWeight;

pub(crate) fn linear(x: &[f32], weight: &PackedWeight, bias: Option<&[f32]>) -> Vec<f32> {
    let in_features = weight.cols();
    let num_tokens = x.len().checked_div(in_features).unwrap_or(0);
    let mut out = vec![0.0; num_tokens * weight.rows()];
    let mut weight_row = vec![0.0; in_features];
    for out_idx in 0..weight.rows() {
        weight.row_f32(out_idx, &mut weight_row);
        for token in 0..num_tokens {
            let x_row = &x[token * in_features..(token + 1) * in_features];
            let sum: f64 = x_row.iter().zip(&weight_row).map(|(&x, &w)| f64::from(x) * f64::from(w)).sum();
            let bias = bias.map_or(0.0, |bias| f64::from(bias[out_idx]));
            out[token * weight.rows() + out_idx] = (sum + bias) as f32;
        }
    }
    out
}
