//! Token counts of a request.

use serde::Serialize;
use utoipa::ToSchema;

#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct Usage {
    pub prompt_tokens: usize,
    pub completion_tokens: usize,
    pub total_tokens: usize,
    pub prompt_tokens_details: PromptTokensDetails,
    /// True, and there only, where nothing was computed: all of the answer came from the output cache, or from a request
    /// that asked the same at the same time.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub cached: bool,
    /// Where routers did not choose as the model would have them, or the request's `moe.usage` asks for it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub moe: Option<MoeUsage>,
}

/// What the experts of all choices cost. The numbers are there where `moe.usage` asks for them, and are of the tokens that were
/// computed, here or for an earlier request: those of each prompt, and all generated ones but the last of a choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct MoeUsage {
    /// What changed the choices of routers; absent where nothing did.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub options: Option<RoutingInEffect>,
    /// Distinct experts, those of different layers apart.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub experts_touched: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub active_parameters: Option<ActiveParameters>,
    /// Pairs of token and expert that came to nothing because the expert was full; of each token that was computed for this request.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dropped_choices: Option<u64>,
    /// Pairs of token and expert that counted for less because the expert was full.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub scaled_choices: Option<u64>,
    /// Absent where all experts are in memory for good.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub expert_cache: Option<ExpertCacheUse>,
}

/// Parameters that take part in computing a token; experts that compute nothing have none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct ActiveParameters {
    /// Over all tokens, rounded.
    pub mean: u64,
    pub min: u64,
    pub max: u64,
}

/// What steps found of the experts that tokens of this request needed, each expert once for each layer of each step. One that several
/// requests wait for is read once and counts for each of them; what is read ahead and there in time is a hit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, ToSchema)]
pub struct ExpertCacheUse {
    pub hits: u64,
    pub misses: u64,
    /// Of the experts that were missed.
    pub bytes_moved: u64,
}

/// Options under which routers chose, each where it acts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, ToSchema)]
pub struct RoutingInEffect {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub top_p: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub max_experts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub router_noise: Option<f32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_factor: Option<f32>,
    /// `scale` or `drop`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub capacity_mode: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub overload_decay: Option<f32>,
    /// The answer depends on what else ran at the same time.
    pub couples_requests: bool,
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

    #[must_use]
    pub fn moe(self, moe: Option<MoeUsage>) -> Self {
        Self { moe, ..self }
    }

    pub fn new(prompt: PromptCount, completion_tokens: usize) -> Self {
        Self {
            prompt_tokens: prompt.num_tokens,
            completion_tokens,
            total_tokens: prompt.num_tokens + completion_tokens,
            prompt_tokens_details: PromptTokensDetails { cached_tokens: prompt.num_cached },
            cached: false,
            moe: None,
        }
    }
}
