//! Oracle of `grouped_swiglu`: one token and one slot at a time.

use super::GroupedSwiglu;
use crate::ops::{linear, swiglu};

pub(crate) fn grouped_swiglu(op: &GroupedSwiglu<'_>, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; op.num_tokens * op.hidden_size];
    for token in 0..op.num_tokens {
        let row = token * op.hidden_size..(token + 1) * op.hidden_size;
        let mut sum = vec![0.0; op.hidden_size];
        for slot in token * op.topk.k..(token + 1) * op.topk.k {
            let expert = &op.experts[op.topk.experts[slot] as usize];
            let gate_up = linear::reference(&x[row.clone()], &expert.gate_up, None);
            let y = linear::reference(&swiglu::reference(&gate_up, op.intermediate), &expert.down, None);
            for (sum, y) in sum.iter_mut().zip(y) {
                *sum += f64::from(op.topk.weights[slot]) * f64::from(y);
            }
        }
        out[row].iter_mut().zip(sum).for_each(|(out, sum)| *out = sum as f32);
    }
    out
}
