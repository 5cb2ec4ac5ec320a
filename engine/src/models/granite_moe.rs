//! Granite MoE: stacked experts, softmax over the chosen logits, multipliers on embedding, residual, scores and logits.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, Multipliers};
use crate::layers::moe::{self, ExpertShape, MoeParts, Weighting};

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len } = *source;
    config.expect_silu()?;
    let decoder = DecoderConfig {
        multipliers: Multipliers {
            embedding: config.float_or("embedding_multiplier", 1.0)?,
            residual: config.float_or("residual_multiplier", 1.0)?,
            logits: 1.0 / config.positive_or("logits_scaling", 1.0)?,
        },
        ..DecoderConfig::from_config(config, 1e-6)?
    };
    let shape = ExpertShape {
        num_experts: config.size("num_local_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let bias = config.flag_or("attention_bias", false)?.into();
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        scale: config.float_or("attention_multiplier", 1.0)?,
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let spec = RouterSpec::new(Scoring::SoftmaxTopK, config.size("num_experts_per_tok")?);
    let mixer = |prefix: &str, idx: usize| {
        Ok(Mixer::Gqa(Attention::load(loader, &format!("{prefix}.self_attn"), attention.clone(), idx)?))
    };
    let feed_forward = |prefix: &str, _: usize| {
        let block = format!("{prefix}.block_sparse_moe");
        let names = ["input_linear", "output_linear"].map(|part| format!("{block}.{part}.weight"));
        Ok(FeedForwardParts::moe(MoeParts {
            gate: moe::load_gate(loader, &format!("{block}.router.layer"), shape)?,
            spec: spec.clone(),
            experts: moe::load_stacked_experts(loader, [&names[0], &names[1]], shape)?,
            shared: None,
            weighting: Weighting::default(),
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
