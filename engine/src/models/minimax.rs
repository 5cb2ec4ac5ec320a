//! MiniMax-M2: norms over whole projections, partial rotation, sigmoid router with a bias on the choice, no shared expert.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{Attention, AttentionConfig, QkNorm};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::moe::{self, ExpertShape, MoeParts, Weighting};

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-6)?;
    let attention = AttentionConfig {
        qk_norm: Some(QkNorm::Whole { eps: decoder.rms_norm_eps }),
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let shape = ExpertShape {
        num_experts: config.size("num_local_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let top_k = config.size("num_experts_per_tok")?;
    let mixer = |prefix: &str, idx: usize| {
        Ok(Mixer::Gqa(Attention::load(loader, &format!("{prefix}.self_attn"), attention.clone(), idx)?))
    };
    let feed_forward = |prefix: &str, _: usize| {
        let block = format!("{prefix}.block_sparse_moe");
        let bias = loader.floats(&format!("{block}.e_score_correction_bias"), &[shape.num_experts])?;
        Ok(FeedForwardParts::moe(MoeParts {
            gate: moe::load_gate(loader, &format!("{block}.gate"), shape)?,
            spec: RouterSpec { bias: Some(bias), renormalize: Some(0.0), ..RouterSpec::new(Scoring::Sigmoid, top_k) },
            experts: moe::load_experts(loader, &format!("{block}.experts"), ["w1", "w3", "w2"], shape)?,
            shared: None,
            weighting: Weighting::default(),
        }))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
