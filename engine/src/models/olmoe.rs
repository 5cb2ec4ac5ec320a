//! OLMoE (arXiv 2409.02060): norms over whole query and key projections, optional clamp, softmax router.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{AttentionConfig, QkNorm};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::moe::{self, ExpertShape, MoeParts};

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let shape = ExpertShape {
        num_experts: config.size("num_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let bias = config.flag_or("attention_bias", false)?.into();
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        qk_norm: Some(QkNorm::Whole { eps: decoder.rms_norm_eps }),
        clip: config.opt_positive("clip_qkv")?,
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let spec = RouterSpec {
        renormalize: config.flag_or("norm_topk_prob", false)?.then_some(0.0),
        ..RouterSpec::new(Scoring::Softmax, config.size("num_experts_per_tok")?)
    };
    let mixer = Mixer::every_gqa(loader, &attention);
    let feed_forward = |prefix: &str, _: usize| {
        let block = format!("{prefix}.mlp");
        Ok(FeedForwardParts::moe(MoeParts::load(loader, &block, moe::PROJECTIONS, shape, spec.clone())?))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
