//! MiniMax-M2: norms over whole projections, partial rotation, sigmoid router with a bias on the choice, no shared expert.

use kernels::{RouterSpec, Scoring};

use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::{AttentionConfig, QkNorm};
use crate::layers::decoder::{Decoder, FeedForwardParts, LayerParts, Mixer};
use crate::layers::ends::DecoderConfig;
use crate::layers::moe::{self, ExpertShape, MoeParts};

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
    let mixer = Mixer::every_gqa(loader, &attention);
    let feed_forward = |prefix: &str, _: usize| {
        let block = format!("{prefix}.block_sparse_moe");
        let bias = loader.floats(&format!("{block}.e_score_correction_bias"), &[shape.num_experts])?;
        Ok(FeedForwardParts::moe(MoeParts::load(
            loader,
            &block,
            moe::NUMBERED,
            shape,
            RouterSpec { bias: Some(bias), renormalize: Some(0.0), ..RouterSpec::new(Scoring::Sigmoid, top_k) },
        )?))
    };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
