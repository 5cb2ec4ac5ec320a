//! Mixtral (arXiv 2401.04088): grouped-query attention, softmax router with renormalised top-k weights.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::AttentionConfig;
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::moe::{self, ExpertShape, MoeParts};

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let shape = ExpertShape {
        num_experts: config.size("num_local_experts")?,
        hidden_size: decoder.hidden_size,
        width: config.size("intermediate_size")?,
    };
    let attention = AttentionConfig {
        reach: config.window("sliding_window")?,
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let spec =
        RouterSpec { renormalize: Some(0.0), ..RouterSpec::new(Scoring::Softmax, config.size("num_experts_per_tok")?) };
    let mixer = Mixer::every_gqa(loader, &attention);
    let feed_forward = |prefix: &str, _: usize| {
        // Saved from memory, without transformers' renaming, the block has the name that most families give it.
        let is_renamed = loader.has(&format!("{prefix}.mlp.gate.weight"));
        let block = format!("{prefix}.{}", if is_renamed { "mlp" } else { "block_sparse_moe" });
        Ok(FeedForwardParts::moe(MoeParts::load(loader, &block, moe::NUMBERED, shape, spec.clone())?))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
