//! ERNIE 4.5 MoE: rotation in pairs, experts in a range of layers at an interval, softmax scores with a bias on the choice.

use kernels::{RopeStyle, RouterSpec, Scoring};

use super::fine_grained::{ChoiceBias, FineGrained};
use super::{Model, ModelSource};
use crate::error::EngineError;
use crate::layers::attention::AttentionConfig;
use crate::layers::decoder::{Decoder, LayerParts, Mixer};
use crate::layers::ends::{DecoderConfig, HeadKind};
use crate::layers::moe::ExpertShape;

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, max_model_len, .. } = *source;
    let has_bias = config.flag_or("use_bias", false)?;
    let decoder = DecoderConfig {
        head: if has_bias { HeadKind::Biased } else { HeadKind::Plain },
        ..DecoderConfig::from_config(config, 1e-5)?
    };
    let attention = AttentionConfig {
        qkv_bias: has_bias.into(),
        out_bias: has_bias.into(),
        rope_style: RopeStyle::Pairs,
        ..AttentionConfig::from_config(config, max_model_len)?
    };
    let layers = FineGrained {
        first_moe: 0,
        frequency: 1,
        dense_width: config.size("intermediate_size")?,
        shape: ExpertShape {
            num_experts: config.size("moe_num_experts")?,
            hidden_size: decoder.hidden_size,
            width: config.size("moe_intermediate_size")?,
        },
        num_shared: config.count_or("moe_num_shared_experts", 0)?,
        spec: RouterSpec {
            renormalize: Some(0.0),
            min_sum: config.non_negative_or("moe_norm_min", 1e-12)? as f32,
            ..RouterSpec::new(Scoring::Softmax, config.size("moe_k")?)
        },
        choice_bias: Some(ChoiceBias::Row("moe_statics.e_score_correction_bias")),
        bias: has_bias.into(),
    };
    let interval = config.count_or("moe_layer_interval", 1)?.max(1);
    let start = config.count_or("moe_layer_start_index", 0)?;
    // -1 stands for the last layer.
    let end = match config.float_or("moe_layer_end_index", -1.0)? {
        end if end < 0.0 => usize::MAX,
        end => end as usize,
    };
    let mixer = Mixer::every_gqa(loader, &attention);
    let feed_forward =
        |prefix: &str, idx: usize| match (idx + 1).is_multiple_of(interval) && (start..=end).contains(&idx) {
            true => layers.load_moe(source, prefix),
            false => layers.load_dense(source, prefix),
        };
    let parts = LayerParts { mixer: &mixer, feed_forward: &feed_forward };
    Ok(Box::new(Decoder::load(source, decoder, parts)?))
}
