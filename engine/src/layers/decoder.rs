//! The pre-norm decoder stack that all causal families share.

use candle_core::Tensor;

use super::attention::{Attention, AttentionConfig};
use super::ends::{DecoderConfig, Ends, LayerNorms, Multipliers, enter, scaled};
use super::gated_delta::GatedDelta;
use super::mla::MlaAttention;
use super::mlp::Mlp;
use super::moa::MoaAttention;
use super::moe::{Moe, MoeParts};
use super::mtp::MtpLayer;
use super::norm::Norm;
use crate::error::EngineError;
use crate::experts::{ExpertCost, MoeShape};
use crate::models::{CacheSite, Draft, DraftInput, ForwardContext, Model, ModelShape, ModelSource, Prefill};
use crate::weights::loader::Loader;

#[derive(Debug)]
pub enum Mixer {
    Gqa(Attention),
    Mla(MlaAttention),
    Moa(MoaAttention),
    Delta(GatedDelta),
}

#[derive(Debug)]
pub enum FeedForward {
    Dense(Mlp),
    Moe(Box<Moe>),
}

#[derive(Debug)]
pub struct DecoderLayer {
    pub input_norm: Norm,
    pub mixer: Mixer,
    /// On what attention gave, before it joins the stream.
    pub attention_out_norm: Option<Norm>,
    pub feed_forward_norm: Norm,
    pub feed_forward: FeedForward,
    /// On what the feed-forward half gave, before it joins the stream.
    pub feed_forward_out_norm: Option<Norm>,
}

#[derive(Debug)]
pub struct Decoder {
    ends: Ends,
    layers: Vec<DecoderLayer>,
    mtp_layers: Vec<MtpLayer>,
    shape: ModelShape,
}

/// The two halves of layer `prefix = model.layers.{idx}`, as a family makes them.
pub struct LayerParts<'a> {
    pub mixer: &'a dyn Fn(&str, usize) -> Result<Mixer, EngineError>,
    pub feed_forward: &'a dyn Fn(&str, usize) -> Result<FeedForwardParts, EngineError>,
}

/// A feed-forward half before it knows its place among the MoE layers.
pub enum FeedForwardParts {
    Dense(Mlp),
    Moe(Box<MoeParts>),
}

impl FeedForwardParts {
    pub fn moe(parts: MoeParts) -> Self {
        Self::Moe(Box::new(parts))
    }
}

impl Decoder {
    /// All `num_hidden_layers` layers and what stands around them, and the multi-token-prediction layers behind them that
    /// `source` wants.
    pub fn load(source: &ModelSource, config: DecoderConfig, parts: LayerParts) -> Result<Self, EngineError> {
        let mut layers = load_layers(source, config, parts)?;
        let cache_sites = layers.iter().map(|layer| layer.mixer.cache_site()).collect();
        let moe_layers = layers.iter().flat_map(DecoderLayer::moe_shapes).collect();
        let expert_costs = layers.iter().flat_map(DecoderLayer::expert_costs).collect();
        let num_layers = layers.len() - source.num_mtp_layers;
        let num_mtp_moe_layers = layers[num_layers..].iter().flat_map(DecoderLayer::moe_shapes).count();
        let load_mtp = |(idx, layer)| {
            let names = config.mtp_layout.names(&format!("model.layers.{}", num_layers + idx));
            MtpLayer::load(source.loader, &config, &names, layer)
        };
        let mtp_layers =
            layers.split_off(num_layers).into_iter().enumerate().map(load_mtp).collect::<Result<_, _>>()?;
        let shape = ModelShape {
            vocab_size: config.vocab_size,
            num_layers,
            num_mtp_layers: source.num_mtp_layers,
            cache_sites,
            moe_layers,
            expert_costs,
            num_mtp_moe_layers,
            prefill: Prefill::Causal,
        };
        Ok(Self { ends: Ends::load(source.loader, config)?, layers, mtp_layers, shape })
    }
}

