//! The pre-norm decoder stack that all causal families share.

use candle_core::{Device, Tensor};
use kernels::PackedWeight;

use super::attention::Attention;
use super::mla::MlaAttention;
use super::mlp::Mlp;
use super::moe::{Moe, MoeParts};
use super::norm::RmsNorm;
use crate::error::EngineError;
use crate::models::{CacheSite, ForwardContext, Model, ModelShape, ModelSource};
use crate::weights::model_config::ModelConfig;

#[derive(Debug)]
pub enum Mixer {
    Gqa(Attention),
    Mla(MlaAttention),
}

#[derive(Debug)]
pub enum FeedForward {
    Dense(Mlp),
    Moe(Moe),
}

#[derive(Debug)]
pub struct DecoderLayer {
    pub input_norm: RmsNorm,
    pub mixer: Mixer,
    /// On what attention gave, before it joins the stream.
    pub attention_out_norm: Option<RmsNorm>,
    pub feed_forward_norm: RmsNorm,
    pub feed_forward: FeedForward,
    /// On what the feed-forward half gave, before it joins the stream.
    pub feed_forward_out_norm: Option<RmsNorm>,
}

/// Where a layer normalises, and what the norms are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LayerNorms {
    /// Before each half: `input_layernorm`, `post_attention_layernorm`.
    Pre,
    /// Before and after each half: `input_layernorm`, `post_attention_layernorm`, `pre_mlp_layernorm`,
    /// `post_mlp_layernorm`.
    Sandwich,
}

/// What the output projection has beside its matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HeadKind {
    Plain,
    /// `lm_head.bias`.
    Biased,
    /// Every column of the matrix is divided by its length (Ling's `norm_head`).
    ColumnNormalized,
}

/// Factors that some families put on the stream; 1 where a family has none.
#[derive(Clone, Copy, Debug)]
pub struct Multipliers {
    pub embedding: f64,
    pub residual: f64,
    pub logits: f64,
}

impl Default for Multipliers {
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, logits: 1.0 }
    }
}

#[derive(Debug)]
pub struct Decoder {
    embedding: PackedWeight,
    layers: Vec<DecoderLayer>,
    norm: RmsNorm,
    /// `None`: the embedding serves as the output projection too.
    lm_head: Option<PackedWeight>,
    lm_head_bias: Option<Tensor>,
    multipliers: Multipliers,
    shape: ModelShape,
}

/// What a decoder needs beside its layers.
#[derive(Clone, Copy, Debug)]
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub rms_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub embedding_name: &'static str,
    pub head: HeadKind,
    pub norms: LayerNorms,
    pub multipliers: Multipliers,
}

impl DecoderConfig {
    /// The usual keys. `default_eps` is what transformers takes for the family where `rms_norm_eps` is absent.
    pub fn from_config(config: &ModelConfig, default_eps: f64) -> Result<Self, EngineError> {
        Ok(Self {
            vocab_size: config.size("vocab_size")?,
            hidden_size: config.size("hidden_size")?,
            rms_norm_eps: config.float_or("rms_norm_eps", default_eps)?,
            tie_word_embeddings: config.flag_or("tie_word_embeddings", false)?,
            embedding_name: "model.embed_tokens.weight",
            head: HeadKind::Plain,
            norms: LayerNorms::Pre,
            multipliers: Multipliers::default(),
        })
    }
}

/// The two halves of layer `prefix = model.layers.{idx}`, as a family makes them.
pub struct LayerParts<'a> {
    pub mixer: &'a dyn Fn(&str, usize) -> Result<Mixer, EngineError>,
    pub feed_forward: &'a dyn Fn(&str, usize) -> Result<FeedForwardParts, EngineError>,
}

/// A feed-forward half before it knows its place among the MoE layers.
pub enum FeedForwardParts {
    Dense(Mlp),
    Moe(MoeParts),
}

impl Decoder {
    /// All `num_hidden_layers` layers, then `model.embed_tokens`, `model.norm`, `lm_head` around the given layers.
    pub fn load(source: &ModelSource, config: DecoderConfig, parts: LayerParts) -> Result<Self, EngineError> {
        let DecoderConfig { vocab_size, hidden_size, .. } = config;
        let loader = source.loader;
        let layers = load_layers(source, config, parts)?;
        let embedding = loader.weight(config.embedding_name, vocab_size, hidden_size)?;
        let norm = RmsNorm::load(loader, "model.norm", hidden_size, config.rms_norm_eps)?;
        let lm_head = match config.tie_word_embeddings {
            true => None,
            false => Some(loader.weight("lm_head.weight", vocab_size, hidden_size)?),
        };
        let lm_head = match config.head {
            HeadKind::ColumnNormalized => Some(normalize_columns(lm_head.as_ref().unwrap_or(&embedding))?),
            HeadKind::Plain | HeadKind::Biased => lm_head,
        };
        let lm_head_bias = match config.head {
            HeadKind::Biased => Some(loader.vector("lm_head.bias", vocab_size)?),
            HeadKind::Plain | HeadKind::ColumnNormalized => None,
        };
        let shape = ModelShape {
            vocab_size,
            num_layers: layers.len(),
            cache_sites: layers.iter().map(|layer| layer.mixer.cache_site()).collect(),
            experts_per_moe_layer: layers.iter().filter_map(|layer| layer.feed_forward.num_experts()).collect(),
        };
        Ok(Self { embedding, layers, norm, lm_head, lm_head_bias, multipliers: config.multipliers, shape })
    }
}

