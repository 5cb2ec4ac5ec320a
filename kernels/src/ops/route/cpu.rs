//! `route` token by token: softmax in 16 lanes, then one pass over the experts per chosen one.

use super::{GroupScore, RouterSpec, Scoring};
use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, softmax};
use crate::memory::Disjoint;
use crate::pool;

/// Tokens of a task.
const TASK_TOKENS: usize = 8;

/// Fills `experts` and `weights`, `top_k` per row of `num_experts` logits.
pub(crate) fn route(logits: &[f32], num_experts: usize, spec: &RouterSpec, out: (&mut [u32], &mut [f32])) {
    let num_tokens = logits.len() / num_experts;
    let (experts, weights) = (Disjoint::new(out.0), Disjoint::new(out.1));
    let k = spec.top_k;
    pool::parallel_if(logits.len() * (k + 4), num_tokens.div_ceil(TASK_TOKENS), |task_idx| {
        let mut scratch = Scratch::default();
        for token in task_idx * TASK_TOKENS..num_tokens.min((task_idx + 1) * TASK_TOKENS) {
            // SAFETY: each token belongs to exactly one task.
            let experts = unsafe { experts.part(token * k, k) };
            // SAFETY: as above.
            let weights = unsafe { weights.part(token * k, k) };
            route_row(&logits[token * num_experts..(token + 1) * num_experts], spec, &mut scratch, (experts, weights));
        }
    });
}

/// Buffers that the tokens of a task share.
#[derive(Default)]
struct Scratch {
    scores: Vec<f32>,
    choice: Vec<f32>,
    group_scores: Vec<f32>,
}

fn route_row(logits: &[f32], spec: &RouterSpec, scratch: &mut Scratch, out: (&mut [u32], &mut [f32])) {
    let (experts, weights) = out;
    let Scratch { scores, choice, group_scores } = scratch;
    scores.clear();
    scores.extend_from_slice(logits);
    match spec.scoring {
        Scoring::Softmax => dispatch::run(Softmax { values: scores }),
        Scoring::SoftmaxTopK | Scoring::SparseMixer { .. } => {}
        Scoring::Sigmoid => scores.iter_mut().for_each(|score| *score = 1.0 / (1.0 + (-*score).exp())),
    }
    choice.clear();
    choice.extend_from_slice(scores);
    if let Some(bias) = &spec.bias {
        choice.iter_mut().zip(bias).for_each(|(choice, bias)| *choice += bias);
    }
    choice.iter_mut().for_each(|score| *score = rank(*score));
    mask_groups(choice, spec, group_scores);
    take_best(choice, experts);
    for (weight, &expert) in weights.iter_mut().zip(experts.iter()) {
        *weight = scores[expert as usize];
    }
    match spec.scoring {
        Scoring::SoftmaxTopK => dispatch::run(Softmax { values: weights }),
        Scoring::SparseMixer { jitter } => sparse_mixer(scores, jitter, experts, weights),
        Scoring::Softmax | Scoring::Sigmoid => {}
    }
    let divisor = spec.renormalize.map_or(1.0, |eps| weights.iter().sum::<f32>() + eps);
    // Not `max`, which would swallow a NaN.
    let divisor = if divisor < spec.min_sum { spec.min_sum } else { divisor };
    weights.iter_mut().for_each(|weight| *weight = *weight / divisor * spec.scale);
}

/// NaN counts as the worst, so that the order is total.
fn rank(score: f32) -> f32 {
    if score.is_nan() { f32::NEG_INFINITY } else { score }
}

fn mask_groups(choice: &mut [f32], spec: &RouterSpec, group_scores: &mut Vec<f32>) {
    let Some(groups) = spec.groups else { return };
    let group_size = choice.len() / groups.num;
    group_scores.clear();
    group_scores.extend(choice.chunks_exact(group_size).map(|group| {
        let (best, second) = group.iter().fold((f32::NEG_INFINITY, f32::NEG_INFINITY), |(best, second), &score| {
            if score > best { (score, best) } else { (best, second.max(score)) }
        });
        match groups.score {
            GroupScore::TopTwoSum if group_size > 1 => best + second,
            GroupScore::TopTwoSum | GroupScore::Max => best,
        }
    }));
    let mut kept = vec![0; groups.top];
    take_best(group_scores, &mut kept);
    for (group_idx, group) in choice.chunks_exact_mut(group_size).enumerate() {
        if !kept.contains(&(group_idx as u32)) {
            group.fill(groups.masked);
        }
    }
}

/// Indices of the highest scores, highest first, ties by index. Scores have no NaN; the taken ones become NaN.
fn take_best(scores: &mut [f32], out: &mut [u32]) {
    for out in out {
        let mut best: Option<(usize, f32)> = None;
        for (idx, &score) in scores.iter().enumerate() {
            if !score.is_nan() && best.is_none_or(|(_, best)| score > best) {
                best = Some((idx, score));
            }
        }
        let (idx, _) = best.expect("the spec was checked to choose no more than there are");
        *out = idx as u32;
        scores[idx] = f32::NAN;
    }
}

/// The weights of the chosen experts, see [`Scoring::SparseMixer`].
fn sparse_mixer(logits: &[f32], jitter: f32, experts: &[u32], weights: &mut [f32]) {
    for (slot, weight) in weights.iter_mut().enumerate() {
        let best = logits[experts[slot] as usize];
        let is_near = |logit: f32| (best - logit) / logit.abs().max(best) <= 2.0 * jitter;
        let is_taken = |idx: usize| experts[..slot].contains(&(idx as u32));
        let near = logits.iter().enumerate().filter(|&(idx, &logit)| !is_taken(idx) && is_near(logit));
        *weight = 1.0 / near.map(|(_, logit)| (logit - best).exp()).sum::<f32>();
    }
}

struct Softmax<'a> {
    values: &'a mut [f32],
}

impl Kernel for Softmax<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        softmax(lanes, self.values);
    }
}
