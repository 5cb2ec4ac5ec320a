//! What a model's sequences will take, from the config alone, by the keys that the family reads: what other keys say must
//! not make a model look small. No tensor was compared with the config, so it may say anything.

use crate::error::EngineError;
use crate::layers::rope::Rope;
use crate::weights::model_config::ModelConfig;

/// Sizes of everything a sequence keeps, over all layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Footprint {
    /// An encoder's and a decoder's together.
    pub num_layers: usize,
    /// Numbers per token.
    pub token_width: u64,
    /// What a position is taken to keep at least, whatever windows leave behind.
    pub least_token_width: u64,
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

/// Longest sequence of any model; the longest published one has 10 million tokens.
pub const MAX_MODEL_LEN: usize = 1 << 24;

/// Where families keep the length of their windows.
const WINDOW_KEYS: [&str; 2] = ["sliding_window", "attention_chunk_size"];

/// `max_position_embeddings`: as many as the model was made for.
pub fn max_position_embeddings(config: &ModelConfig) -> Result<Positions, EngineError> {
    let trained = config.size("max_position_embeddings")?;
    let most = Rope::longest_context(config, trained)?;
    let limited_by = match most > trained {
        true => "the model's max_position_embeddings, stretched by dynamic NTK",
        false => "the model's max_position_embeddings",
    };
    Ok(Positions { default: trained.min(MAX_MODEL_LEN), most, limited_by })
}

/// One attention with keys and values in every layer. Where a window is configured, the layers that do not use it are counted
/// as one: the bound is for positions, and a family whose every layer has the window gets a lower one than it could.
pub fn attentions(config: &ModelConfig) -> Result<Footprint, EngineError> {
    let width = attention_width(config, config.head_dim()?)?;
    let footprint = per_layer(config, width)?;
    let has_windows = WINDOW_KEYS.iter().any(|key| config.get(key).is_some_and(|value| !value.is_null()));
    Ok(if has_windows { Footprint { least_token_width: width, ..footprint } } else { footprint })
}

/// So many latent attentions in every layer.
pub fn latents(config: &ModelConfig, num_attentions: u64) -> Result<Footprint, EngineError> {
    let latent = config.first_count(&["kv_lora_rank", "attention_kv_lora_dim"])?;
    let rotary = config.first_count(&["qk_rope_head_dim", "attention_qk_rope_dim"])?;
    per_layer(config, num_attentions * (latent + rotary) as u64)
}

/// JetMoE's heads have a width of their own.
pub fn jetmoe(config: &ModelConfig) -> Result<Footprint, EngineError> {
    per_layer(config, attention_width(config, config.size("kv_channels")?)?)
}

/// Numbers that one attention keeps per token.
pub fn attention_width(config: &ModelConfig, head_dim: usize) -> Result<u64, EngineError> {
    let num_kv_heads = config.first_count(&["num_key_value_heads", "num_attention_heads"])?;
    Ok((2 * num_kv_heads as u64).saturating_mul(head_dim as u64))
}

fn per_layer(config: &ModelConfig, token_width: u64) -> Result<Footprint, EngineError> {
    let num_layers = config.first_count(&["num_hidden_layers", "num_layers"])?;
    let token_width = token_width.saturating_mul(num_layers as u64);
    Ok(Footprint { num_layers, token_width, least_token_width: token_width, state_width: 0 })
}