fn load_layers(
    source: &ModelSource,
    config: DecoderConfig,
    parts: LayerParts,
) -> Result<Vec<DecoderLayer>, EngineError> {
    let norm = |name: String| RmsNorm::load(source.loader, &name, config.hidden_size, config.rms_norm_eps);
    let mut num_moe_layers = 0;
    let mut load_layer = |idx| {
        let prefix = format!("model.layers.{idx}");
        let (feed_forward_norm, is_sandwich) = match config.norms {
            LayerNorms::Pre => ("post_attention_layernorm", false),
            LayerNorms::Sandwich => ("pre_mlp_layernorm", true),
        };
        let sandwich = |part: &str| is_sandwich.then(|| norm(format!("{prefix}.{part}"))).transpose();
        Ok(DecoderLayer {
            input_norm: norm(format!("{prefix}.input_layernorm"))?,
            mixer: (parts.mixer)(&prefix, idx)?,
            attention_out_norm: sandwich("post_attention_layernorm")?,
            feed_forward_norm: norm(format!("{prefix}.{feed_forward_norm}"))?,
            feed_forward_out_norm: sandwich("post_mlp_layernorm")?,
            feed_forward: match (parts.feed_forward)(&prefix, idx)? {
                FeedForwardParts::Dense(mlp) => FeedForward::Dense(mlp),
                FeedForwardParts::Moe(moe) => {
                    num_moe_layers += 1;
                    FeedForward::Moe(Moe::new(moe, num_moe_layers - 1)?)
                }
            },
        })
    };
    (0..source.config.size("num_hidden_layers")?).map(&mut load_layer).collect()
}

impl Model for Decoder {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn hidden(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let mut residual =
            scaled(kernels::embedding(&context.input.input_ids, &self.embedding)?, self.multipliers.embedding)?;
        let mut delta: Option<Tensor> = None;
        for layer in &self.layers {
            let normed;
            (normed, residual) = enter(&layer.input_norm, delta.take(), residual)?;
            let attended = renormed(layer.mixer.forward(&normed, context)?, &layer.attention_out_norm)?;
            let attended = scaled(attended, self.multipliers.residual)?;
            let normed;
            (normed, residual) = layer.feed_forward_norm.forward_residual(&attended, &residual)?;
            let out = renormed(layer.feed_forward.forward(&normed, context)?, &layer.feed_forward_out_norm)?;
            delta = Some(scaled(out, self.multipliers.residual)?);
        }
        let (normed, _) = enter(&self.norm, delta, residual)?;
        Ok(normed)
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        let logits =
            kernels::linear(hidden, self.lm_head.as_ref().unwrap_or(&self.embedding), self.lm_head_bias.as_ref())?;
        scaled(logits, self.multipliers.logits)
    }
}

impl Mixer {
    fn cache_site(&self) -> CacheSite {
        match self {
            Self::Gqa(attention) => attention.cache_site(),
            Self::Mla(attention) => attention.cache_site(),
        }
    }

    fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        match self {
            Self::Gqa(attention) => attention.forward(x, context),
            Self::Mla(attention) => attention.forward(x, context),
        }
    }
}

impl FeedForward {
    fn num_experts(&self) -> Option<usize> {
        match self {
            Self::Dense(_) => None,
            Self::Moe(moe) => Some(moe.num_experts()),
        }
    }

    fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        match self {
            Self::Dense(mlp) => mlp.forward(x),
            Self::Moe(moe) => moe.forward(x, context),
        }
    }
}

/// Adds what the layer before left over and normalises: `(normed, residual stream)`.
fn enter(norm: &RmsNorm, delta: Option<Tensor>, residual: Tensor) -> Result<(Tensor, Tensor), EngineError> {
    match delta {
        Some(delta) => norm.forward_residual(&delta, &residual),
        None => Ok((norm.forward(&residual)?, residual)),
    }
}

fn renormed(x: Tensor, norm: &Option<RmsNorm>) -> Result<Tensor, EngineError> {
    match norm {
        Some(norm) => norm.forward(&x),
        None => Ok(x),
    }
}

/// `w / (‖w‖ + 1e-7)` with the length taken over the vocabulary, for each column of `[vocab_size, hidden_size]`.
fn normalize_columns(weight: &PackedWeight) -> Result<PackedWeight, EngineError> {
    let (rows, cols) = (weight.rows(), weight.cols());
    let mut values = weight.to_f32();
    let mut squares = vec![0f64; cols];
    for row in values.chunks_exact(cols) {
        row.iter().zip(&mut squares).for_each(|(&value, square)| *square += f64::from(value).powi(2));
    }
    let factors: Vec<f32> = squares.iter().map(|square| (1.0 / (square.sqrt() + 1e-7)) as f32).collect();
    for row in values.chunks_exact_mut(cols) {
        row.iter_mut().zip(&factors).for_each(|(value, factor)| *value *= factor);
    }
    Ok(PackedWeight::from_f32(weight.format(), rows, cols, &values)?)
}

fn scaled(x: Tensor, factor: f64) -> Result<Tensor, EngineError> {
    if factor == 1.0 { Ok(x) } else { Ok((x * factor)?) }
}

/// Rows of a tensor picked by index: `[num_tokens, width]` to `[rows.len(), width]`.
pub fn gather_rows(x: &Tensor, rows: &[u32]) -> Result<Tensor, EngineError> {
    Ok(x.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?)
}
