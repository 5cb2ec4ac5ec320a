//! Chat completions.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::ToSchema;

use super::logprobs::{ChatLogprobs, PromptLogprobs};
use super::routed_experts::RoutedExperts;
use super::sampling::SamplingOptions;
use super::usage::Usage;
use super::{FinishReason, StopReason};

/// Body of `POST /v1/chat/completions`.
// Two structs so that each is read by itself: serde's `flatten` would lose the path of a wrong field.
#[derive(Clone, Debug, Default, ToSchema)]
pub struct ChatCompletionRequest {
    #[serde(flatten)]
    pub chat: ChatOptions,
    #[serde(flatten)]
    pub sampling: SamplingOptions,
}

/// Fields that only chat has.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct ChatOptions {
    #[schema(value_type = Vec<ChatMessage>, required)]
    pub messages: Option<Vec<Value>>,
    /// Most tokens of a choice; wins over `max_tokens`. The rest of the context where neither is given.
    pub max_completion_tokens: Option<usize>,
    /// Report log-probs of the generated tokens.
    pub logprobs: Option<bool>,
    /// Alternatives per token, 0 to 20.
    pub top_logprobs: Option<u32>,
    /// Shown to the chat template; calls are not parsed yet, so only with `tool_choice` `none`.
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Value>,
    #[schema(value_type = Option<Object>)]
    pub tool_choice: Option<Value>,
    /// A Jinja template in place of the model's own.
    pub chat_template: Option<String>,
    /// Variables for the template.
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// End the prompt where the assistant begins; true by default.
    pub add_generation_prompt: Option<bool>,
    /// Go on with the last message in place of answering it.
    pub continue_final_message: Option<bool>,
    /// Let the tokenizer add its special tokens to what the template wrote; false by default.
    pub add_special_tokens: Option<bool>,
    /// Documents for the template.
    #[schema(value_type = Option<Vec<Object>>)]
    pub documents: Option<Value>,
    /// Shown to the chat template.
    pub reasoning_effort: Option<String>,
}

/// One message of a conversation; other fields are handed to the chat template as they are.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ChatMessage {
    /// `system`, `developer`, `user`, `assistant` or `tool`.
    pub role: String,
    #[serde(default)]
    pub content: Option<MessageContent>,
    #[serde(default)]
    pub name: Option<String>,
}

/// Text, or parts that are joined by line ends.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "expected a text or a list of parts with a `type`")]
pub enum MessageContent {
    Text(String),
    Parts(Vec<ContentPart>),
}

/// A part of a message; `type` must be `text`.
#[derive(Clone, Debug, Deserialize, ToSchema)]
pub struct ContentPart {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default)]
    pub text: Option<String>,
}

/// Answer to a chat completion that does not stream.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatCompletion {
    pub id: String,
    /// Always `chat.completion`.
    pub object: &'static str,
    /// Seconds since the epoch.
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: Usage,
    pub system_fingerprint: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Object>>)]
    pub prompt_logprobs: Option<PromptLogprobs>,
    /// Of the prompt's tokens; with `return_routed_experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub prompt_routed_experts: Option<RoutedExperts>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChoice {
    pub index: u32,
    pub message: AssistantMessage,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: FinishReason,
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Of all generated tokens but the last; with `return_routed_experts`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub routed_experts: Option<RoutedExperts>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct AssistantMessage {
    /// Always `assistant`.
    pub role: &'static str,
    pub content: String,
    /// Always null: nothing here refuses for the model.
    pub refusal: Option<String>,
}

/// One event of a streamed chat completion.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatCompletionChunk {
    pub id: String,
    /// Always `chat.completion.chunk`.
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub system_fingerprint: &'static str,
    pub choices: Vec<ChatChunkChoice>,
    /// Null but for the last chunk, present only with `stream_options`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Usage>)]
    pub usage: Option<Option<Usage>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prompt_token_ids: Option<Vec<u32>>,
    /// In the chunk of the first choice's first token.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub prompt_routed_experts: Option<RoutedExperts>,
}

#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ChatChunkChoice {
    pub index: u32,
    pub delta: ChatDelta,
    pub logprobs: Option<ChatLogprobs>,
    pub finish_reason: Option<FinishReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stop_reason: Option<StopReason>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_ids: Option<Vec<u32>>,
    /// Of the generated token before the chunk's: only now is it computed.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Vec<Vec<Vec<u16>>>>)]
    pub routed_experts: Option<RoutedExperts>,
}

#[derive(Clone, Debug, Default, Serialize, ToSchema)]
pub struct ChatDelta {
    /// In the first chunk only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub role: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
}
