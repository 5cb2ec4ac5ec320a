//! DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (arXiv 2412.19437) and Kimi-K2: latent attention, shared experts beside
//! many fine-grained ones, grouped routers.

use kernels::{GroupScore, Groups, RopeStyle, RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::decoder::{Decoder, DecoderConfig, FeedForwardParts, LayerParts, Mixer};
use crate::layers::mla::{MlaAttention, MlaConfig};
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, MoeParts, SharedExpert};
use crate::layers::rope::Rope;
use crate::weights::model_config::ModelConfig;

/// The reference builds its low-rank norms with this default, whatever `rms_norm_eps` says.
const LORA_NORM_EPS: f64 = 1e-6;

pub fn load_v2(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let spec = v2_router(source.config)?;
    load(source, spec, CorrectionBias::Absent)
}

pub fn load_v3(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let spec = v3_router(source.config)?;
    load(source, spec, CorrectionBias::Present)
}

/// Multi-token-prediction layers are stored after the last decoder layer.
pub fn is_mtp_tensor(config: &ModelConfig, name: &str) -> bool {
    let num_layers = config.count_or("num_hidden_layers", usize::MAX).unwrap_or(usize::MAX);
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.is_some_and(|layer| layer >= num_layers)
}

/// V3's per-expert bias on the choice, learned instead of an auxiliary loss.
#[derive(Clone, Copy, PartialEq, Eq)]
enum CorrectionBias {
    Present,
    Absent,
}

fn load(source: &ModelSource, spec: RouterSpec, bias: CorrectionBias) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len } = *source;
    config.expect_silu()?;
    let decoder = DecoderConfig::from_config(config, 1e-6)?;
    let hidden_size = decoder.hidden_size;
    let attention = mla_config(config, max_model_len)?;
    let shape = ExpertShape {
        num_experts: config.size("n_routed_experts")?,
        hidden_size,
        width: config.size("moe_intermediate_size")?,
    };
    let num_shared = config.count_or("n_shared_experts", 0)?;
    let dense_width = config.size("intermediate_size")?;
    let first_moe = config.count_or("first_k_dense_replace", 0)?;
    let frequency = config.count_or("moe_layer_freq", 1)?.max(1);
    let mixer = |prefix: &str, idx: usize| {
        Ok(Mixer::Mla(MlaAttention::load(loader, &format!("{prefix}.self_attn"), attention.clone(), idx)?))
    };
    let feed_forward = |prefix: &str, idx: usize| {
        let mlp = format!("{prefix}.mlp");
        if idx < first_moe || !idx.is_multiple_of(frequency) {
            return Ok(FeedForwardParts::Dense(Mlp::load(loader, &mlp, hidden_size, dense_width)?));
        }
        let mut spec = spec.clone();
        if bias == CorrectionBias::Present {
            spec.bias = Some(loader.floats(&format!("{mlp}.gate.e_score_correction_bias"), &[shape.num_experts])?);
        }
        let shared = match num_shared {
            0 => None,
            n => Some(Mlp::load(loader, &format!("{mlp}.shared_experts"), hidden_size, n * shape.width)?),
        };
        Ok(FeedForwardParts::Moe(MoeParts {
            gate: moe::load_gate(loader, &format!("{mlp}.gate"), shape)?,
            spec,
            experts: moe::load_experts(loader, &format!("{mlp}.experts"), moe::PROJECTIONS, shape)?,
            shared: shared.map(|mlp| SharedExpert { mlp, gate: None }),
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

fn mla_config(config: &ModelConfig, max_model_len: usize) -> Result<MlaConfig, EngineError> {
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
        top_k: config.size("num_experts_per_tok")?,
        scoring: Scoring::Softmax,
        bias: None,
        groups,
        renormalize: None,
        scale: config.float_or("routed_scaling_factor", 1.0)? as f32,
    })
}

/// Sigmoid scores; bias and groups (by the sum of their two best) steer the choice, unbiased scores are the weights.
fn v3_router(config: &ModelConfig) -> Result<RouterSpec, EngineError> {
    config.expect_text("scoring_func", &["sigmoid"])?;
    config.expect_text("topk_method", &["noaux_tc"])?;
    Ok(RouterSpec {
        top_k: config.size("num_experts_per_tok")?,
        scoring: Scoring::Sigmoid,
        bias: None,
        groups: groups(config, GroupScore::TopTwoSum, f32::NEG_INFINITY)?,
        renormalize: config.flag_or("norm_topk_prob", true)?.then_some(1e-20),
        scale: config.float_or("routed_scaling_factor", 1.0)? as f32,
    })
}

/// One group is no limit at all.
fn groups(config: &ModelConfig, score: GroupScore, masked: f32) -> Result<Option<Groups>, EngineError> {
    let num = config.count_or("n_group", 1)?;
    let top = config.count_or("topk_group", num)?;
    Ok((num > 1).then_some(Groups { num, top, score, masked }))
}
