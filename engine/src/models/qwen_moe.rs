//! Qwen2-MoE and Qwen3-MoE: dense and sparse layers mixed; Qwen2 gates a shared expert, Qwen3 normalises heads.

use kernels::{Reach, RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig, QkNorm};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::linear::{Bias, Linear};
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, MoeParts, SharedExpert};
use crate::weights::model_config::ModelConfig;

pub fn load_qwen2(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-6)?;
    let attention = AttentionConfig {
        qkv_bias: config.flag_or("qkv_bias", true)?.into(),
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let windows = Qwen2Windows::from_config(config)?;
    let shared = |prefix: &str| load_shared_expert(source, prefix);
    let mixer = |prefix: &str, idx: usize| {
        let attention = AttentionConfig { reach: windows.of_layer(config, idx)?, ..attention.clone() };
        Ok(Mixer::Gqa(Attention::load(loader, &format!("{prefix}.self_attn"), attention, idx)?))
    };
    let sparse = SparseLayers::from_config(config, config.size("num_experts")?)?;
    let feed_forward = |prefix: &str, idx: usize| sparse.load(source, (prefix, idx), &shared);
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

pub fn load_qwen3(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-6)?;
    let bias = config.flag_or("attention_bias", false)?.into();
    let reach = match config.flag_or("use_sliding_window", false)? {
        true => config.window("sliding_window")?,
        false => Reach::Full,
    };
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        reach,
        qk_norm: Some(QkNorm::PerHead { eps: decoder.rms_norm_eps }),
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let mixer = Mixer::every_gqa(loader, &attention);
    // transformers 5 saves the count under Mixtral's key.
    let num_experts = match config.opt_count("num_experts")? {
        Some(num_experts) => num_experts,
        None => config.size("num_local_experts")?,
    };
    let sparse = SparseLayers::from_config(config, num_experts)?;
    let feed_forward = |prefix: &str, idx: usize| sparse.load(source, (prefix, idx), &|_| Ok(None));
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// The shared expert of a layer and the gate on it.
pub fn load_shared_expert(source: &ModelSource, prefix: &str) -> Result<Option<SharedExpert>, EngineError> {
    let ModelSource { config, loader, .. } = *source;
    let (hidden_size, width) = (config.size("hidden_size")?, config.size("shared_expert_intermediate_size")?);
    let mlp = Mlp::load(loader, &format!("{prefix}.mlp.shared_expert"), hidden_size, width)?;
    let gate = Linear::load_router(loader, &format!("{prefix}.mlp.shared_expert_gate"), [1, hidden_size], Bias::No)?;
    Ok(Some(SharedExpert { mlp, gate: Some(gate) }))
}

/// Sliding windows of Qwen2-MoE, if switched on at all: the layers that `layer_types` names, by default every other one
/// below `max_window_layers`.
struct Qwen2Windows {
    window: Reach,
    max_window_layers: usize,
}

impl Qwen2Windows {
    fn from_config(config: &ModelConfig) -> Result<Self, EngineError> {
        let window = match config.flag_or("use_sliding_window", false)? {
            true => config.window("sliding_window")?,
            false => Reach::Full,
        };
        Ok(Self { window, max_window_layers: config.count_or("max_window_layers", 28)? })
    }

    fn of_layer(&self, config: &ModelConfig, idx: usize) -> Result<Reach, EngineError> {
        let is_sliding = match config.layer_type(idx, &["full_attention", "sliding_attention"])? {
            Some(kind) => kind == "sliding_attention",
            None => idx.is_multiple_of(2) && idx < self.max_window_layers,
        };
        Ok(if is_sliding { self.window } else { Reach::Full })
    }
}

/// Which layers hold experts, and how both kinds load.
pub struct SparseLayers {
    decoder_sparse_step: usize,
    mlp_only_layers: Vec<usize>,
    dense_width: usize,
    shape: ExpertShape,
    spec: RouterSpec,
}

impl SparseLayers {
    pub fn from_config(config: &ModelConfig, num_experts: usize) -> Result<Self, EngineError> {
        Ok(Self {
            decoder_sparse_step: config.count_or("decoder_sparse_step", 1)?.max(1),
            mlp_only_layers: config.counts("mlp_only_layers")?,
            dense_width: config.count_or("intermediate_size", 0)?,
            shape: ExpertShape {
                num_experts,
                hidden_size: config.size("hidden_size")?,
                width: config.size("moe_intermediate_size")?,
            },
            spec: RouterSpec {
                renormalize: config.flag_or("norm_topk_prob", false)?.then_some(0.0),
                ..RouterSpec::new(Scoring::Softmax, config.size("num_experts_per_tok")?)
            },
        })
    }

    pub fn load(
        &self,
        source: &ModelSource,
        (prefix, idx): (&str, usize),
        shared: &dyn Fn(&str) -> Result<Option<SharedExpert>, EngineError>,
    ) -> Result<FeedForwardParts, EngineError> {
        let loader = source.loader;
        let mlp = format!("{prefix}.mlp");
        if self.mlp_only_layers.contains(&idx) || !(idx + 1).is_multiple_of(self.decoder_sparse_step) {
            return Ok(FeedForwardParts::Dense(Mlp::load(loader, &mlp, self.shape.hidden_size, self.dense_width)?));
        }
        Ok(FeedForwardParts::moe(MoeParts {
            shared: shared(prefix)?,
            ..MoeParts::load(loader, &mlp, moe::PROJECTIONS, self.shape, self.spec.clone())?
        }))
    }
}
