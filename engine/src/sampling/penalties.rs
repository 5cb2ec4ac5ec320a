//! Penalties on tokens that occurred before.

use std::collections::BTreeMap;

use super::params::SamplingParams;

/// True if any penalty changes a logit.
pub(super) fn any(params: &SamplingParams) -> bool {
    params.presence_penalty != 0.0 || params.frequency_penalty != 0.0 || params.repetition_penalty != 1.0
}

/// Repetition penalty (arXiv 1909.05858) over prompt and output; presence and frequency penalties over the output alone,
/// as OpenAI and vLLM define them.
pub(super) fn apply(logits: &mut [f32], params: &SamplingParams, tokens: &[u32], prompt_len: usize) {
    // token → occurrences in the output
    let mut counts: BTreeMap<u32, u32> = BTreeMap::new();
    for (position, &token) in tokens.iter().enumerate() {
        *counts.entry(token).or_default() += u32::from(position >= prompt_len);
    }
    for (token, output_count) in counts {
        let Some(logit) = logits.get_mut(token as usize) else { continue };
        let factor = params.repetition_penalty;
        *logit = if *logit > 0.0 { *logit / factor } else { *logit * factor };
        if output_count > 0 {
            *logit -= params.frequency_penalty * output_count as f32 + params.presence_penalty;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompt_counts_for_repetition_only() {
        let params = SamplingParams {
            repetition_penalty: 2.0,
            presence_penalty: 0.5,
            frequency_penalty: 0.25,
            ..SamplingParams::default()
        };
        let mut logits = [4.0, -4.0, 1.0, 1.0];
        apply(&mut logits, &params, &[0, 1, 1, 2], 2);
        assert_eq!(logits, [2.0, -8.75, -0.25, 1.0]);
    }
}
