//! Sums over predicted tokens: surprise, and the divergence of one model's distributions from another's.

use anyhow::{bail, ensure};
use serde::Serialize;

/// What was seen so far. Sums are f64, in nats.
#[derive(Debug, Default)]
pub struct Score {
    num_tokens: usize,
    surprise: f64,
    reference_surprise: f64,
    kl_sum: f64,
    kl_max: f64,
    num_agreed: usize,
}

/// How next-token distributions differ from a reference's.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Divergence {
    /// Mean over the positions of `Σ p log(p / q)` in nats, `p` being the reference's.
    pub mean_kl: f64,
    pub max_kl: f64,
    /// Positions at which both find the same token the likeliest.
    pub greedy_agreement_percent: f64,
}

impl Score {
    /// A model's `logits` before the token `next`.
    ///
    /// # Errors
    /// Logits that are no numbers, a token outside the vocabulary.
    pub fn add(&mut self, logits: &[f32], next: u32) -> anyhow::Result<()> {
        self.surprise += surprise(logits, log_sum_exp(logits)?, next)?;
        self.num_tokens += 1;
        Ok(())
    }

    /// The same beside the logits of a reference, of as many tokens.
    ///
    /// # Errors
    /// As [`Self::add`].
    pub fn add_compared(&mut self, logits: &[f32], reference: &[f32], next: u32) -> anyhow::Result<()> {
        let (norm, reference_norm) = (log_sum_exp(logits)?, log_sum_exp(reference)?);
        self.surprise += surprise(logits, norm, next)?;
        self.reference_surprise += surprise(reference, reference_norm, next)?;
        let terms = logits.iter().zip(reference).map(|(&q, &p)| {
            let (log_q, log_p) = (f64::from(q) - norm, f64::from(p) - reference_norm);
            log_p.exp() * (log_p - log_q)
        });
        // Rounding may take the sum of equal distributions below zero.
        let kl = terms.sum::<f64>().max(0.0);
        self.kl_sum += kl;
        self.kl_max = self.kl_max.max(kl);
        self.num_agreed += usize::from(likeliest(logits) == likeliest(reference));
        self.num_tokens += 1;
        Ok(())
    }

    pub fn num_tokens(&self) -> usize {
        self.num_tokens
    }

    pub fn perplexity(&self) -> f64 {
        (self.surprise / self.num_tokens as f64).exp()
    }

    pub fn reference_perplexity(&self) -> f64 {
        (self.reference_surprise / self.num_tokens as f64).exp()
    }

    pub fn divergence(&self) -> Divergence {
        let num_tokens = self.num_tokens as f64;
        Divergence {
            mean_kl: self.kl_sum / num_tokens,
            max_kl: self.kl_max,
            greedy_agreement_percent: 100.0 * self.num_agreed as f64 / num_tokens,
        }
    }
}

/// Of logits that are all finite.
fn log_sum_exp(logits: &[f32]) -> anyhow::Result<f64> {
    if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
        bail!("the logit of token {id} is {}", logits[id]);
    }
    let max = logits.iter().fold(f32::NEG_INFINITY, |max, &logit| max.max(logit));
    let sum: f64 = logits.iter().map(|&logit| f64::from(logit - max).exp()).sum();
    Ok(f64::from(max) + sum.ln())
}

/// `-log p(next)`.
fn surprise(logits: &[f32], norm: f64, next: u32) -> anyhow::Result<f64> {
    let size = logits.len();
    ensure!((next as usize) < size, "token {next} of the tokenizer lies outside the model's vocabulary of {size}");
    Ok(norm - f64::from(logits[next as usize]))
}

/// The first of the largest.
fn likeliest(logits: &[f32]) -> usize {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = id;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn coins_that_are_known_give_their_numbers() {
        // Logits of the distributions (1/2, 1/4, 1/4) and (1/4, 1/2, 1/4).
        let [p, q] = [[0.5f32, 0.25, 0.25], [0.25, 0.5, 0.25]].map(|p| p.map(|p| p.ln() + 3.0));
        let mut score = Score::default();
        score.add_compared(&q, &p, 0).unwrap();
        score.add_compared(&p, &p, 2).unwrap();
        assert_eq!(score.num_tokens(), 2);
        // 1/2 log 2 - 1/4 log 2, at one position of two.
        let kl = 0.25 * 2f64.ln();
        let found = score.divergence();
        assert!((found.mean_kl - kl / 2.0).abs() < 1e-7 && (found.max_kl - kl).abs() < 1e-7, "{found:?}");
        assert_eq!(found.greedy_agreement_percent, 50.0);
        assert!((score.perplexity() - 4.0).abs() < 1e-6, "{}", score.perplexity());
        assert!((score.reference_perplexity() - 8f64.sqrt()).abs() < 1e-6, "{}", score.reference_perplexity());
    }

    #[test]
    fn what_is_no_number_is_an_error() {
        let mut score = Score::default();
        let error = score.add(&[0.0, f32::NAN], 0).unwrap_err().to_string();
        assert_eq!(error, "the logit of token 1 is NaN");
        let error = score.add_compared(&[0.0], &[0.0], 1).unwrap_err().to_string();
        assert!(error.contains("token 1 of the tokenizer"), "{error}");
        assert_eq!(score.num_tokens(), 0);
    }
}
