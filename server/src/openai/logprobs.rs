//! Log-probabilities in the three shapes that clients know.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// One of the most likely tokens at a position of a chat completion.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct TopLogprob {
    pub token: String,
    pub logprob: f32,
    /// UTF-8 bytes of the token, which may be part of a character only.
    pub bytes: Option<Vec<u8>>,
}

/// One generated token of a chat completion.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprob {
    pub token: String,
    pub logprob: f32,
    pub bytes: Option<Vec<u8>>,
    pub top_logprobs: Vec<TopLogprob>,
}

/// Log-probs of a chat choice.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct ChatLogprobs {
    pub content: Vec<ChatLogprob>,
}

/// Log-probs of a text completion: parallel lists over its tokens.
#[derive(Clone, Debug, Default, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct CompletionLogprobs {
    pub tokens: Vec<String>,
    /// Null for the first token of an echoed prompt.
    pub token_logprobs: Vec<Option<f32>>,
    /// Token to log-prob, best first; null for the first token of an echoed prompt.
    #[schema(value_type = Vec<Object>)]
    pub top_logprobs: Vec<Option<Map<String, Value>>>,
    /// Where each token starts in the text, in characters.
    pub text_offset: Vec<usize>,
}

/// One alternative of a prompt token, keyed by its id.
#[derive(Clone, Debug, Deserialize, PartialEq, Serialize, ToSchema)]
pub struct PromptLogprobEntry {
    pub logprob: f32,
    /// 1 is the most likely; null where it is below the alternatives asked for.
    pub rank: Option<usize>,
    pub decoded_token: String,
}

/// Per prompt token: id to log-prob; null for the first.
pub type PromptLogprobs = Vec<Option<BTreeMap<u32, PromptLogprobEntry>>>;
