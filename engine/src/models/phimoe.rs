//! Phi-3.5-MoE: layer norms, SparseMixer router, longrope.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::AttentionConfig;
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, HeadKind};
use crate::layers::moe::{self, ExpertShape, MoeParts};
use crate::layers::norm::NormKind;

/// Experts that SparseMixer chooses, whatever the configuration says.
const TOP_K: usize = 2;

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let has_head_bias = config.flag_or("lm_head_bias", false)?;
    let decoder = DecoderConfig {
        norm_kind: NormKind::Layer,
        head: if has_head_bias { HeadKind::Biased } else { HeadKind::Plain },
        ..DecoderConfig::from_config(config, 1e-5)?
    };
    let bias = config.flag_or("attention_bias", false)?.into();
    let attention = AttentionConfig {
        qkv_bias: bias,
        out_bias: bias,
        reach: config.window("sliding_window")?,
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let shape = ExpertShape {
        num_experts: config.size("num_local_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let spec = RouterSpec::new(
        Scoring::SparseMixer { jitter: config.non_negative_or("router_jitter_noise", 0.01)? as f32 },
        TOP_K,
    );
    let mixer = Mixer::every_gqa(loader, &attention);
    let feed_forward = |prefix: &str, _: usize| {
        let block = format!("{prefix}.block_sparse_moe");
        Ok(FeedForwardParts::moe(MoeParts::load(loader, &block, moe::NUMBERED, shape, spec.clone())?))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
