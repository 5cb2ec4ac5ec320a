//! Ling (Bailing MoE): fused queries, keys and values; version 1 with a softmax router and a normalised head, version 2
//! with DeepSeek-V3's router and norms per head.

use kernels::{RouterSpec, Scoring};

use super::fine_grained::{ChoiceBias, FineGrained, sigmoid_router};
use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig, AttentionNames, QkNorm, QkvNames};
use crate::layers::decoder::{Decoder, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, HeadKind};
use crate::layers::linear::Bias;
use crate::layers::moe::ExpertShape;
use crate::layers::mtp::MtpLayout;
use crate::weights::model_config::ModelConfig;

const NAMES: AttentionNames = AttentionNames {
    qkv: QkvNames::Fused("query_key_value"),
    out: "dense",
    q_norm: "query_layernorm",
    k_norm: "key_layernorm",
};

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let has_normalized_head = config.flag_or("norm_head", false)?;
    let decoder = DecoderConfig {
        embedding_name: "model.word_embeddings.weight",
        head: if has_normalized_head { HeadKind::ColumnNormalized } else { HeadKind::Plain },
        mtp_layout: MtpLayout::FinalNorm,
        ..DecoderConfig::from_config(config, 1e-6)?
    };
    let has_norm = config.flag_or("use_qk_norm", false)?;
    let attention = AttentionConfig {
        qkv_bias: config.flag_or("use_qkv_bias", false)?.into(),
        out_bias: config.flag_or("use_bias", false)?.into(),
        names: NAMES,
        qk_norm: has_norm.then_some(QkNorm::PerHead { eps: decoder.rms_norm_eps }),
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let layers = feed_forward_layers(config)?;
    let mixer = |prefix: &str, idx: usize| {
        Ok(Mixer::Gqa(Attention::load(loader, &format!("{prefix}.attention"), attention.clone(), idx)?))
    };
    let feed_forward = |prefix: &str, idx: usize| layers.load(source, prefix, idx);
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

fn feed_forward_layers(config: &ModelConfig) -> Result<FineGrained, EngineError> {
    let (spec, choice_bias) = match config.text_or("score_function", "softmax")? {
        "softmax" => (v1_router(config)?, None),
        "sigmoid" => {
            let has_bias = config.flag_or("moe_router_enable_expert_bias", false)?;
            (v2_router(config)?, has_bias.then_some(ChoiceBias::Vector("gate.expert_bias")))
        }
        other => {
            let reason = format!("is `{other}`, supported are softmax, sigmoid");
            return Err(EngineError::Config { key: "score_function", reason });
        }
    };
    Ok(FineGrained {
        first_moe: config.count_or("first_k_dense_replace", 0)?,
        frequency: 1,
        dense_width: config.count_or("intermediate_size", 0)?,
        shape: ExpertShape {
            num_experts: config.size("num_experts")?,
            hidden_size: config.size("hidden_size")?,
            width: config.size("moe_intermediate_size")?,
        },
        num_shared: config.count_or("num_shared_experts", 0)?,
        spec,
        choice_bias,
        bias: Bias::No,
    })
}

fn v1_router(config: &ModelConfig) -> Result<RouterSpec, EngineError> {
    let top_k = config.size("num_experts_per_tok")?;
    let renormalized = config.flag_or("norm_topk_prob", true)? && top_k > 1;
    Ok(RouterSpec { renormalize: renormalized.then_some(0.0), ..RouterSpec::new(Scoring::Softmax, top_k) })
}

/// Renormalised whenever there is more than one expert, whatever `norm_topk_prob` says.
fn v2_router(config: &ModelConfig) -> Result<RouterSpec, EngineError> {
    let spec = sigmoid_router(config)?;
    Ok(RouterSpec { renormalize: (spec.top_k > 1).then_some(1e-20), ..spec })
}
