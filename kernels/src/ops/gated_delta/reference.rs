//! Oracle of `gated_delta`: one sequence from its first row, one head at a time, in f64.

use super::{DeltaWeights, Pointwise};

/// Queries, keys, values and gates of a whole sequence to its outputs, `[num_rows, num_value_heads * value_dim]`.
pub(crate) fn gated_delta(qkv: &[f32], gates: &[f32], weights: &DeltaWeights) -> Vec<f32> {
    let spec = weights.spec;
    let (num_channels, num_heads) = (spec.num_channels(), spec.num_value_heads);
    let num_rows = qkv.len() / num_channels;
    let convolved: Vec<Vec<f64>> = (0..num_rows)
        .map(|row| (0..num_channels).map(|channel| convolve(qkv, weights, (row, channel))).collect())
        .collect();
    let mut out = vec![0.0; num_rows * num_heads * spec.value_dim];
    for head in 0..num_heads {
        let key_head = head / (num_heads / spec.num_key_heads);
        let mut state = vec![vec![0.0; spec.value_dim]; spec.key_dim];
        for (row, channels) in convolved.iter().enumerate() {
            let query = unit(&channels[key_head * spec.key_dim..][..spec.key_dim]);
            let key = unit(&channels[(spec.num_key_heads + key_head) * spec.key_dim..][..spec.key_dim]);
            let value = &channels[2 * spec.num_key_heads * spec.key_dim + head * spec.value_dim..][..spec.value_dim];
            let gate = |part: usize| f64::from(gates[row * 2 * num_heads + part * num_heads + head]);
            let beta = 1.0 / (1.0 + (-gate(0)).exp());
            let softplus = (gate(1) + f64::from(weights.dt_bias[head])).exp().ln_1p();
            let decay = (f64::from(weights.decay[head]) * softplus).exp();
            state.iter_mut().flatten().for_each(|entry| *entry *= decay);
            let recalled = times(&state, &key);
            for (row, k) in state.iter_mut().zip(&key) {
                for ((entry, value), recalled) in row.iter_mut().zip(value).zip(&recalled) {
                    *entry += k * beta * (value - recalled);
                }
            }
            let scale = (spec.key_dim as f64).sqrt().recip();
            let start = (row * num_heads + head) * spec.value_dim;
            for (out, sum) in out[start..].iter_mut().zip(times(&state, &query)) {
                *out = (sum * scale) as f32;
            }
        }
    }
    out
}

fn convolve(qkv: &[f32], weights: &DeltaWeights, (row, channel): (usize, usize)) -> f64 {
    let (num_channels, kernel) = (weights.spec.num_channels(), weights.spec.conv_kernel);
    let taps = (0..kernel).filter_map(|back| Some((back, row.checked_sub(back)?)));
    let sum: f64 = taps
        .map(|(back, row)| {
            f64::from(qkv[row * num_channels + channel]) * f64::from(weights.conv[channel * kernel + kernel - 1 - back])
        })
        .sum();
    match weights.spec.activation {
        Pointwise::Relu => sum.max(0.0),
        Pointwise::Silu => sum / (1.0 + (-sum).exp()),
        other => panic!("no oracle for {other:?}"),
    }
}

fn unit(x: &[f64]) -> Vec<f64> {
    let length = (x.iter().map(|x| x * x).sum::<f64>() + 1e-6).sqrt();
    x.iter().map(|x| x / length).collect()
}

/// `stateᵀ x`
fn times(state: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    (0..state[0].len()).map(|column| state.iter().zip(x).map(|(row, x)| row[column] * x).sum()).collect()
}
