//! MiniCPM and MiniCPM-MoE-8x2B (arXiv 2404.06395): scaled embedding, residual adds scaled by depth, scaled head.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::AttentionConfig;
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, Multipliers};
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, MoeParts};

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let depth = config.size("num_hidden_layers")? as f64;
    let base_width = config.size("dim_model_base")? as f64;
    let decoder = DecoderConfig {
        multipliers: Multipliers {
            embedding: config.float_or("scale_emb", 1.0)?,
            residual: config.float_or("scale_depth", 1.0)? / depth.sqrt(),
            logits: base_width / decoder.hidden_size as f64,
        },
        ..decoder
    };
    let bias = config.flag_or("attention_bias", false)?.into();
    let attention =
        AttentionConfig { qkv_bias: bias, out_bias: bias, ..AttentionConfig::from_config(config, max_model_len)? };
    let width = config.size("intermediate_size")?;
    let num_experts = config.count_or("num_experts", 0)?;
    let shape = ExpertShape { num_experts, hidden_size: decoder.hidden_size, width };
    let spec = RouterSpec {
        renormalize: Some(0.0),
        ..RouterSpec::new(Scoring::Softmax, config.count_or("num_experts_per_tok", 2)?)
    };
    let mixer = Mixer::every_gqa(loader, &attention);
    let feed_forward = |prefix: &str, _: usize| {
        let mlp = format!("{prefix}.mlp");
        if num_experts == 0 {
            return Ok(FeedForwardParts::Dense(Mlp::load(loader, &mlp, shape.hidden_size, width)?));
        }
        Ok(FeedForwardParts::moe(MoeParts::load(loader, &mlp, moe::NUMBERED, shape, spec.clone())?))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
