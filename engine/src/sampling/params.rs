//! How one sequence is sampled, and when it ends.

use std::collections::BTreeMap;

/// Sampling of one sequence. Order of application: logit bias, `min_tokens` mask, penalties, temperature,
/// min-p, top-k, top-p, draw (vLLM's order).
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParams {
    /// 0 is greedy; otherwise logits are divided by it. Range 0..=2.
    pub temperature: f32,
    /// Keep the `top_k` most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches this. Range (0, 1].
    pub top_p: f32,
    /// Drop tokens less likely than `min_p` times the most likely one. Range 0..=1.
    pub min_p: f32,
    /// Subtracted once from the logit of every token already generated. Range -2..=2.
    pub presence_penalty: f32,
    /// Subtracted per occurrence among the generated tokens. Range -2..=2.
    pub frequency_penalty: f32,
    /// Divides positive and multiplies negative logits of tokens in prompt or output; 1 is off. Range (0, 2].
    pub repetition_penalty: f32,
    /// Added to the logits of these tokens. Range -100..=100.
    pub logit_bias: BTreeMap<u32, f32>,
    /// Key of the counter-based generator; the caller draws one where the request names none.
    pub seed: u64,
    /// Index of this choice among the request's `n`: part of the generator's key.
    pub choice: u32,
    /// Number of most likely tokens whose log-probs are reported beside the sampled one's; `None` reports nothing.
    pub logprobs: Option<u32>,
    /// The same for every prompt token but the first.
    pub prompt_logprobs: Option<u32>,
}

impl Default for SamplingParams {
    fn default() -> Self {
        Self {
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            repetition_penalty: 1.0,
            logit_bias: BTreeMap::new(),
            seed: 0,
            choice: 0,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}
