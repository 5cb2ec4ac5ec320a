//! LongCat-Flash: two latent attentions and two dense networks per layer, with a shortcut mixture of experts across them, a
//! share of whose experts compute nothing.

use candle_core::Tensor;
use kernels::{Expert, RouterSpec, Scoring};

use super::deepseek::mla_config;
use super::mtp::APART;
use super::{CacheSite, Draft, DraftInput, ForwardContext, Model, ModelShape, ModelSource, Prefill};
use crate::error::EngineError;
use crate::layers::decoder::{DecoderLayer, FeedForward, Mixer};
use crate::layers::ends::{DecoderConfig, Ends, enter};
use crate::layers::linear::{Bias, Linear};
use crate::layers::mla::{LoraScales, MlaAttention, MlaConfig};
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, Moe, MoeParts, Weighting};
use crate::layers::mtp::{MtpLayer, MtpNames, PassesOn};
use crate::layers::norm::Norm;
use crate::layers::rope::ContextLen;
use crate::weights::model_config::ModelConfig;

struct LongCat {
    ends: Ends,
    layers: Vec<Layer>,
    mtp_layers: Vec<MtpLayer>,
    shape: ModelShape,
}

struct Layer {
    halves: [Half; 2],
    moe: Moe,
}

/// One attention with its dense network.
struct Half {
    input_norm: Norm,
    attention: MlaAttention,
    post_attention_norm: Norm,
    mlp: Mlp,
}

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let config = source.config;
    let decoder = DecoderConfig::from_config(config, 1e-5)?;
    let attention = attention_config(config, source.max_model_len)?;
    let source = &ModelSource { config, ..*source };
    let layers = (0..num_layers(config)?)
        .map(|idx| Layer::load(source, &decoder, &attention, idx))
        .collect::<Result<Vec<_>, _>>()?;
    let mtp_layers = match source.num_mtp_layers {
        0 => Vec::new(),
        _ => vec![load_mtp(source, &decoder, &attention, 2 * layers.len())?],
    };
    let sites = layers.iter().flat_map(|layer| layer.halves.each_ref().map(|half| half.attention.cache_site()));
    let mtp_sites = mtp_layers.iter().map(|mtp| mtp.layer().mixer.cache_site());
    let shape = ModelShape {
        vocab_size: decoder.vocab_size,
        num_layers: layers.len(),
        num_mtp_layers: mtp_layers.len(),
        cache_sites: sites.chain(mtp_sites).collect::<Vec<CacheSite>>(),
        moe_layers: layers.iter().map(|layer| layer.moe.shape()).collect(),
        expert_costs: layers.iter().map(|layer| layer.moe.cost().clone()).collect(),
        num_mtp_moe_layers: 0,
        prefill: Prefill::Causal,
    };
    Ok(Box::new(LongCat { ends: Ends::load(source.loader, decoder)?, layers, mtp_layers, shape }))
}

/// `num_layers`; transformers derives `num_hidden_layers` from it, one for each of the two attentions.
fn num_layers(config: &ModelConfig) -> Result<usize, EngineError> {
    match config.opt_size("num_layers")? {
        Some(num_layers) => Ok(num_layers),
        None => Ok(config.size("num_hidden_layers")? / 2),
    }
}

/// Multi-token prediction, the matrices that transformers saves for experts that have none, and the bias of the router,
/// which the reference allocates and never adds.
pub fn is_ignored(config: &ModelConfig, name: &str) -> bool {
    let num_experts = config.count_or("n_routed_experts", usize::MAX).unwrap_or(usize::MAX);
    let expert = name.split_once(".mlp.experts.").and_then(|(_, rest)| rest.split('.').next()?.parse::<usize>().ok());
    name.starts_with(APART)
        || name.ends_with(".router.classifier.bias")
        || expert.is_some_and(|expert| expert >= num_experts)
}

/// A latent attention with a dense network, in the names of `model.mtp.layers.0`: vLLM's `longcat_flash_mtp.py`.
fn load_mtp(
    source: &ModelSource,
    decoder: &DecoderConfig,
    attention: &MlaConfig,
    site: usize,
) -> Result<MtpLayer, EngineError> {
    let ModelSource { config, loader, .. } = *source;
    let name = |part: &str| format!("{APART}layers.0.{part}");
    let mlp = name("transformer_layer.mlp");
    let layer = DecoderLayer {
        input_norm: decoder.load_norm(loader, &name("input_layernorm"))?,
        mixer: Mixer::Mla(MlaAttention::load(loader, &name("self_attn"), attention.clone(), site)?),
        attention_out_norm: None,
        feed_forward_norm: decoder.load_norm(loader, &name("post_attention_layernorm"))?,
        feed_forward: FeedForward::Dense(
            Mlp::load(loader, &mlp, decoder.hidden_size, config.size("ffn_hidden_size")?)?
                .activated(decoder.activation),
        ),
        feed_forward_out_norm: None,
    };
    let names = MtpNames {
        norms: [name("enorm.m"), name("hnorm.m"), format!("{APART}norm")],
        projection: name("eh_proj"),
        embedding: Some(format!("{APART}embed_tokens.weight")),
        head: None,
        passes_on: PassesOn::Normed,
    };
    MtpLayer::load(loader, decoder, &names, layer)
}

