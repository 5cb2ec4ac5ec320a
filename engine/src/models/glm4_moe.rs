//! GLM-4.5 and GLM-4.6 (MoE), and dots.llm1: grouped-query attention over DeepSeek-V3's experts.

use kernels::Reach;

use super::fine_grained::{ChoiceBias, FineGrained, sigmoid_router};
use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig, QkNorm};
use crate::layers::decoder::{Decoder, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;

/// Partial rotation, optional norms per head, biases on queries, keys and values only.
pub fn load_glm(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let config = source.config;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let has_norm = config.flag_or("use_qk_norm", false)?;
    let attention = AttentionConfig {
        qkv_bias: config.flag_or("attention_bias", false)?.into(),
        qk_norm: has_norm.then_some(QkNorm::PerHead { eps: decoder.rms_norm_eps }),
        ..AttentionConfig::from_config(config, source.max_model_len)?
    };
    load(source, decoder, &|_| Ok(attention.clone()))
}

/// Norms per head, biases on all projections, windows on the layers that `layer_types` names, by default the later ones.
pub fn load_dots(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let config = source.config;
    let decoder = DecoderConfig::from_config(config, 1e-6)?;
    let bias = config.flag_or("attention_bias", false)?.into();
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm::PerHead { eps: decoder.rms_norm_eps }),
        ..AttentionConfig::from_config(config, source.max_model_len)?
    };
    let window = config.window("sliding_window")?;
    let first_window = config.count_or("max_window_layers", usize::MAX)?;
    let of_layer = |idx| {
        let slides = match config.layer_type(idx, &["full_attention", "sliding_attention"])? {
            Some(kind) => kind == "sliding_attention",
            None => idx >= first_window,
        };
        Ok(AttentionConfig { reach: if slides { window } else { Reach::Full }, ..attention.clone() })
    };
    load(source, decoder, &of_layer)
}

fn load(
    source: &ModelSource,
    decoder: DecoderConfig,
    attention: &dyn Fn(usize) -> Result<AttentionConfig, EngineError>,
) -> Result<Box<dyn Model>, EngineError> {
    let layers = FineGrained {
        choice_bias: Some(ChoiceBias::Vector("gate.e_score_correction_bias")),
        ..FineGrained::from_config(source.config, sigmoid_router(source.config)?)?
    };
    let mixer = |prefix: &str, idx: usize| {
        Ok(Mixer::Gqa(Attention::load(source.loader, &format!("{prefix}.self_attn"), attention(idx)?, idx)?))
    };
    let feed_forward = |prefix: &str, idx: usize| layers.load(source, prefix, idx);
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
