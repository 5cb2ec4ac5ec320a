//! Token counts of a request.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
    /// True, and there only, where nothing was computed: all of the answer came from the output cache, or from a request
    /// that asked the same at the same time.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cached: bool,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct PromptTokensDetails {
    /// Prompt tokens that were computed before, for an earlier request or one that runs now; each prompt counts once.
    pub cached_tokens: usize,
}

/// What the tokens of a prompt cost.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PromptCount {
    pub num_tokens: usize,
    pub num_cached: usize,
}

impl Usage {
    #[must_use]
    pub fn cached(self, cached: bool) -> Self {
        Self { cached, ..self }
    }

    pub fn new(prompt: PromptCount, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens: prompt.num_tokens,
            completion_tokens,
            total_tokens: prompt.num_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: prompt.num_cached },
            cached: false,
        }
    }
}