fn load_layers(
    source: &ModelSource,
    config: DecoderConfig,
    parts: LayerParts,
) -> Result<Vec<DecoderLayer>, EngineError> {
    let norm = |name: String| config.load_norm(source.loader, &name);
    let mut num_moe_layers = 0;
    let mut load_layer = |idx| {
        let prefix = format!("model.layers.{idx}");
        let (feed_forward_norm, is_sandwich) = match config.norms {
            LayerNorms::Pre => ("post_attention_layernorm", false),
            LayerNorms::Sandwich => ("pre_mlp_layernorm", true),
        };
        let mixer = (parts.mixer)(&prefix, idx)?;
        num_moe_layers += usize::from(mixer.moe_shape().is_some());
        let sandwich = |part: &str| is_sandwich.then(|| norm(format!("{prefix}.{part}"))).transpose();
        Ok(DecoderLayer {
            input_norm: norm(format!("{prefix}.input_layernorm"))?,
            mixer,
            attention_out_norm: sandwich("post_attention_layernorm")?,
            feed_forward_norm: norm(format!("{prefix}.{feed_forward_norm}"))?,
            feed_forward_out_norm: sandwich("post_mlp_layernorm")?,
            feed_forward: match (parts.feed_forward)(&prefix, idx)? {
                FeedForwardParts::Dense(mlp) => FeedForward::Dense(mlp.activated(config.activation)),
                FeedForwardParts::Moe(moe) => {
                    num_moe_layers += 1;
                    let moe = moe.activated(config.activation);
                    FeedForward::Moe(Box::new(Moe::new(moe, num_moe_layers - 1, source.loader)?))
                }
            },
        })
    };
    (0..source.config.size("num_hidden_layers")? + source.num_mtp_layers).map(&mut load_layer).collect()
}

impl Model for Decoder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn hidden(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let multipliers = self.ends.multipliers();
        let mut residual = self.ends.embed(&context.input.input_ids)?;
        let mut delta = None;
        for layer in &self.layers {
            let (left, stream) = layer.forward(delta, residual, multipliers, context)?;
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

impl DecoderLayer {
    /// Takes and gives `(what the layer before left over, residual stream)`.
    pub fn forward(
        &self,
        delta: Option<Tensor>,
        residual: Tensor,
        multipliers: Multipliers,
        context: &mut ForwardContext,
    ) -> Result<(Tensor, Tensor), EngineError> {
        let (normed, residual) = enter(&self.input_norm, delta, residual)?;
        let attended = renormed(self.mixer.forward(&normed, context)?, &self.attention_out_norm)?;
        let attended = scaled(attended, multipliers.residual)?;
        let (normed, residual) = self.feed_forward_norm.forward_residual(&attended, &residual)?;
        let out = renormed(self.feed_forward.forward(&normed, context)?, &self.feed_forward_out_norm)?;
        Ok((scaled(out, multipliers.residual)?, residual))
    }

    /// The routers in the layer, in the order they are asked.
    fn moe_shapes(&self) -> impl Iterator<Item = MoeShape> {
        self.mixer.moe_shape().into_iter().chain(self.feed_forward.moe_shape())
    }

    /// What their experts cost.
    fn expert_costs(&self) -> impl Iterator<Item = ExpertCost> {
        let of_mixer = match &self.mixer {
            Mixer::Moa(attention) => Some(attention.cost()),
            Mixer::Gqa(_) | Mixer::Mla(_) | Mixer::Delta(_) => None,
        };
        let of_feed_forward = match &self.feed_forward {
            FeedForward::Moe(moe) => Some(moe.cost().clone()),
            FeedForward::Dense(_) => None,
        };
        of_mixer.into_iter().chain(of_feed_forward)
    }
}

impl Mixer {
    /// The same grouped-query attention in every layer, under `{prefix}.self_attn`.
    pub fn every_gqa<'a>(
        loader: &'a Loader<'_>,
        attention: &'a AttentionConfig,
    ) -> impl Fn(&str, usize) -> Result<Self, EngineError> {
        move |prefix, idx| {
            Ok(Self::Gqa(Attention::load(loader, &format!("{prefix}.self_attn"), attention.clone(), idx)?))
        }
    }

    fn moe_shape(&self) -> Option<MoeShape> {
        match self {
            Self::Gqa(_) | Self::Mla(_) | Self::Delta(_) => None,
            Self::Moa(attention) => Some(attention.shape()),
        }
    }

    pub fn cache_site(&self) -> CacheSite {
        match self {
            Self::Gqa(attention) => attention.cache_site(),
            Self::Mla(attention) => attention.cache_site(),
            Self::Moa(attention) => attention.cache_site(),
            Self::Delta(delta) => delta.cache_site(),
        }
    }

    fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        match self {
            Self::Gqa(attention) => attention.forward(x, context),
            Self::Mla(attention) => attention.forward(x, context),
            Self::Moa(attention) => attention.forward(x, context),
            Self::Delta(delta) => delta.forward(x, context),
        }
    }
}

impl FeedForward {
    fn moe_shape(&self) -> Option<MoeShape> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(moe) => Some(moe.shape()),
        }
    }

    fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Moe(moe) => moe.forward(x, context),
        }
    }
}

fn renormed(x: Tensor, norm: &Option<Norm>) -> Result<Tensor, EngineError> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}

/// Rows of a tensor picked by index: `[num_tokens, width]` to `[rows.len(), width]`.
pub fn gather_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor, EngineError> {
    Ok(x.index_select(&Tensor::new(rows, x.device())?, 0)?)
}
