//! Text completions.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::logprobs::{CompletionLogprobs, PromptLogprobs};
use super::routed_experts::RoutedExperts;
use super::sampling::SamplingOptions;
use super::usage::Usage;
use super::{FinishReason, StopReason};

/// Body of `POST /v1/completions`.
// Two structs so that each is read by itself: serde's `flatten` would lose the path of a wrong field.
#[derive(Clone, Debug, Default, ToSchema)]
pub struct CompletionRequest {
    #[serde(flatten)]
    pub completion: CompletionOptions,
    #[serde(flatten)]
    pub sampling: SamplingOptions,
}

/// Fields that only text completions have.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct CompletionOptions {
    #[schema(required)]
    pub prompt: Option<Prompt>,
    /// Put the prompt before the answer's text.
    pub echo: Option<bool>,
    /// Report log-probs with so many alternatives per token, 0 to 20.
    pub logprobs: Option<u32>,
    /// Candidates to choose from; must equal `n`.
    pub best_of: Option<u32>,
    /// Let the tokenizer add its special tokens to a text prompt; true by default.
    pub add_special_tokens: Option<bool>,
}

/// One prompt or a batch, as text or as token ids.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
#[serde(untagged, expecting = "expected a text, a list of texts, a list of token ids, or a list of such lists")]
pub enum Prompt {
    Text(String),
    Tokens(Vec<u32>),
    Texts(Vec<String>),
    TokenLists(Vec<Vec<u32>>),
}

/// Answer to a text completion; streams send the same object in parts.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct Completion {
    pub id: String,
    /// Always `text_completion`.
    pub object: &'static str,
    /// Seconds since the epoch.
    pub created: u64,
    pub model: String,
    pub system_fingerprint: &'static str,
    pub choices: Vec<CompletionChoice>,
    /// In streams null but for the last chunk, and present only with `stream_options`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct CompletionChoice {
    /// Prompt index times `n` plus choice index.
    pub index: u32,
    pub text: String,
    pub logprobs: Option<CompletionLogprobs>,
    /// Null in a stream until the choice ends.
    pub finish_reason: Option<FinishReason>,
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// With `return_routed_experts`, of the prompt's tokens; in a stream in the chunk of the first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub prompt_routed_experts: Option<RoutedExperts>,
    /// With `return_routed_experts`, of all generated tokens but the last; in a stream of the token before the chunk's, for
    /// only now is it computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub routed_experts: Option<RoutedExperts>,
}
