//! What stands around the layers of a decoder: embedding, last norm, output projection.

use candle_core::{DType, Tensor};
use kernels::{GluActivation, PackedWeight, Pointwise, WeightFormat};

use super::mtp::MtpLayout;
use super::norm::{Norm, NormKind};
use super::table::Table;
use crate::error::EngineError;
use crate::weights::Role;
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;

/// A decoder's sizes and what it has beside its layers.
#[derive(Clone, Copy, Debug)]
pub struct DecoderConfig {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub norm_kind: NormKind,
    pub rms_norm_eps: f64,
    /// Of the norms within layers; as `rms_norm_eps` in most families.
    pub layer_norm_eps: f64,
    pub tie_word_embeddings: bool,
    pub embedding_name: &'static str,
    pub head: HeadKind,
    pub norms: LayerNorms,
    /// Of multi-token-prediction layers, where they are to be loaded.
    pub mtp_layout: MtpLayout,
    pub multipliers: Multipliers,
    /// Of dense networks, and of experts that have none of their own.
    pub activation: GluActivation,
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

impl DecoderConfig {
    /// The usual keys. `default_eps` is what transformers takes for the family where `rms_norm_eps` is absent.
    pub fn from_config(config: &ModelConfig, default_eps: f64) -> Result<Self, EngineError> {
        let rms_norm_eps = config.non_negative_or("rms_norm_eps", default_eps)?;
        Ok(Self {
            vocab_size: config.size("vocab_size")?,
            hidden_size: config.size("hidden_size")?,
            norm_kind: NormKind::Rms,
            rms_norm_eps,
            layer_norm_eps: rms_norm_eps,
            tie_word_embeddings: config.flag_or("tie_word_embeddings", false)?,
            embedding_name: "model.embed_tokens.weight",
            head: HeadKind::Plain,
            norms: LayerNorms::Pre,
            mtp_layout: MtpLayout::SharedHead,
            multipliers: Multipliers::default(),
            activation: glu_activation(config.activation("hidden_act", "silu")?),
        })
    }

    /// The norm `{name}` of a layer, over the hidden state.
    pub fn load_norm(&self, loader: &Loader, name: &str) -> Result<Norm, EngineError> {
        Norm::load_kind(loader, name, self.hidden_size, (self.norm_kind, self.layer_norm_eps))
    }
}

#[derive(Debug)]
pub struct Ends {
    embedding: Table,
    norm: Norm,
    /// `None`: the embedding serves as the output projection too.
    lm_head: Option<Table>,
    lm_head_bias: Option<Tensor>,
    multipliers: Multipliers,
}

impl Ends {
    /// The embedding, `model.norm`, and `lm_head` where it is not tied.
    pub fn load(loader: &Loader, config: DecoderConfig) -> Result<Self, EngineError> {
        let DecoderConfig { vocab_size, hidden_size, .. } = config;
        let shape = [vocab_size, hidden_size];
        let embedding = Table::load(loader, config.embedding_name, shape)?;
        let norm = Norm::load_kind(loader, "model.norm", hidden_size, (config.norm_kind, config.rms_norm_eps))?;
        let lm_head = match (config.head, config.tie_word_embeddings) {
            (HeadKind::ColumnNormalized, is_tied) => {
                let name = if is_tied { config.embedding_name } else { "lm_head.weight" };
                Some(Table::of(loader, load_normalized(loader, name, shape)?))
            }
            (HeadKind::Plain | HeadKind::Biased, true) => None,
            (HeadKind::Plain | HeadKind::Biased, false) => Some(Table::load(loader, "lm_head.weight", shape)?),
        };
        let lm_head_bias = match config.head {
            HeadKind::Biased => Some(loader.vector("lm_head.bias", vocab_size)?),
            HeadKind::Plain | HeadKind::ColumnNormalized => None,
        };
        Ok(Self { embedding, norm, lm_head, lm_head_bias, multipliers: config.multipliers })
    }

    pub fn multipliers(&self) -> Multipliers {
        self.multipliers
    }

    /// `[num_tokens, hidden_size]`
    pub fn embed(&self, input_ids: &[u32]) -> Result<Tensor, EngineError> {
        scaled(self.embedding.embed(input_ids)?, self.multipliers.embedding)
    }

    /// The normalised last hidden state, of what the last layer left over and the stream.
    pub fn leave(&self, delta: Option<Tensor>, residual: Tensor) -> Result<Tensor, EngineError> {
        Ok(enter(&self.norm, delta, residual)?.0)
    }

    /// `[rows, hidden_size]` to `[rows, vocab_size]`.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        let head = self.lm_head.as_ref().unwrap_or(&self.embedding);
        scaled(head.logits(hidden, self.lm_head_bias.as_ref())?, self.multipliers.logits)
    }
}

/// The gate's function; SiLU has a fast path of its own.
pub fn glu_activation(gate: Pointwise) -> GluActivation {
    match gate {
        Pointwise::Silu => GluActivation::Silu,
        other => GluActivation::Pointwise(other),
    }
}

/// Adds what the half before left over and normalises: `(normed, residual stream)`.
pub fn enter(norm: &Norm, delta: Option<Tensor>, residual: Tensor) -> Result<(Tensor, Tensor), EngineError> {
    match delta {
        Some(delta) => norm.forward_residual(&delta, &residual),
        None => Ok((norm.forward(&residual)?, residual)),
    }
}

/// Rounded once: a factor in bf16 would be another one.
pub fn scaled(x: Tensor, factor: f64) -> Result<Tensor, EngineError> {
    if factor == 1.0 { Ok(x) } else { Ok((x.to_dtype(DType::F32)? * factor)?.to_dtype(x.dtype())?) }
}

/// The same with factors in f32 that are broadcast to `x`.
pub fn scaled_by(x: &Tensor, factors: &Tensor) -> Result<Tensor, EngineError> {
    Ok(x.to_dtype(DType::F32)?.broadcast_mul(factors)?.to_dtype(x.dtype())?)
}

/// The output projection made of the matrix `{name}` with normalised columns.
fn load_normalized(loader: &Loader, name: &str, shape: [usize; 2]) -> Result<PackedWeight, EngineError> {
    let key = format!("{name}/normalized");
    let open = || loader.borrow_weight(name, shape);
    let mut made = loader.made((&key, Role::Table), std::iter::once(shape), open, |stored, _| {
        normalize_columns(stored, loader.making_format(Role::Table, stored.format()))
    })?;
    Ok(made.remove(0))
}

/// `w / (‖w‖ + 1e-7)` with the length taken over the vocabulary, for each column of `[vocab_size, hidden_size]`.
fn normalize_columns(weight: &PackedWeight, format: WeightFormat) -> Result<PackedWeight, EngineError> {
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
    Ok(PackedWeight::from_f32(format, rows, cols, &values)?)
}
