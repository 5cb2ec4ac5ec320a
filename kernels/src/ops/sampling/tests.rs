//! What rules keep, and that draws follow the distribution.

use candle_core::{DType, Device, Tensor};

use super::cpu::candidates;
use super::*;
use crate::testing::Numbers;

const LOGITS: [f32; 5] = [1.0, 3.0, 2.0, 0.0, -1.0];

fn greedy() -> Draw {
    Draw { temperature: 0.0, ..Draw::PLAIN }
}

fn kept(draw: &Draw) -> Vec<u32> {
    let mut ids: Vec<u32> = candidates(&LOGITS, 3.0, draw).into_iter().map(|(token, _)| token).collect();
    ids.sort_unstable();
    ids
}

fn read(logits: &[f32], choice: Choice, num_logprobs: Option<u32>) -> ReadRow {
    let tensor = Tensor::from_slice(logits, (1, logits.len()), &Device::Cpu).unwrap();
    read_logits(&tensor, &[LogitRow { choice, num_logprobs }]).unwrap().remove(0)
}

fn token(logits: &[f32], draw: &Draw) -> Option<u32> {
    read(logits, Choice::Draw(draw.clone()), None).token
}

#[test]
fn filters_keep_what_their_definitions_say() {
    assert_eq!(kept(&Draw::PLAIN), [0, 1, 2, 3, 4]);
    assert_eq!(kept(&Draw { top_k: 2, ..Draw::PLAIN }), [1, 2]);
    // probabilities: 0.636 0.234 0.086 0.032 0.012
    assert_eq!(kept(&Draw { top_p: 0.6, ..Draw::PLAIN }), [1]);
    assert_eq!(kept(&Draw { top_p: 0.7, ..Draw::PLAIN }), [1, 2]);
    assert_eq!(kept(&Draw { min_p: 0.1, ..Draw::PLAIN }), [0, 1, 2]);
    assert_eq!(kept(&Draw { top_k: 2, top_p: 0.7, ..Draw::PLAIN }), [1]);
}

/// On vocabularies where most tokens are passed over.
#[test]
fn what_is_kept_is_what_the_reference_keeps() {
    let mut numbers = Numbers::new(31);
    let draws = [
        Draw::PLAIN,
        Draw { top_p: 0.9, ..Draw::PLAIN },
        Draw { temperature: 0.3, top_p: 0.5, min_p: 0.02, ..Draw::PLAIN },
        Draw { temperature: 1.8, top_k: 50, ..Draw::PLAIN },
        Draw { top_k: 300, top_p: 0.95, ..Draw::PLAIN },
        Draw { top_k: 20_000, top_p: 0.999, ..Draw::PLAIN },
    ];
    for vocab_size in [3, 700, 20_000] {
        let mut logits: Vec<f32> = numbers.normal(vocab_size).iter().map(|number| 3.0 * number).collect();
        for round in 0..2 {
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            for draw in &draws {
                assert_eq!(candidates(&logits, max, draw), reference::candidates(&logits, draw), "{draw:?} {round}");
            }
            // Ties.
            logits.iter_mut().for_each(|logit| *logit = logit.round());
        }
    }
}

#[test]
fn greedy_takes_the_first_maximum_and_heeds_bias_and_mask() {
    assert_eq!(token(&LOGITS, &greedy()), Some(1));
    assert_eq!(token(&[1.0, 1.0], &greedy()), Some(0));
    // Tokens that are not there count for nothing.
    assert_eq!(token(&LOGITS, &Draw { forbidden: vec![1, 9], ..greedy() }), Some(2));
    assert_eq!(token(&LOGITS, &Draw { bias: vec![(4, 100.0), (9, 100.0)], ..greedy() }), Some(4));
    assert_eq!(token(&[0.0, f32::NAN], &greedy()), None);
    assert_eq!(token(&[f32::NEG_INFINITY; 3], &greedy()), None);
}

#[test]
fn penalties_are_on_what_was_seen() {
    let seen = vec![(0, 0), (1, 1), (2, 1), (9, 3)];
    let penalties = Penalties { repetition: 2.0, frequency: 0.25, presence: 0.5, seen };
    let draw = Draw { penalties: Some(penalties), ..greedy() };
    assert_eq!(cpu::adjusted(&[4.0, -4.0, 1.0, 1.0], &draw), [2.0, -8.75, -0.25, 1.0]);
}

#[test]
fn infinite_logits_are_no_panic() {
    assert_eq!(token(&[0.0, f32::INFINITY], &Draw::PLAIN), None, "the model overflowed");
    // A repetition penalty this small is allowed, and takes the logit of token 0 past the largest f32.
    let penalties = Some(Penalties { repetition: 1e-39, frequency: 0.0, presence: 0.0, seen: vec![(0, 0)] });
    let boosted = Draw { penalties, ..Draw::PLAIN };
    assert_eq!(token(&LOGITS, &boosted), Some(0));
    assert_eq!(token(&LOGITS, &Draw { top_p: 0.5, top_k: 3, min_p: 1.0, ..boosted }), Some(0));
}

#[test]
fn draws_follow_the_distribution() {
    const DRAWS: u32 = 20_000;
    let mut counts = [0u32; 5];
    for idx in 0..DRAWS {
        let uniform = (f64::from(idx) + 0.5) / f64::from(DRAWS);
        counts[token(&LOGITS, &Draw { uniform, ..Draw::PLAIN }).expect("a token") as usize] += 1;
    }
    let total: f64 = LOGITS.iter().map(|&logit| f64::from(logit).exp()).sum();
    for (idx, &count) in counts.iter().enumerate() {
        let expected = f64::from(LOGITS[idx]).exp() / total;
        assert!((f64::from(count) / f64::from(DRAWS) - expected).abs() < 2e-4, "token {idx}: {count}");
    }
}

#[test]
fn logprobs_are_of_the_model_and_ordered() {
    let logits = [0.0, 3.0, 3.0, -1.0];
    let forced = Draw { bias: vec![(3, 100.0)], ..greedy() };
    let row = read(&logits, Choice::Draw(forced), Some(9));
    let tokens: Vec<u32> = row.top.iter().map(|&(token, _)| token).collect();
    assert_eq!((row.token, tokens), (Some(3), vec![1, 2, 0, 3]));
    let total: f64 = row.top.iter().map(|&(_, logprob)| f64::from(logprob).exp()).sum();
    assert!((total - 1.0).abs() < 1e-6);
    assert_eq!(row.logprob, Some(row.top[3].1));
    let known = read(&logits, Choice::Known(0), Some(0));
    assert_eq!(known, ReadRow { token: Some(0), logprob: Some(row.top[2].1), top: Vec::new() });
    assert_eq!(read(&logits, Choice::Known(0), None).logprob, None);
}

#[test]
fn what_does_not_fit_is_refused() {
    let logits = Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap();
    let known = |token| LogitRow { choice: Choice::Known(token), num_logprobs: None };
    assert!(read_logits(&logits, &[known(0)]).is_err());
    assert!(read_logits(&logits, &[known(0), known(4)]).unwrap_err().to_string().contains("known token is 4"));
    assert!(read_logits(&logits.to_dtype(DType::F16).unwrap(), &[known(0), known(1)]).is_err());
    assert!(read_logits(&logits.narrow(0, 0, 0).unwrap(), &[]).unwrap().is_empty());
}
