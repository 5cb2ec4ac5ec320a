//! Oracle of `grouped_swiglu`: one token and one slot at a time.

use super::{Expert, ExpertActivation, ExpertWeights, GroupedSwiglu, TopK};
use crate::ops::{glu, linear};

pub(crate) fn grouped_swiglu(op: &GroupedSwiglu<'_>, topk: &TopK, x: &[f32]) -> Vec<f32> {
    let mut out = vec![0.0; op.num_tokens * op.sizes.hidden];
    for token in 0..op.num_tokens {
        let row = token * op.sizes.hidden..(token + 1) * op.sizes.hidden;
        let mut sum = vec![0.0; op.sizes.hidden];
        for slot in token * topk.k..(token + 1) * topk.k {
            if topk.experts[slot] == TopK::NO_EXPERT {
                continue;
            }
            let expert = &op.experts[topk.experts[slot] as usize];
            let y = match expert {
                Expert::Identity => x[row.clone()].to_vec(),
                Expert::Glu(expert) => glu(expert, &x[row.clone()], op.sizes.intermediate),
            };
            for (sum, y) in sum.iter_mut().zip(y) {
                *sum += f64::from(topk.weights[slot]) * f64::from(y);
            }
        }
        out[row].iter_mut().zip(sum).for_each(|(out, sum)| *out = sum as f32);
    }
    out
}

fn glu(expert: &ExpertWeights, x: &[f32], intermediate: usize) -> Vec<f32> {
    let biases = expert.biases.as_ref();
    let gate_up = linear::reference(x, &expert.gate_up, biases.map(|biases| biases.gate_up.as_slice()));
    let activated = match expert.activation {
        ExpertActivation::Gated(activation) => glu::reference(&gate_up, intermediate, activation),
        ExpertActivation::Plain(pointwise) => gate_up.iter().map(|&up| pointwise.apply(up)).collect(),
    };
    linear::reference(&activated, &expert.down, biases.map(|biases| biases.down.as_slice()))
}