/// Factors `sqrt(hidden_size / rank)` make up for what the low ranks lose.
fn attention_config(config: &ModelConfig, max_model_len: ContextLen) -> Result<MlaConfig, EngineError> {
    let attention = mla_config(config, max_model_len)?;
    let factor = |is_on: bool, rank: usize| match is_on {
        true => (attention.hidden_size as f64 / rank as f64).sqrt(),
        false => 1.0,
    };
    let query = match attention.q_lora_rank {
        Some(rank) => factor(config.flag_or("mla_scale_q_lora", true)?, rank),
        None => 1.0,
    };
    let latent = factor(config.flag_or("mla_scale_kv_lora", true)?, attention.kv_lora_rank);
    Ok(MlaConfig { lora_scales: LoraScales { query, latent }, ..attention })
}

impl Layer {
    fn load(
        source: &ModelSource,
        decoder: &DecoderConfig,
        attention: &MlaConfig,
        idx: usize,
    ) -> Result<Self, EngineError> {
        let ModelSource { config, loader, .. } = *source;
        let prefix = format!("model.layers.{idx}");
        let dense_width = config.size("ffn_hidden_size")?;
        let load_half = |half: usize| {
            let site = 2 * idx + half;
            Ok::<_, EngineError>(Half {
                input_norm: decoder.load_norm(loader, &format!("{prefix}.input_layernorm.{half}"))?,
                attention: MlaAttention::load(loader, &format!("{prefix}.self_attn.{half}"), attention.clone(), site)?,
                post_attention_norm: decoder.load_norm(loader, &format!("{prefix}.post_attention_layernorm.{half}"))?,
                mlp: Mlp::load(loader, &format!("{prefix}.mlps.{half}"), decoder.hidden_size, dense_width)?
                    .activated(decoder.activation),
            })
        };
        let moe = load_moe(source, &format!("{prefix}.mlp"), decoder.hidden_size)?;
        Ok(Self {
            halves: [load_half(0)?, load_half(1)?],
            moe: Moe::new(moe.activated(decoder.activation), idx, loader)?,
        })
    }

    /// Takes and gives `(what the layer before left over, residual stream)`.
    fn forward(
        &self,
        delta: Option<Tensor>,
        residual: Tensor,
        context: &mut ForwardContext,
    ) -> Result<(Tensor, Tensor), EngineError> {
        let [first, second] = &self.halves;
        let (normed, residual) = enter(&first.input_norm, delta, residual)?;
        let attended = first.attention.forward(&normed, context)?;
        let (normed, residual) = first.post_attention_norm.forward_residual(&attended, &residual)?;
        let shortcut = self.moe.forward(&normed, context)?;
        let (normed, residual) = second.input_norm.forward_residual(&first.mlp.forward(&normed)?, &residual)?;
        let attended = second.attention.forward(&normed, context)?;
        let (normed, residual) = second.post_attention_norm.forward_residual(&attended, &residual)?;
        Ok(((second.mlp.forward(&normed)? + shortcut)?, residual))
    }
}

/// Softmax over real and zero-computation experts; the bias steers the choice, raw probabilities, scaled, are the weights.
fn load_moe(source: &ModelSource, prefix: &str, hidden_size: usize) -> Result<MoeParts, EngineError> {
    let ModelSource { config, loader, .. } = *source;
    let num_identity = config.count_or("zero_expert_num", 0)?;
    if config.text_or("zero_expert_type", "identity")? != "identity" {
        let reason = "is not `identity`, the only supported kind".into();
        return Err(EngineError::Config { key: "zero_expert_type", reason });
    }
    let shape = ExpertShape {
        num_experts: config.size("n_routed_experts")?,
        hidden_size,
        width: config.size("expert_ffn_hidden_size")?,
    };
    let num_choices = shape.num_experts + num_identity;
    let router = format!("{prefix}.router");
    // The router first: its shape proves the number of identities before they are made.
    let gate = Linear::load_router(loader, &format!("{router}.classifier"), [num_choices, hidden_size], Bias::No)?;
    let mut experts = moe::load_experts(loader, &format!("{prefix}.experts"), moe::PROJECTIONS, shape)?;
    experts.extend((0..num_identity).map(|_| Expert::Identity));
    Ok(MoeParts {
        gate,
        spec: RouterSpec {
            bias: Some(loader.floats(&format!("{router}.e_score_correction_bias"), &[num_choices])?),
            scale: config.float_or("routed_scaling_factor", 1.0)? as f32,
            ..RouterSpec::new(Scoring::Softmax, config.size("moe_topk")?)
        },
        experts,
        shared: None,
        weighting: Weighting::default(),
    })
}

impl Model for LongCat {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn hidden(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let (mut delta, mut residual) = (None, self.ends.embed(&context.input.input_ids)?);
        for layer in &self.layers {
            let (left, stream) = layer.forward(delta, residual, context)?;
            (delta, residual) = (Some(left), stream);
        }
        self.ends.leave(delta, residual)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        self.ends.logits(hidden)
    }
    fn draft(&self, input: &DraftInput, context: &mut ForwardContext) -> Result<Draft, EngineError> {
        self.mtp_layers[input.mtp_idx].forward(&self.ends, input, context)
    }
}
