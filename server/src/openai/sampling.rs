//! Request fields that chat and text completions share.

use std::collections::HashMap;

use serde::Deserialize;
use utoipa::ToSchema;

use super::{CacheOptions, MoeOptions, OneOrMany, StreamOptions, object};

/// How tokens are drawn, when a choice ends and what is reported about it.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct SamplingOptions {
    /// A served model's name; may be left out.
    pub model: Option<String>,
    /// 0 is greedy. Range 0 to 2.
    pub temperature: Option<f32>,
    /// Keep the smallest set of tokens whose probability reaches this. Range above 0 to 1.
    pub top_p: Option<f32>,
    /// Keep the most likely tokens; 0 or -1 keeps all.
    pub top_k: Option<i64>,
    /// Drop tokens less likely than this share of the most likely one. Range 0 to 1.
    pub min_p: Option<f32>,
    /// Range -2 to 2.
    pub presence_penalty: Option<f32>,
    /// Range -2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Above 1 discourages tokens of prompt and output. Range above 0 to 2.
    pub repetition_penalty: Option<f32>,
    /// Token id (as a string) to a bias of -100 to 100, for up to 4096 tokens.
    pub logit_bias: Option<HashMap<String, f32>>,
    /// Equal seeds give equal outputs; drawn where absent.
    pub seed: Option<i64>,
    /// Number of choices per prompt. Range 1 to 128.
    pub n: Option<u32>,
    /// Up to 16 strings that end a choice; they are not part of the text.
    pub stop: Option<OneOrMany<String>>,
    /// Token ids that end a choice, beside the model's own.
    pub stop_token_ids: Option<Vec<u32>>,
    /// Keep the stop string or token at the end of the text.
    pub include_stop_str_in_output: Option<bool>,
    /// Tokens before which nothing but `max_tokens` ends a choice.
    pub min_tokens: Option<usize>,
    /// Most tokens of a choice.
    pub max_tokens: Option<usize>,
    /// Go on after the model's own stop tokens.
    pub ignore_eos: Option<bool>,
    /// Leave special tokens out of the text; true by default.
    pub skip_special_tokens: Option<bool>,
    /// Keep the space that some tokenizers write between neighbouring special tokens; true by default.
    pub spaces_between_special_tokens: Option<bool>,
    /// Put `prompt_token_ids` and `token_ids` in the answer.
    pub return_token_ids: Option<bool>,
    /// Put `prompt_routed_experts` and `routed_experts` in the answer: the experts of every token that was computed, which
    /// the last generated one never is; -1 for one that was left out. Not kept in the output cache.
    pub return_routed_experts: Option<bool>,
    /// Write tokens of log-probs as `token_id:N`.
    pub return_tokens_as_token_ids: Option<bool>,
    /// Log-probs of the prompt's tokens with so many alternatives each, 0 to 20; not for streams.
    pub prompt_logprobs: Option<u32>,
    /// Keep only the last so many tokens of the prompt; -1 keeps what the model can hold.
    pub truncate_prompt_tokens: Option<i64>,
    /// Only requests that give the same one share what is cached of their prompts; 1 to 256 bytes.
    pub cache_salt: Option<String>,
    /// Answer with server-sent events.
    pub stream: Option<bool>,
    #[serde(deserialize_with = "object")]
    pub stream_options: Option<StreamOptions>,
    /// What the request may do with the output cache.
    #[serde(deserialize_with = "object")]
    pub cache: Option<CacheOptions>,
    /// Fewer experts, and what they cost.
    #[serde(deserialize_with = "object")]
    pub moe: Option<MoeOptions>,
}
