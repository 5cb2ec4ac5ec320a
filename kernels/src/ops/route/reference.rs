//! Oracle of `route`: one token at a time, f64 sums.

use super::{GroupScore, RouterSpec, Scoring};

pub(crate) fn route_row(logits: &[f32], spec: &RouterSpec, experts: &mut [u32], weights: &mut [f32]) {
    let scores = match spec.scoring {
        Scoring::Softmax => softmax(logits),
        Scoring::SoftmaxTopK | Scoring::SparseMixer { .. } => logits.to_vec(),
        Scoring::Sigmoid => logits.iter().map(|&logit| (1.0 / (1.0 + (-f64::from(logit)).exp())) as f32).collect(),
    };
    let mut choice = scores.clone();
    if let Some(bias) = &spec.bias {
        choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += bias);
    }
    mask_groups(&mut choice, spec);
    for (slot, expert) in best(&choice, spec.top_k).into_iter().enumerate() {
        experts[slot] = expert as u32;
        weights[slot] = scores[expert];
    }
    if spec.scoring == Scoring::SoftmaxTopK {
        weights.copy_from_slice(&softmax(weights));
    }
    if let Scoring::SparseMixer { jitter } = spec.scoring {
        let mut left: Vec<f64> = logits.iter().map(|&logit| f64::from(logit)).collect();
        for (weight, &expert) in weights.iter_mut().zip(experts.iter()) {
            let best = left[expert as usize];
            let sum: f64 = (left.iter().zip(logits))
                .filter(|&(_, &logit)| {
                    (best - f64::from(logit)) / f64::from(logit).abs().max(best) <= 2.0 * f64::from(jitter)
                })
                .map(|(left, _)| (left - best).exp())
                .sum();
            *weight = (1.0 / sum) as f32;
            left[expert as usize] = f64::NEG_INFINITY;
        }
    }
    let divisor = match spec.renormalize {
        Some(eps) => weights.iter().copied().map(f64::from).sum::<f64>() + f64::from(eps),
        None => 1.0,
    };
    let divisor = if divisor < f64::from(spec.min_sum) { spec.min_sum } else { divisor as f32 };
    weights.iter_mut().for_each(|weight| *weight = *weight / divisor * spec.scale);
}

fn mask_groups(choice: &mut [f32], spec: &RouterSpec) {
    let Some(groups) = spec.groups else { return };
    let group_size = choice.len() / groups.num;
    let scores: Vec<f32> = choice
        .chunks_exact(group_size)
        .map(|group| match groups.score {
            GroupScore::Max => group[best(group, 1)[0]],
            GroupScore::TopTwoSum => best(group, 2).into_iter().map(|idx| group[idx]).sum(),
        })
        .collect();
    let kept = best(&scores, groups.top);
    for (group_idx, group) in choice.chunks_exact_mut(group_size).enumerate() {
        if !kept.contains(&group_idx) {
            group.fill(groups.masked);
        }
    }
}

/// Indices of the `count` highest scores, highest first, ties by index, NaN last.
fn best(scores: &[f32], count: usize) -> Vec<usize> {
    let rank = |idx: usize| if scores[idx].is_nan() { f32::NEG_INFINITY } else { scores[idx] };
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| rank(b).total_cmp(&rank(a)).then(a.cmp(&b)));
    order.truncate(count);
    order
}

fn softmax(logits: &[f32]) -> Vec<f32> {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let exps: Vec<f64> = logits.iter().map(|&logit| (f64::from(logit) - f64::from(max)).exp()).collect();
    let sum: f64 = exps.iter().sum();
    exps.iter().map(|exp| (exp / sum) as f32).collect()
}
