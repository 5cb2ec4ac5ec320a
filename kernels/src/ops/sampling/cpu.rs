//! One row of logits at a time.

use std::cmp::Ordering;

use super::{Choice, Draw, LogitRow, Penalties, ReadRow};
use crate::ops::argmax::argmax;
use crate::ops::boltzmann::boltzmann;

pub(super) fn read_row(logits: &[f32], row: &LogitRow) -> ReadRow {
    let token = match &row.choice {
        Choice::Known(token) => Some(*token),
        Choice::Draw(draw) => next(logits, draw),
    };
    let Some((chosen, num_top)) = token.zip(row.num_logprobs) else {
        return ReadRow { token, ..ReadRow::default() };
    };
    let distribution = LogSoftmax::new(logits);
    ReadRow { token, logprob: Some(distribution.of(chosen)), top: distribution.top(num_top as usize) }
}

/// The next token; `None` if the row holds no usable number.
fn next(logits: &[f32], draw: &Draw) -> Option<u32> {
    if !is_sound(logits) {
        return None;
    }
    if draw.adjusts() { choose(&adjusted(logits, draw), draw) } else { choose(logits, draw) }
}

/// Bias, mask and penalties.
pub(super) fn adjusted(logits: &[f32], draw: &Draw) -> Vec<f32> {
    let mut logits = logits.to_vec();
    for &(token, bias) in &draw.bias {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit += bias;
        }
    }
    for &token in &draw.forbidden {
        if let Some(logit) = logits.get_mut(token as usize) {
            *logit = f32::NEG_INFINITY;
        }
    }
    if let Some(penalties) = &draw.penalties {
        penalize(&mut logits, penalties);
    }
    logits
}

/// Repetition over prompt and output; presence and frequency over the output alone, as OpenAI and vLLM define them.
fn penalize(logits: &mut [f32], penalties: &Penalties) {
    for &(token, output_count) in &penalties.seen {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        let factor = penalties.repetition;
        *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
        if output_count > 0 {
            *logit -= penalties.frequency * output_count as f32 + penalties.presence;
        }
    }
}

fn choose(logits: &[f32], draw: &Draw) -> Option<u32> {
    let best = argmax(logits)?;
    if draw.temperature == 0.0 {
        return Some(best as u32);
    }
    Some(pick(&candidates(logits, logits[best], draw), draw.uniform))
}

/// Whether no logit is NaN or infinity, which no sampling can be made of. A few at a time without a branch between them:
/// the greedy path is little more than this and the search for the maximum.
fn is_sound(logits: &[f32]) -> bool {
    logits.chunks(64).all(|chunk| chunk.iter().fold(true, |sound, &logit| sound & (logit < f32::INFINITY)))
}

/// A token that may be drawn and its unnormalised probability (the best one's is 1).
pub(crate) type Candidate = (u32, f64);

/// What min-p, top-k and top-p leave, in an order that depends on the row alone.
pub(crate) fn candidates(logits: &[f32], max: f32, params: &Draw) -> Vec<Candidate> {
    let mut weights = boltzmann(logits, max, params.temperature);
    if params.min_p > 0.0 {
        weights.iter_mut().for_each(|weight| *weight = if *weight >= params.min_p { *weight } else { 0.0 });
    }
    let by_weight = |a: &Candidate, b: &Candidate| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
    let (top_k, top_p) = (params.top_k as usize, f64::from(params.top_p));
    let is_nucleus = params.top_p < 1.0;
    if top_k == 0 || top_k >= weights.len() {
        let total = if is_nucleus { sum(&weights) } else { 0.0 };
        // All tokens below this together weigh less than what the nucleus leaves out, so it needs none of them; sorting the few
        // that remain is what makes top-p cheap on large vocabularies.
        let negligible = if is_nucleus { (1.0 - top_p) * total / weights.len() as f64 } else { 0.0 };
        let mut kept = positive(&weights, negligible);
        if is_nucleus {
            keep_nucleus(&mut kept, top_p * total, by_weight);
        }
        return kept;
    }
    let mut kept = positive(&weights, 0.0);
    if top_k < kept.len() {
        kept.select_nth_unstable_by(top_k - 1, by_weight);
        kept.truncate(top_k);
        kept.sort_unstable_by_key(|&(token, _)| token);
    }
    if is_nucleus {
        let total: f64 = kept.iter().map(|&(_, weight)| weight).sum();
        keep_nucleus(&mut kept, top_p * total, by_weight);
    }
    kept
}

/// Tokens that weigh something, and no less than `least`.
fn positive(weights: &[f32], least: f64) -> Vec<Candidate> {
    let all = weights.iter().enumerate().map(|(idx, &weight)| (idx as u32, f64::from(weight)));
    all.filter(|&(_, weight)| weight > 0.0 && weight >= least).collect()
}

/// In an order that lets several additions run at once.
fn sum(weights: &[f32]) -> f64 {
    let (chunks, tail) = weights.as_chunks::<8>();
    let mut sums = [0.0; 8];
    for chunk in chunks {
        sums.iter_mut().zip(chunk).for_each(|(sum, &weight)| *sum += f64::from(weight));
    }
    sums.iter().sum::<f64>() + tail.iter().map(|&weight| f64::from(weight)).sum::<f64>()
}

/// The fewest most likely candidates that weigh `wanted` together.
fn keep_nucleus(kept: &mut Vec<Candidate>, wanted: f64, order: impl Fn(&Candidate, &Candidate) -> Ordering) {
    kept.sort_unstable_by(order);
    let mut cumulative = 0.0;
    let enough = kept.iter().position(|&(_, weight)| {
        cumulative += weight;
        cumulative >= wanted
    });
    kept.truncate(enough.map_or(kept.len(), |idx| idx + 1));
}

/// The candidate at `uniform` of the cumulative weight.
fn pick(candidates: &[Candidate], uniform: f64) -> u32 {
    let total: f64 = candidates.iter().map(|&(_, weight)| weight).sum();
    let target = uniform * total;
    let mut cumulative = 0.0;
    let hit = candidates.iter().find(|&&(_, weight)| {
        cumulative += weight;
        cumulative > target
    });
    // Rounding can leave the target at the very end.
    hit.or(candidates.last()).expect("the most likely token is always a candidate").0
}

/// `log_softmax` of a row without writing it out.
struct LogSoftmax<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    fn new(logits: &'a [f32]) -> Self {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Self { logits, log_sum: max + sum.ln() }
    }

    fn of(&self, token: u32) -> f32 {
        (f64::from(self.logits[token as usize]) - self.log_sum) as f32
    }

    /// The `count` most likely tokens, best first, ties by token.
    fn top(&self, count: usize) -> Vec<(u32, f32)> {
        best(self.logits, count).into_iter().map(|token| (token, self.of(token))).collect()
    }
}

/// Tokens of the `count` largest values, best first, ties by token.
fn best(values: &[f32], count: usize) -> Vec<u32> {
    let count = count.min(values.len());
    if count == 0 {
        return Vec::new();
    }
    let order = |a: &u32, b: &u32| -> Ordering { values[*b as usize].total_cmp(&values[*a as usize]).then(a.cmp(b)) };
    let mut ids: Vec<u32> = (0..values.len() as u32).collect();
    ids.select_nth_unstable_by(count - 1, order);
    ids.truncate(count);
    ids.sort_unstable_by(order);
    ids
}
