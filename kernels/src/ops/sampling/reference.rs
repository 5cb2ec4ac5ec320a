//! Rules by their definitions: everything is sorted, and nothing passed over.

use std::cmp::Ordering;

use super::Draw;
use super::cpu::Candidate;
use crate::ops::argmax::argmax;
use crate::ops::boltzmann::boltzmann;

/// What may be drawn, in the order in which it is.
pub(crate) fn candidates(logits: &[f32], draw: &Draw) -> Vec<Candidate> {
    let max = logits[argmax(logits).unwrap()];
    let weights = boltzmann(logits, max, draw.temperature);
    let all = weights.iter().enumerate().filter(|&(_, &weight)| weight > 0.0 && weight >= draw.min_p);
    let mut kept: Vec<Candidate> = all.map(|(token, &weight)| (token as u32, f64::from(weight))).collect();
    let by_weight = |a: &Candidate, b: &Candidate| -> Ordering { b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)) };
    if draw.top_k != 0 {
        kept.sort_unstable_by(by_weight);
        kept.truncate(draw.top_k as usize);
        kept.sort_unstable_by_key(|&(token, _)| token);
    }
    if draw.top_p < 1.0 {
        let wanted = f64::from(draw.top_p) * total(&kept);
        kept.sort_unstable_by(by_weight);
        let enough = running(&kept).position(|sum| sum >= wanted);
        kept.truncate(enough.map_or(kept.len(), |idx| idx + 1));
    }
    kept
}

pub(crate) fn total(candidates: &[Candidate]) -> f64 {
    candidates.iter().map(|&(_, weight)| weight).sum()
}

/// The sums up to each.
pub(crate) fn running(candidates: &[Candidate]) -> impl Iterator<Item = f64> {
    candidates.iter().scan(0.0, |sum, &(_, weight)| {
        *sum += weight;
        Some(*sum)
    })
}
