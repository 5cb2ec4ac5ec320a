//! The load of every expert. Neither OpenAI nor vLLM has this.

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Query of `GET /v1/moe/experts`.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct ExpertLoadQuery {
    /// Seconds to look back on, 1 to 600; since the start where absent.
    #[param(minimum = 1, maximum = 600)]
    #[serde(deserialize_with = "whole_seconds")]
    pub window: Option<u32>,
    /// `json` or `csv`; else CSV where `Accept` names `text/csv` first.
    pub format: Option<LoadFormat>,
}

/// Query of `POST /v1/moe/profile`.
#[derive(Clone, Debug, Default, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(default, deny_unknown_fields)]
pub struct ProfileQuery {
    /// Seconds to look back on, 1 to 600; since the start where absent.
    #[param(minimum = 1, maximum = 600)]
    #[serde(deserialize_with = "whole_seconds")]
    pub window: Option<u32>,
}

/// A query is text: what is wrong with it is said in words of its own.
fn whole_seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse()
        .map(Some)
        .map_err(|_| D::Error::custom(format!("`{text}` is not a whole number of seconds from 1 to 600")))
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum LoadFormat {
    Json,
    Csv,
}

/// What the routers chose.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct ExpertLoadMatrix {
    /// Always `moe.experts`.
    pub object: &'static str,
    pub model: String,
    /// What was asked for; null is since the start.
    pub window: Option<u32>,
    /// What the loads are of: the window and up to ten seconds more, or the time since the start.
    pub seconds: f64,
    /// In the order in which a token meets the routers; those of multi-token prediction last.
    pub layers: Vec<LayerLoad>,
}

/// The experts of one router, zero-computation ones behind the others.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub struct LayerLoad {
    /// As in the labels of metrics.
    pub layer: usize,
    pub num_experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Tokens that the router saw, of prompts and outputs; those taken from a cache were not seen.
    pub num_tokens: u64,
    /// Largest load over the mean; null without load, as the next two.
    pub imbalance: Option<f64>,
    /// Gini coefficient: 0 is even.
    pub gini: Option<f64>,
    /// In bits.
    pub entropy: Option<f64>,
    /// Of the tokens that the experts could have taken, the share that they took; null where they have no capacity.
    pub utilization: Option<f64>,
    /// Tokens that chose each expert, expert 0 first.
    pub loads: Vec<u64>,
    /// Of the layer's load; all shares add up to 1.
    pub shares: Vec<f64>,
}

/// How much each expert was used: what `moesaic profile` writes.
#[derive(Clone, Debug, ToSchema)]
#[expect(dead_code, reason = "it describes `engine::ExpertProfile`, which knows no OpenAPI")]
pub struct ExpertProfile {
    /// Always `moesaic.expert_profile.v1`.
    format: String,
    model: String,
    /// Digest of samples of the weights.
    weights: String,
    num_tokens: u64,
    layers: Vec<ExpertProfileLayer>,
}

#[derive(Clone, Debug, ToSchema)]
#[expect(dead_code, reason = "it describes `engine::ProfileLayer`, which knows no OpenAPI")]
pub struct ExpertProfileLayer {
    /// Experts per token.
    top_k: usize,
    num_tokens: u64,
    /// Tokens that chose each expert, expert 0 first.
    loads: Vec<u64>,
}
