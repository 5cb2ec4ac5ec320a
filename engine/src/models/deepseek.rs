//! DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437), Kimi-K2 and openPangu Ultra MoE: latent attention,
//! shared experts beside many fine-grained ones, grouped routers.

use kernels::{GroupScore, RopeStyle, RouterSpec, Scoring};

use super::fine_grained::{ChoiceBias, FineGrained, groups, sigmoid_router};
use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::decoder::{Decoder, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, LayerNorms};
use crate::layers::mla::{LoraScales, MlaAttention, MlaConfig};
use crate::layers::rope::{ContextLen, Rope};
use crate::weights::model_config::ModelConfig;

/// The reference builds its low-rank norms with this default, whatever `rms_norm_eps` says.
const LORA_NORM_EPS: f64 = 1e-6;

pub fn load_v2(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let config = source.config;
    let layers = FineGrained {
        bias: config.flag_or("mlp_bias", false)?.into(),
        ..FineGrained::from_config(config, v2_router(config)?)?
    };
    load(source, DecoderConfig::from_config(config, 1e-6)?, layers)
}

pub fn load_v3(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let config = source.config;
    config.expect_text("scoring_func", &["sigmoid"])?;
    config.expect_text("topk_method", &["noaux_tc"])?;
    let layers = FineGrained {
        choice_bias: Some(ChoiceBias::Vector("gate.e_score_correction_bias")),
        ..FineGrained::from_config(source.config, sigmoid_router(source.config)?)?
    };
    load(source, DecoderConfig::from_config(source.config, 1e-6)?, layers)
}

/// What Kimi-K2.5 reads images with; its language model is Kimi-K2 under a prefix.
pub fn is_vision_tensor(_: &ModelConfig, name: &str) -> bool {
    name.starts_with("vision_tower.") || name.starts_with("mm_projector.")
}

/// DeepSeek-V3 with sandwich norms, without groups; published with keys of its own, re-saved with DeepSeek's.
pub fn load_pangu(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let config = &pangu_keys(source.config);
    let source = &ModelSource { config, ..*source };
    let has_bias = config.flag_or("router_enable_expert_bias", false)?;
    let layers = FineGrained {
        choice_bias: has_bias.then_some(ChoiceBias::Vector("e_score_correction_bias")),
        ..FineGrained::from_config(config, pangu_router(config)?)?
    };
    let norms = match config.flag_or("sandwich_norm", false)? {
        true => LayerNorms::Sandwich,
        false => LayerNorms::Pre,
    };
    load(source, DecoderConfig { norms, ..DecoderConfig::from_config(config, 1e-5)? }, layers)
}

/// The weight of an only expert stays as it is.
fn pangu_router(config: &ModelConfig) -> Result<RouterSpec, EngineError> {
    let spec = sigmoid_router(config)?;
    Ok(RouterSpec { renormalize: spec.renormalize.filter(|_| spec.top_k > 1), ..spec })
}

/// openPangu's published keys in DeepSeek's spelling.
fn pangu_keys(config: &ModelConfig) -> ModelConfig {
    config.renamed(&[
        ("attention_q_lora_dim", "q_lora_rank"),
        ("attention_kv_lora_dim", "kv_lora_rank"),
        ("attention_qk_dim", "qk_nope_head_dim"),
        ("attention_qk_rope_dim", "qk_rope_head_dim"),
        ("attention_v_dim", "v_head_dim"),
        ("num_routed_experts", "n_routed_experts"),
        ("num_shared_experts", "n_shared_experts"),
        ("num_dense_layers", "first_k_dense_replace"),
    ])
}

fn load(source: &ModelSource, decoder: DecoderConfig, layers: FineGrained) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let attention = mla_config(config, max_model_len)?;
    let mixer = |prefix: &str, idx: usize| {
        Ok(Mixer::Mla(MlaAttention::load(loader, &format!("{prefix}.self_attn"), attention.clone(), idx)?))
    };
    let feed_forward = |prefix: &str, idx: usize| layers.load(source, prefix, idx);
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// Latent attention with DeepSeek's keys.
pub(super) fn mla_config(config: &ModelConfig, max_model_len: ContextLen) -> Result<MlaConfig, EngineError> {
    let (nope, rotary) = (config.size("qk_nope_head_dim")?, config.size("qk_rope_head_dim")?);
    let rope = Rope::from_config(config)?;
    Ok(MlaConfig {
        hidden_size: config.size("hidden_size")?,
        num_heads: config.size("num_attention_heads")?,
        q_lora_rank: config.opt_size("q_lora_rank")?,
        kv_lora_rank: config.size("kv_lora_rank")?,
        qk_nope_head_dim: nope,
        qk_rope_head_dim: rotary,
        v_head_dim: config.size("v_head_dim")?,
        bias: config.flag_or("attention_bias", false)?.into(),
        lora_norm_eps: LORA_NORM_EPS,
        scale: ((nope + rotary) as f64).powf(-0.5) * rope.softmax_factor(),
        lora_scales: LoraScales::default(),
        rope: rope.table(rotary, max_model_len)?,
        rope_style: match config.flag_or("rope_interleave", true)? {
            true => RopeStyle::Pairs,
            false => RopeStyle::Halves,
        },
    })
}

/// Softmax over all experts; raw probabilities, scaled, are the weights. V2 limits the choice to the groups with the best
/// single expert, the others' scores becoming 0.
fn v2_router(config: &ModelConfig) -> Result<RouterSpec, EngineError> {
    config.expect_text("scoring_func", &["softmax"])?;
    let groups = match config.text_or("topk_method", "greedy")? {
        "greedy" => None,
        "group_limited_greedy" => groups(config, GroupScore::Max, 0.0)?,
        other => {
            let reason = format!("is `{other}`, supported are greedy, group_limited_greedy");
            return Err(EngineError::Config { key: "topk_method", reason });
        }
    };
    Ok(RouterSpec {
        groups,
        scale: config.float_or("routed_scaling_factor", 1.0)? as f32,
        ..RouterSpec::new(Scoring::Softmax, config.size("num_experts_per_tok")?)
    })
}
