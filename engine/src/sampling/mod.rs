//! What a request asks of a row of logits: a pure function of its parameters and its sequence's history.

pub mod params;
pub(crate) mod rng;

use std::collections::BTreeMap;

use kernels::{Choice, Draw, LogitRow, Penalties};
use scheduler::Sequence;

use self::params::SamplingParams;
use crate::runner::RowRequest;

/// What is read of the row that predicts the token at a position: one that is known, or the next one.
pub(crate) fn asked(sequence: &Sequence, position: usize, request: &RowRequest) -> LogitRow {
    let params = request.sampling;
    if let Some(&known) = sequence.tokens().get(position) {
        return LogitRow { choice: Choice::Known(known), num_logprobs: Some(params.prompt_logprobs.unwrap_or(0)) };
    }
    // What an encoder read is not what the decoder would repeat.
    let tokens = &sequence.tokens()[sequence.source_len()..];
    let draw = Draw {
        temperature: params.temperature,
        top_k: params.top_k,
        top_p: params.top_p,
        min_p: params.min_p,
        uniform: rng::uniform(params.seed, params.choice, tokens.len() as u64),
        bias: params.logit_bias.iter().map(|(&token, &bias)| (token, bias)).collect(),
        forbidden: request.forbidden.to_vec(),
        penalties: penalties(params, tokens, sequence.prompt_len() - sequence.source_len()),
    };
    LogitRow { choice: Choice::Draw(draw), num_logprobs: params.logprobs }
}

/// `None` where no penalty changes a logit.
fn penalties(params: &SamplingParams, tokens: &[u32], prompt_len: usize) -> Option<Penalties> {
    let SamplingParams { repetition_penalty, frequency_penalty, presence_penalty, .. } = *params;
    if presence_penalty == 0.0 && frequency_penalty == 0.0 && repetition_penalty == 1.0 {
        return None;
    }
    // token → occurrences in the output
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    for (position, &token) in tokens.iter().enumerate() {
        *counts.entry(token).or_default() += u32::from(position >= prompt_len);
    }
    Some(Penalties {
        repetition: repetition_penalty,
        frequency: frequency_penalty,
        presence: presence_penalty,
        seen: counts.into_iter().collect(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_counts_for_repetition_only() {
        let params = SamplingParams { repetition_penalty: 2.0, ..SamplingParams::default() };
        let found = penalties(&params, &[0, 1, 1, 2], 2).expect("a penalty");
        assert_eq!(found.seen, [(0, 0), (1, 1), (2, 1)]);
        assert_eq!(penalties(&SamplingParams::default(), &[0, 1], 1), None);
    }
}
