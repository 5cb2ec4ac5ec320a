//! Granite MoE: stacked experts, softmax over the chosen logits, multipliers on embedding, residual, scores and logits;
//! with or without a network that all tokens share.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::AttentionConfig;
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, Multipliers};
use crate::layers::linear::{Bias, Linear};
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, MoeParts, SharedExpert, Weighting};
use crate::weights::loader::Loader;

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
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
    let mixer = Mixer::every_gqa(loader, &attention);
    // Only granitemoeshared has the key.
    let shared_width = config.count_or("shared_intermediate_size", 0)?;
    let feed_forward = |prefix: &str, _: usize| {
        let block = format!("{prefix}.block_sparse_moe");
        // Saved from memory, without transformers' renaming, router and experts have the names most families give them.
        let is_renamed = loader.has(&format!("{block}.router.weight"));
        let (router, names) = match is_renamed {
            true => ("router", ["experts.gate_up_proj", "experts.down_proj"]),
            false => ("router.layer", ["input_linear.weight", "output_linear.weight"]),
        };
        let names = names.map(|part| format!("{block}.{part}"));
        let experts = match loader.has(&names[0]) {
            true => moe::load_stacked_experts(loader, [&names[0], &names[1]], shape)?,
            // As they are read from GGUF.
            false => moe::load_experts(loader, &format!("{block}.experts"), moe::PROJECTIONS, shape)?,
        };
        Ok(FeedForwardParts::moe(MoeParts {
            gate: moe::load_gate(loader, &format!("{block}.{router}"), shape)?,
            spec: spec.clone(),
            experts,
            shared: load_shared(loader, &format!("{prefix}.shared_mlp"), [decoder.hidden_size, shared_width])?,
            weighting: Weighting::default(),
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// `{prefix}.{input,output}_linear`, the gate's rows first, or, as from GGUF, `{prefix}.{gate,up,down}_proj`; a width of 0
/// is none.
fn load_shared(
    loader: &Loader,
    prefix: &str,
    [hidden_size, width]: [usize; 2],
) -> Result<Option<SharedExpert>, EngineError> {
    if width == 0 {
        return Ok(None);
    }
    if loader.has(&format!("{prefix}.gate_proj.weight")) {
        return Ok(Some(SharedExpert { mlp: Mlp::load(loader, prefix, hidden_size, width)?, gate: None }));
    }
    let gate_up = Linear::load(loader, &format!("{prefix}.input_linear"), 2 * width, hidden_size, Bias::No)?;
    let down = Linear::load(loader, &format!("{prefix}.output_linear"), hidden_size, width, Bias::No)?;
    Ok(Some(SharedExpert { mlp: Mlp::from_fused(gate_up, down), gate: None }))
}
