//! JetMoE (arXiv 2404.07413): experts in the attention heads as well as in the feed-forward layers.

use kernels::{Expert, ExpertActivation, ExpertBiases, ExpertWeights, GluActivation, RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, glu_activation};
use crate::layers::linear::{Bias, Linear};
use crate::layers::moa::{MoaAttention, MoaConfig, MoaPlace};
use crate::layers::moe::{ExpertShape, MoeParts, Weighting};
use crate::layers::rope::Rope;
use crate::weights::Role;
use crate::weights::loader::Loader;

/// Of the norms within layers, fixed in the reference; the last norm takes `rms_norm_eps`.
const LAYER_NORM_EPS: f64 = 1e-6;

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig {
        layer_norm_eps: LAYER_NORM_EPS,
        activation: glu_activation(config.activation("activation_function", "silu")?),
        ..DecoderConfig::from_config(config, 1e-6)?
    };
    let head_dim = config.size("kv_channels")?;
    let spec = RouterSpec::new(Scoring::SoftmaxTopK, config.size("num_experts_per_tok")?);
    let shape = ExpertShape {
        num_experts: config.size("num_local_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let attention = MoaConfig {
        hidden_size: decoder.hidden_size,
        num_experts: shape.num_experts,
        num_kv_heads: config.size("num_key_value_heads")?,
        head_dim,
        spec: spec.clone(),
        rope: Rope::from_config(config)?.table(head_dim, max_model_len)?,
    };
    let mixer = |prefix: &str, idx: usize| {
        // Every layer routes twice, attention first.
        let place = MoaPlace { site: idx, moe_idx: 2 * idx };
        Ok(Mixer::Moa(MoaAttention::load(loader, &format!("{prefix}.self_attention"), attention.clone(), place)?))
    };
    let feed_forward = |prefix: &str, _: usize| {
        let gate = format!("{prefix}.mlp.router.layer");
        Ok(FeedForwardParts::moe(MoeParts {
            gate: Linear::load_router(loader, &gate, [shape.num_experts, shape.hidden_size], Bias::No)?,
            spec: spec.clone(),
            experts: load_experts(loader, &format!("{prefix}.mlp"), shape)?,
            shared: None,
            weighting: Weighting::default(),
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}

/// The layer's bias goes with every expert: their weights sum to 1.
fn load_experts(loader: &Loader, prefix: &str, shape: ExpertShape) -> Result<Vec<Expert>, EngineError> {
    let ExpertShape { num_experts, hidden_size, width } = shape;
    let gate_up = loader.stacked_weights(
        (&format!("{prefix}.input_linear.weight"), Role::Expert),
        [num_experts, 2 * width, hidden_size],
    )?;
    let down = loader.stacked_weights(
        (&format!("{prefix}.output_linear.weight"), Role::Expert),
        [num_experts, hidden_size, width],
    )?;
    let bias = loader.floats(&format!("{prefix}.bias"), &[hidden_size])?;
    let expert = |(gate_up, down)| {
        let biases = ExpertBiases { gate_up: vec![0.0; 2 * width], down: bias.clone() };
        Expert::Glu(ExpertWeights {
            gate_up,
            down,
            biases: Some(biases),
            activation: ExpertActivation::Gated(GluActivation::Silu),
        })
    };
    Ok(gate_up.into_iter().zip(down).map(expert).collect())
}
