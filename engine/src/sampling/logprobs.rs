//! Log-probabilities of the model's own distribution, before temperature and filters.

use std::cmp::Ordering;

use crate::handle::PromptLogprob;

/// `log_softmax` of a row without writing it out.
pub(crate) struct LogSoftmax<'a> {
    logits: &'a [f32],
    log_sum: f64,
}

impl<'a> LogSoftmax<'a> {
    pub(crate) fn new(logits: &'a [f32]) -> Self {
        let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
        let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
        Self { logits, log_sum: max + sum.ln() }
    }

    pub(crate) fn of(&self, token: u32) -> f32 {
        (f64::from(self.logits[token as usize]) - self.log_sum) as f32
    }

    /// The `count` most likely tokens, best first, ties by id.
    pub(crate) fn top(&self, count: usize) -> Vec<(u32, f32)> {
        best(self.logits, count).into_iter().map(|token| (token, self.of(token))).collect()
    }
}

/// What the row before it says about a prompt token.
pub(crate) fn prompt_logprob(logits: &[f32], token: u32, num_top: usize) -> PromptLogprob {
    let distribution = LogSoftmax::new(logits);
    PromptLogprob { token, logprob: distribution.of(token), top: distribution.top(num_top) }
}

/// Ids of the `count` largest values, best first, ties by id.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn probabilities_sum_to_one_and_are_ordered() {
        let logits = [0.0, 3.0, 3.0, -1.0];
        let distribution = LogSoftmax::new(&logits);
        let total: f64 = (0..4).map(|token| f64::from(distribution.of(token)).exp()).sum();
        assert!((total - 1.0).abs() < 1e-6);
        let top: Vec<u32> = distribution.top(9).into_iter().map(|(token, _)| token).collect();
        assert_eq!(top, [1, 2, 0, 3]);
        assert_eq!(distribution.top(0), []);
    }
}
