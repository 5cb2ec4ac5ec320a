//! Which experts a prompt takes. Neither OpenAI nor vLLM has this.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};

use super::chat::ChatMessage;
use super::completions::Prompt;

/// Query of `GET /v1/moe/routing`.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default)]
pub struct RoutingQuery {
    pub model: Option<String>,
    /// A text, as `/v1/completions` takes it.
    #[param(required)]
    pub prompt: Option<String>,
    /// Let the tokenizer add its special tokens; true by default.
    pub add_special_tokens: Option<bool>,
    /// What the requests gave that had the prompt.
    pub cache_salt: Option<String>,
}

/// Body of `POST /v1/moe/routing`: either `prompt`, one text or one list of token ids, or `messages`, as a chat has them.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(default)]
pub struct RoutingRequest {
    pub model: Option<String>,
    pub prompt: Option<Prompt>,
    #[schema(value_type = Option<Vec<ChatMessage>>)]
    pub messages: Option<Vec<Value>>,
    #[schema(value_type = Option<Vec<Object>>)]
    pub tools: Option<Value>,
    /// Let the tokenizer add its special tokens; true for a prompt, false for messages.
    pub add_special_tokens: Option<bool>,
    pub add_generation_prompt: Option<bool>,
    pub continue_final_message: Option<bool>,
    pub chat_template: Option<String>,
    #[schema(value_type = Option<Object>)]
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// What the requests gave that had the prompt.
    pub cache_salt: Option<String>,
}

/// What is known of a prompt's leading full blocks.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct RoutingProfile {
    /// Always `moe.routing`.
    pub object: &'static str,
    pub model: String,
    pub num_prompt_tokens: usize,
    /// Leading tokens of the prompt that are in known blocks.
    pub num_covered_tokens: usize,
    pub block_size: usize,
    /// Where the blocks were found.
    pub blocks: BlocksByTier,
    /// In the order in which a token meets the routers; empty where nothing is known.
    pub layers: Vec<LayerRouting>,
}

/// Known blocks by where they were found.
#[derive(Clone, Copy, Debug, Default, Serialize, ToSchema)]
pub struct BlocksByTier {
    pub memory: usize,
    pub disk: usize,
    pub redis: usize,
}

/// The experts of one router.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LayerRouting {
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Those that count as used, largest share first.
    pub experts: Vec<ExpertShare>,
}

#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub struct ExpertShare {
    pub expert: usize,
    /// Of the layer's load over the covered tokens, as far as one bit per expert and block tells: all shares add up to 1.
    pub share: f32,
    /// Blocks in which it counts as used.
    pub num_blocks: usize,
}
