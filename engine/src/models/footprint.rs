//! What a model's sequences will take, from the config alone: no tensor was compared with it, so it may say anything.

use crate::error::EngineError;
use crate::weights::model_config::ModelConfig;

/// Sizes of everything a sequence keeps, over all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// An encoder's and a decoder's together.
    pub num_layers: usize,
    /// Numbers per token.
    pub token_width: u64,
    /// f32 per sequence, whatever its length.
    pub state_width: u64,
}

/// Tokens of a sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Positions {
    /// Where nothing is asked for.
    pub default: usize,
    /// What may be asked for.
    pub most: usize,
    /// Where `most` comes from, for the error.
    pub limited_by: &'static str,
}

/// `max_position_embeddings`: as many as the model was made for.
pub fn max_position_embeddings(config: &ModelConfig) -> Result<Positions, EngineError> {
    let most = config.size("max_position_embeddings")?;
    Ok(Positions { default: most, most, limited_by: "the model's max_position_embeddings" })
}

/// So many attentions in every layer, each with keys and values or with a latent.
pub fn attentions(config: &ModelConfig, per_layer: u64) -> Result<Footprint, EngineError> {
    let num_layers = config.first_count(&["num_hidden_layers", "num_layers"])?;
    let token_width = attention_width(config)?.saturating_mul(per_layer * num_layers as u64);
    Ok(Footprint { num_layers, token_width, state_width: 0 })
}

/// Numbers that one attention keeps per token.
pub fn attention_width(config: &ModelConfig) -> Result<u64, EngineError> {
    let latent_keys = ["kv_lora_rank", "attention_kv_lora_dim"];
    if latent_keys.iter().any(|key| config.get(key).is_some()) {
        let rotary = config.first_count(&["qk_rope_head_dim", "attention_qk_rope_dim"])?;
        return Ok((config.first_count(&latent_keys)? + rotary) as u64);
    }
    let num_kv_heads = config.first_count(&["num_key_value_heads", "num_attention_heads"])?;
    let head_dim = match config.opt_count("kv_channels")? {
        Some(head_dim) => head_dim,
        None => config.head_dim()?,
    };
    Ok((2 * num_kv_heads as u64).saturating_mul(head_dim as u64))
}
