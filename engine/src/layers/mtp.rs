//! Multi-token prediction: a layer behind a model that guesses one token further (DeepSeek-V3, arXiv 2412.19437, section
//! 2.2).
//!
//! At position `i` the layer takes the hidden state `h_i` of the model, or of the MTP layer before it, and the token
//! behind the one that the state has predicted so far:
//! `x_i = eh_proj([enorm(embed(t)); hnorm(h_i)])`, then a decoder layer, a norm and the output projection.
//!
//! The formula in the paper names the hidden state first. Published weights have the embedding first, and they take the
//! model's state after its last norm: `modeling_bailing_moe_v2.py` of Ling 2.0, `deepseek_mtp.py`, `glm4_moe_mtp.py` and
//! `longcat_flash_mtp.py` of vLLM. vLLM zeroes the embedding at position 0, the paper and the others do not; nor do we.

use candle_core::Tensor;

use super::decoder::{DecoderLayer, gather_rows};
use super::ends::{DecoderConfig, Ends};
use super::linear::{Bias, Linear};
use super::norm::Norm;
use super::table::Table;
use crate::error::EngineError;
use crate::models::{Draft, DraftInput, ForwardContext};
use crate::weights::loader::Loader;

#[derive(Debug)]
pub struct MtpLayer {
    embed_norm: Norm,
    hidden_norm: Norm,
    /// `[hidden_size, 2 * hidden_size]`
    projection: Linear,
    layer: DecoderLayer,
    norm: Norm,
    /// `None`: the model's.
    embedding: Option<Table>,
    /// `None`: the model's.
    head: Option<Table>,
    passes_on: PassesOn,
}

/// How an MTP layer is stored and what it gives to the next one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MtpLayout {
    /// `shared_head.norm`; copies of embedding and output projection where they are stored (DeepSeek-V3, GLM-4.5).
    SharedHead,
    /// `final_layernorm` (Ling 2.0).
    FinalNorm,
}

/// The hidden state that a following MTP layer takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PassesOn {
    /// Of the stream, before the norm.
    Stream,
    Normed,
}

/// Names of the tensors beside the decoder layer.
pub struct MtpNames {
    /// Of the two norms before the projection, then of the one before the output.
    pub norms: [String; 3],
    pub projection: String,
    /// Where the layer may have its own.
    pub embedding: Option<String>,
    /// The same for the output projection.
    pub head: Option<String>,
    pub passes_on: PassesOn,
}

impl MtpLayout {
    /// Of layer `prefix = model.layers.{idx}`.
    pub fn names(self, prefix: &str) -> MtpNames {
        let name = |part: &str| format!("{prefix}.{part}");
        let projection = name("eh_proj");
        match self {
            Self::SharedHead => MtpNames {
                norms: ["enorm", "hnorm", "shared_head.norm"].map(name),
                projection,
                embedding: Some(name("embed_tokens.weight")),
                head: Some(name("shared_head.head.weight")),
                passes_on: PassesOn::Stream,
            },
            Self::FinalNorm => MtpNames {
                norms: ["enorm", "hnorm", "final_layernorm"].map(name),
                projection,
                embedding: None,
                head: None,
                passes_on: PassesOn::Normed,
            },
        }
    }
}

impl MtpLayer {
    /// The tensors of `names` around `layer`.
    pub fn load(
        loader: &Loader,
        config: &DecoderConfig,
        names: &MtpNames,
        layer: DecoderLayer,
    ) -> Result<Self, EngineError> {
        let DecoderConfig { vocab_size, hidden_size, .. } = *config;
        let [embed_norm, hidden_norm, norm] = names.norms.each_ref().map(|name| config.load_norm(loader, name));
        let own = |name: &Option<String>| {
            let stored = name.as_ref().filter(|name| loader.has(name));
            stored.map(|name| Table::load(loader, name, [vocab_size, hidden_size])).transpose()
        };
        Ok(Self {
            embed_norm: embed_norm?,
            hidden_norm: hidden_norm?,
            projection: Linear::load(loader, &names.projection, hidden_size, 2 * hidden_size, Bias::No)?,
            layer,
            norm: norm?,
            embedding: own(&names.embedding)?,
            head: own(&names.head)?,
            passes_on: names.passes_on,
        })
    }

    pub fn layer(&self) -> &DecoderLayer {
        &self.layer
    }

    /// What [`crate::models::Model::draft`] promises; `ends` are the model's.
    pub fn forward(&self, ends: &Ends, input: &DraftInput, context: &mut ForwardContext) -> Result<Draft, EngineError> {
        let input_ids = &context.input.input_ids;
        let embedded = match &self.embedding {
            Some(embedding) => embedding.embed(input_ids)?,
            None => ends.embed(input_ids)?,
        };
        let halves = [self.embed_norm.forward(&embedded)?, self.hidden_norm.forward(input.hidden)?];
        let entering = self.projection.forward(&Tensor::cat(&halves, 1)?)?;
        let (delta, residual) = self.layer.forward(None, entering, ends.multipliers(), context)?;
        let (normed, stream) = self.norm.forward_residual(&delta, &residual)?;
        let wanted = gather_rows(&normed, input.rows)?;
        let logits = match &self.head {
            Some(head) => head.logits(&wanted, None)?,
            None => ends.logits(&wanted)?,
        };
        let hidden = match self.passes_on {
            PassesOn::Stream => stream,
            PassesOn::Normed => normed,
        };
        Ok(Draft { hidden, logits })
    }
}
