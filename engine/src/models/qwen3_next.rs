//! Qwen3-Next: three gated DeltaNet layers for each of gated attention, many small experts beside a shared one.

use kernels::DeltaSpec;

use super::footprint::{self, Footprint};
use super::qwen_moe::{SparseLayers, load_shared_expert};
use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig, QkNorm};
use crate::layers::decoder::{Decoder, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::gated_delta::{GatedDelta, GatedDeltaConfig};
use crate::layers::norm::NormKind;
use crate::weights::model_config::ModelConfig;

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let config = source.config;
    let decoder = DecoderConfig { norm_kind: NormKind::RmsPlusOne, ..DecoderConfig::from_config(config, 1e-6)? };
    let bias = config.flag_or("attention_bias", false)?.into();
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm::PerHead { eps: decoder.rms_norm_eps }),
        norm_kind: NormKind::RmsPlusOne,
        has_output_gate: true,
        ..AttentionConfig::from_config(config, source.max_model_len)?
    };
    let heads = delta_heads(config)?;
    let delta = GatedDeltaConfig { hidden_size: decoder.hidden_size, heads, norm_eps: decoder.rms_norm_eps };
    let mixer = |prefix: &str, idx: usize| match is_linear(config, idx)? {
        true => Ok(Mixer::Delta(GatedDelta::load(source.loader, &format!("{prefix}.linear_attn"), delta, idx)?)),
        false => {
            let prefix = format!("{prefix}.self_attn");
            Ok(Mixer::Gqa(Attention::load(source.loader, &prefix, attention.clone(), idx)?))
        }
    };
    let sparse = SparseLayers::from_config(config, config.size("num_experts")?)?;
    let shared = |prefix: &str| load_shared_expert(source, prefix);
    let feed_forward = |prefix: &str, idx: usize| sparse.load(source, (prefix, idx), &shared);
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// Keys and values of the attention layers, states of the others.
pub fn footprint(config: &ModelConfig) -> Result<Footprint, EngineError> {
    let num_layers = config.size("num_hidden_layers")?;
    let num_attentions = num_attentions(config, num_layers)?;
    let attention = footprint::attention_width(config, config.head_dim()?)?;
    let token_width = attention.saturating_mul(num_attentions as u64);
    Ok(Footprint {
        num_layers,
        token_width,
        least_token_width: token_width,
        state_width: (delta_heads(config)?.state_width() as u64).saturating_mul((num_layers - num_attentions) as u64),
    })
}

fn delta_heads(config: &ModelConfig) -> Result<DeltaSpec, EngineError> {
    let heads = DeltaSpec {
        num_key_heads: config.size("linear_num_key_heads")?,
        num_value_heads: config.size("linear_num_value_heads")?,
        key_dim: config.size("linear_key_head_dim")?,
        value_dim: config.size("linear_value_head_dim")?,
        conv_kernel: config.size("linear_conv_kernel_dim")?,
        activation: config.activation("hidden_act", "silu")?,
    };
    let sizes = [heads.num_key_heads, heads.num_value_heads, heads.key_dim, heads.value_dim, heads.conv_kernel];
    // Far more than any model has, so that products of three stay within 64 bits.
    if sizes.iter().any(|&size| size > 1 << 16) {
        let reason = format!("and the other sizes of the linear layers, {sizes:?}, may be at most 65536");
        return Err(EngineError::Config { key: "linear_num_key_heads", reason });
    }
    if !heads.num_value_heads.is_multiple_of(heads.num_key_heads) {
        let reason = format!("is {}, not a multiple of linear_num_key_heads", heads.num_value_heads);
        return Err(EngineError::Config { key: "linear_num_value_heads", reason });
    }
    Ok(heads)
}

/// By `layer_types`, else all but every `full_attention_interval`-th.
fn is_linear(config: &ModelConfig, idx: usize) -> Result<bool, EngineError> {
    match config.layer_type(idx, &["linear_attention", "full_attention"])? {
        Some(kind) => Ok(kind == "linear_attention"),
        None => Ok(!(idx + 1).is_multiple_of(config.size("full_attention_interval")?)),
    }
}

/// Layers with attention, without a look at each where no list names them: the config may promise any number.
fn num_attentions(config: &ModelConfig, num_layers: usize) -> Result<usize, EngineError> {
    match config.get("layer_types") {
        None => Ok(num_layers / config.size("full_attention_interval")?),
        Some(_) => (0..num_layers).try_fold(0, |sum, idx| Ok(sum + usize::from(!is_linear(config, idx)?))),
    }
}
