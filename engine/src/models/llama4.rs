//! Llama 4, text: chunked attention on rotating layers, full attention without positions on the others, one expert per
//! token whose input is weighted.

use kernels::{Expert, ExpertWeights, Reach, RopeStyle, RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig, QkNorm, QueryTemperature};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, MoeParts, SharedExpert, Weighting};
use crate::layers::rope::ContextLen;
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let attention = LayerKinds::from_config(config, max_model_len, decoder.rms_norm_eps)?;
    let shape = ExpertShape {
        num_experts: config.size("num_local_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let dense_width = config.size("intermediate_size_mlp")?;
    let step = config.count_or("interleave_moe_layer_step", 1)?.max(1);
    let is_listed = config.get("moe_layers").is_some();
    let moe_layers = config.counts("moe_layers")?;
    let spec = RouterSpec::new(Scoring::Sigmoid, config.count_or("num_experts_per_tok", 1)?);
    let mixer = |prefix: &str, idx: usize| {
        Ok(Mixer::Gqa(Attention::load(loader, &format!("{prefix}.self_attn"), attention.of_layer(config, idx)?, idx)?))
    };
    let feed_forward = |prefix: &str, idx: usize| {
        let block = format!("{prefix}.feed_forward");
        let is_moe = if is_listed { moe_layers.contains(&idx) } else { (idx + 1).is_multiple_of(step) };
        if !is_moe {
            return Ok(FeedForwardParts::Dense(Mlp::load(loader, &block, shape.hidden_size, dense_width)?));
        }
        Ok(FeedForwardParts::moe(MoeParts {
            gate: moe::load_gate(loader, &format!("{block}.router"), shape)?,
            spec: spec.clone(),
            experts: load_experts(loader, &format!("{block}.experts"), shape)?,
            shared: Some(SharedExpert {
                mlp: Mlp::load(loader, &format!("{block}.shared_expert"), shape.hidden_size, shape.width)?,
                gate: None,
            }),
            weighting: Weighting::Input,
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// Everything but the language model.
pub fn is_vision_tensor(_: &ModelConfig, name: &str) -> bool {
    name.starts_with("vision_model.") || name.starts_with("multi_modal_projector.")
}

/// Attention of the layers: rotating or without positions, chunked or full.
struct LayerKinds {
    rotating: AttentionConfig,
    position_free: AttentionConfig,
    /// Of the chunked layers.
    reach: Reach,
    /// 1 for a rotating layer, if the configuration lists them.
    listed: Vec<usize>,
    interval: usize,
}

impl LayerKinds {
    fn from_config(config: &ModelConfig, max_model_len: ContextLen, eps: f64) -> Result<Self, EngineError> {
        let bias = config.flag_or("attention_bias", false)?.into();
        let base = AttentionConfig {
            qkv_bias: bias,
            out_bias: bias,
            rope_style: RopeStyle::Pairs,
            ..AttentionConfig::from_config(config, max_model_len)?
        };
        let has_norm = config.flag_or("use_qk_norm", true)?;
        Ok(Self {
            rotating: AttentionConfig {
                qk_norm: has_norm.then_some(QkNorm::PerRotatedHeadUnit { eps }),
                ..base.clone()
            },
            position_free: AttentionConfig { rope: None, temperature: temperature(config)?, ..base },
            reach: match config.opt_count("attention_chunk_size")? {
                Some(chunk) if chunk > 0 => Reach::Chunk(chunk),
                _ => Reach::Full,
            },
            listed: config.counts("no_rope_layers")?,
            interval: config.count_or("no_rope_layer_interval", 4)?.max(1),
        })
    }

    /// Rotating layers are the chunked ones, unless `layer_types` says otherwise.
    fn of_layer(&self, config: &ModelConfig, idx: usize) -> Result<AttentionConfig, EngineError> {
        let rotates = match self.listed.get(idx) {
            Some(&listed) => listed != 0,
            None => !(idx + 1).is_multiple_of(self.interval),
        };
        let is_chunked = match config.layer_type(idx, &["full_attention", "chunked_attention"])? {
            Some(kind) => kind == "chunked_attention",
            None => rotates,
        };
        let kind = if rotates { &self.rotating } else { &self.position_free };
        Ok(AttentionConfig { reach: if is_chunked { self.reach } else { Reach::Full }, ..kind.clone() })
    }
}

/// `attn_temperature_tuning`: a flag, or a number in the first published configurations.
fn temperature(config: &ModelConfig) -> Result<Option<QueryTemperature>, EngineError> {
    let key = "attn_temperature_tuning";
    let is_tuned = match config.get(key) {
        Some(value) if value.is_number() => config.float_or(key, 0.0)? != 0.0,
        _ => config.flag_or(key, true)?,
    };
    if !is_tuned {
        return Ok(None);
    }
    let (scale, floor) = (config.float_or("attn_scale", 0.1)?, config.float_or("floor_scale", 8192.0)?);
    Ok(Some(QueryTemperature { scale, floor }))
}

/// Experts stacked as `[experts, in, out]`, gate before up.
fn load_experts(loader: &Loader, prefix: &str, shape: ExpertShape) -> Result<Vec<Expert>, EngineError> {
    let ExpertShape { num_experts, hidden_size, width } = shape;
    let gate_up =
        moe::load_transposed(loader, &format!("{prefix}.gate_up_proj"), [num_experts, 2 * width, hidden_size])?;
    let down = moe::load_transposed(loader, &format!("{prefix}.down_proj"), [num_experts, hidden_size, width])?;
    Ok(gate_up.into_iter().zip(down).map(|(gate_up, down)| Expert::Glu(ExpertWeights::swiglu(gate_up, down))).collect())
}
