//! One token from one row of logits.

use std::cmp::Ordering;

use super::logprobs::LogSoftmax;
use super::params::SamplingParams;
use super::{penalties, rng};
use crate::handle::SampledToken;

/// A row and what its sequence brings to the choice.
pub(crate) struct SampleRow<'a> {
    /// `[vocab_size]`
    pub(crate) logits: &'a [f32],
    pub(crate) params: &'a SamplingParams,
    /// Prompt and output so far; the new token's position is its length.
    pub(crate) tokens: &'a [u32],
    pub(crate) prompt_len: usize,
    /// Tokens that may not come now: the stop tokens while fewer than `min_tokens` are out.
    pub(crate) forbidden: &'a [u32],
}

/// Draws the next token; `None` if the row holds no usable number.
pub(crate) fn sample(row: &SampleRow) -> Option<SampledToken> {
    if !is_sound(row.logits) {
        return None;
    }
    let token = match row.adjusted_logits() {
        Some(logits) => choose(&logits, row),
        None => choose(row.logits, row),
    }?;
    let (logprob, top) = match row.params.logprobs {
        None => (None, Vec::new()),
        Some(num_top) => {
            let distribution = LogSoftmax::new(row.logits);
            (Some(distribution.of(token)), distribution.top(num_top as usize))
        }
    };
    Some(SampledToken { token, logprob, top, routed_experts: Vec::new(), expert_use: None, is_stop: false })
}

impl SampleRow<'_> {
    /// Bias, mask and penalties, where there are any.
    fn adjusted_logits(&self) -> Option<Vec<f32>> {
        let penalized = penalties::any(self.params);
        if self.params.logit_bias.is_empty() && self.forbidden.is_empty() && !penalized {
            return None;
        }
        let mut logits = self.logits.to_vec();
        for (&token, &bias) in &self.params.logit_bias {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit += bias;
            }
        }
        for &token in self.forbidden {
            if let Some(logit) = logits.get_mut(token as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        if penalized {
            penalties::apply(&mut logits, self.params, self.tokens, self.prompt_len);
        }
        Some(logits)
    }
}

fn choose(logits: &[f32], row: &SampleRow) -> Option<u32> {
    let best = kernels::argmax(logits)?;
    if row.params.temperature == 0.0 {
        return Some(best as u32);
    }
    let uniform = rng::uniform(row.params.seed, row.params.choice, row.tokens.len() as u64);
    Some(draw(&candidates(logits, logits[best], row.params), uniform))
}

/// Whether no logit is NaN or infinity, which no sampling can be made of. A few at a time without a branch between them:
/// the greedy path is little more than this and the search for the maximum.
fn is_sound(logits: &[f32]) -> bool {
    logits.chunks(64).all(|chunk| chunk.iter().fold(true, |sound, &logit| sound & (logit < f32::INFINITY)))
}

/// A token that may be drawn and its unnormalised probability (the best one's is 1).
type Candidate = (u32, f64);

/// What min-p, top-k and top-p leave, in an order that depends on the row alone.
fn candidates(logits: &[f32], max: f32, params: &SamplingParams) -> Vec<Candidate> {
    let mut weights = kernels::boltzmann(logits, max, params.temperature);
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
fn draw(candidates: &[Candidate], uniform: f64) -> u32 {
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

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 0.0, -1.0];

    fn kept(params: &SamplingParams) -> Vec<u32> {
        let mut ids: Vec<u32> = candidates(&LOGITS, 3.0, params).into_iter().map(|(token, _)| token).collect();
        ids.sort_unstable();
        ids
    }

    fn token(logits: &[f32], params: &SamplingParams, forbidden: &[u32]) -> Option<u32> {
        sample(&SampleRow { logits, params, tokens: &[0], prompt_len: 1, forbidden }).map(|sampled| sampled.token)
    }

    #[test]
    fn filters_keep_what_their_definitions_say() {
        let params = SamplingParams::default();
        assert_eq!(kept(&params), [0, 1, 2, 3, 4]);
        assert_eq!(kept(&SamplingParams { top_k: 2, ..params.clone() }), [1, 2]);
        // probabilities: 0.636 0.234 0.086 0.032 0.012
        assert_eq!(kept(&SamplingParams { top_p: 0.6, ..params.clone() }), [1]);
        assert_eq!(kept(&SamplingParams { top_p: 0.7, ..params.clone() }), [1, 2]);
        assert_eq!(kept(&SamplingParams { min_p: 0.1, ..params.clone() }), [0, 1, 2]);
        assert_eq!(kept(&SamplingParams { top_k: 2, top_p: 0.7, ..params }), [1]);
    }

    #[test]
    fn greedy_takes_the_first_maximum_and_heeds_bias_and_mask() {
        let greedy = SamplingParams { temperature: 0.0, ..SamplingParams::default() };
        assert_eq!(token(&LOGITS, &greedy, &[]), Some(1));
        assert_eq!(token(&[1.0, 1.0], &greedy, &[]), Some(0));
        assert_eq!(token(&LOGITS, &greedy, &[1]), Some(2));
        let biased = SamplingParams { logit_bias: [(4, 100.0)].into(), ..greedy.clone() };
        assert_eq!(token(&LOGITS, &biased, &[]), Some(4));
        assert_eq!(token(&[0.0, f32::NAN], &greedy, &[]), None);
        assert_eq!(token(&[f32::NEG_INFINITY; 3], &greedy, &[]), None);
    }

    #[test]
    fn infinite_logits_are_no_panic() {
        let drawn = SamplingParams::default();
        assert_eq!(token(&[0.0, f32::INFINITY], &drawn, &[]), None, "the model overflowed");
        // A repetition penalty this small is allowed, and takes the logit of token 0 past the largest f32.
        let boosted = SamplingParams { repetition_penalty: 1e-39, ..drawn };
        assert_eq!(token(&LOGITS, &boosted, &[]), Some(0));
        assert_eq!(token(&LOGITS, &SamplingParams { top_p: 0.5, top_k: 3, min_p: 1.0, ..boosted }, &[]), Some(0));
    }

    #[test]
    fn draws_follow_the_distribution() {
        let mut counts = [0u32; 5];
        for seed in 0..20_000 {
            let params = SamplingParams { seed, ..SamplingParams::default() };
            counts[token(&LOGITS, &params, &[]).expect("a token") as usize] += 1;
        }
        let total: f64 = LOGITS.iter().map(|&logit| f64::from(logit).exp()).sum();
        for (idx, &count) in counts.iter().enumerate() {
            let expected = f64::from(LOGITS[idx]).exp() / total;
            assert!((f64::from(count) / 20_000.0 - expected).abs() < 0.012, "token {idx}: {count}");
        }
    }
}
