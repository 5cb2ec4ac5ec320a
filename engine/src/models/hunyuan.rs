//! Hunyuan MoE v1 (Hunyuan-A13B): norms on rotated queries and keys, one shared expert of the routed width, NTK by `alpha`.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{AttentionConfig, AttentionNames, QkNorm};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, MoeParts, SharedExpert, Weighting};
use crate::weights::model_config::ModelConfig;

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let bias = config.flag_or("attention_bias", false)?.into();
    check_own_keys(source)?;
    // The reference normalises whatever `use_qk_norm` says; a checkpoint without norms has no tensors for them.
    let has_norm =
        config.flag_or("use_qk_norm", true)? || loader.has("model.layers.0.self_attn.query_layernorm.weight");
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        names: AttentionNames { q_norm: "query_layernorm", k_norm: "key_layernorm", ..AttentionNames::default() },
        qk_norm: has_norm.then_some(QkNorm::PerRotatedHead { eps: decoder.rms_norm_eps }),
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    // The reference takes this width for routed and shared experts, whatever `moe_intermediate_size` says.
    let width = config.size("intermediate_size")?;
    let mixer = Mixer::every_gqa(loader, &attention);
    let feed_forward = |prefix: &str, idx: usize| {
        let mlp = format!("{prefix}.mlp");
        let num_experts = of_layer(config, "num_experts", idx)?;
        let shape = ExpertShape { num_experts, hidden_size: decoder.hidden_size, width };
        let spec = RouterSpec {
            renormalize: Some(0.0),
            ..RouterSpec::new(Scoring::Softmax, of_layer(config, "moe_topk", idx)?)
        };
        Ok(FeedForwardParts::moe(MoeParts {
            gate: moe::load_gate(loader, &format!("{mlp}.gate.wg"), shape)?,
            spec,
            experts: moe::load_experts(loader, &format!("{mlp}.experts"), moe::PROJECTIONS, shape)?,
            shared: Some(SharedExpert {
                mlp: Mlp::load(loader, &format!("{mlp}.shared_mlp"), decoder.hidden_size, width)?,
                gate: None,
            }),
            weighting: Weighting::default(),
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// Refuses layers that attend to the keys of an earlier one (`use_cla`): they come without keys of their own.
fn check_own_keys(source: &ModelSource) -> Result<(), EngineError> {
    let share = source.config.count_or("cla_share_factor", 1)?;
    let shares = source.config.flag_or("use_cla", false)? && share > 1;
    let num_layers = source.config.size("num_hidden_layers")?;
    if shares && num_layers > 1 && !source.loader.has("model.layers.1.self_attn.k_proj.weight") {
        let reason = format!("is true: {share} layers share their keys and values, which is not supported");
        return Err(EngineError::Config { key: "use_cla", reason });
    }
    Ok(())
}

/// A count that is one number for all layers, or a list with one for each.
fn of_layer(config: &ModelConfig, key: &'static str, idx: usize) -> Result<usize, EngineError> {
    if config.get(key).is_some_and(|value| value.is_array()) {
        let error = || EngineError::Config { key, reason: format!("has no positive entry for layer {idx}") };
        return config.counts(key)?.get(idx).copied().filter(|&count| count > 0).ok_or_else(error);
    }
    config.size(key)
}
