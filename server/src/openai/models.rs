//! The list of models.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ModelCard {
    pub id: String,
    /// Always `model`.
    pub object: String,
    /// Seconds since the epoch at which the model was loaded.
    pub created: u64,
    pub owned_by: String,
    /// The model's first name, where this is an alias.
    pub root: String,
    /// Longest prompt plus output in tokens.
    pub max_model_len: usize,
}

#[derive(Clone, Debug, Deserialize, Serialize, ToSchema)]
pub struct ModelList {
    /// Always `list`.
    pub object: String,
    pub data: Vec<ModelCard>,
}
