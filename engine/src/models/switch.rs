//! Switch Transformer (Fedus, Zoph, Shazeer, 2021): T5's encoder and decoder with one expert per token and a limit on how
//! many tokens an expert takes.
//!
//! A sequence holds its source first and the decoder's tokens behind it. There is one cache site per decoder layer: at the
//! source's positions it keeps what that layer's cross-attention reads, behind them the layer's own keys and values. While
//! the encoder runs, the source's positions of the first site lend it room for its own.

use candle_core::Tensor;
use kernels::{Expert, ExpertActivation, ExpertWeights, Pointwise, PositionBias, RouterSpec, Scoring};

use super::footprint::{Footprint, Positions};
use super::{ForwardContext, Model, ModelShape, ModelSource, Prefill};
use crate::error::EngineError;
use crate::experts::MoeShape;
use crate::forward_input::Pass;
use crate::layers::ends::scaled;
use crate::layers::linear::{Bias, Linear};
use crate::layers::moe::{Moe, MoeParts, Weighting};
use crate::layers::norm::Norm;
use crate::layers::position_bias::Buckets;
use crate::layers::t5_attention::{AttentionSize, CrossAttention, SelfAttention};
use crate::layers::table::Table;
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;

/// More than `n_positions` are possible, because positions are relative; but the encoder reads its input at once, in time
/// that grows with its square.
const MOST_POSITIONS: usize = 1 << 16;

struct Switch {
    encoder: Stack,
    decoder: Stack,
    lm_head: Option<Table>,
    /// On the hidden state before a tied head.
    head_scale: f64,
    shape: ModelShape,
}

/// Encoder or decoder.
struct Stack {
    embedding: Table,
    blocks: Vec<Block>,
    norm: Norm,
    /// Of all its self-attentions.
    bias: PositionBias,
}

struct Block {
    attention_norm: Norm,
    attention: SelfAttention,
    cross: Option<(Norm, CrossAttention)>,
    feed_forward_norm: Norm,
    feed_forward: FeedForward,
}

enum FeedForward {
    Dense { up: Linear, activation: Pointwise, down: Linear },
    Moe(Box<Moe>),
}

/// Sizes that all blocks share.
#[derive(Clone, Copy)]
struct Sizes {
    attention: AttentionSize,
    width: usize,
    num_experts: usize,
    capacity: usize,
    router_bias: Bias,
    activation: Pointwise,
    eps: f64,
}

pub fn load(source: &ModelSource) -> Result<Box<dyn Model>, EngineError> {
    let ModelSource { config, loader, .. } = *source;
    let sizes = Sizes::from_config(config)?;
    let vocab_size = config.size("vocab_size")?;
    let table_shape = [vocab_size, sizes.attention.hidden_size];
    let is_tied = config.flag_or("tie_word_embeddings", false)?;
    let [num_encoder, num_decoder] = num_layers(config)?;
    let shared = match is_tied || ["encoder", "decoder"].iter().any(|stack| !loader.has(&own_embedding(stack))) {
        true => Some(Table::load(loader, "shared.weight", table_shape)?),
        false => None,
    };
    let embedding = |stack: &str| match &shared {
        Some(shared) if is_tied || !loader.has(&own_embedding(stack)) => Ok(shared.clone()),
        _ => Table::load(loader, &own_embedding(stack), table_shape),
    };
    let stack = |name: &'static str, num_blocks, first_moe| {
        let step = sparse_step(config, name, num_blocks)?;
        let place = StackPlace { name, num_blocks, sparse_step: step, first_moe };
        Stack::load(source, &sizes, embedding(name)?, place)
    };
    let encoder = stack("encoder", num_encoder, 0)?;
    let decoder = stack("decoder", num_decoder, encoder.num_moe())?;
    let lm_head = match is_tied {
        true => None,
        false => Some(Table::load(loader, "lm_head.weight", table_shape)?),
    };
    let shape = ModelShape {
        vocab_size,
        num_layers: num_encoder + num_decoder,
        num_mtp_layers: 0,
        cache_sites: vec![sizes.attention.cache_site(); num_decoder],
        moe_layers: vec![MoeShape { num_experts: sizes.num_experts, top_k: 1 }; encoder.num_moe() + decoder.num_moe()],
        expert_costs: encoder.moes().chain(decoder.moes()).map(|moe| moe.cost().clone()).collect(),
        num_mtp_moe_layers: 0,
        prefill: Prefill::Whole { decoder_start: decoder_start(config, vocab_size)? },
    };
    let head_scale = if is_tied { (sizes.attention.hidden_size as f64).powf(-0.5) } else { 1.0 };
    Ok(Box::new(Switch { encoder, decoder, lm_head, head_scale, shape }))
}

/// Copies of the shared embedding, and the shared one where both stacks have their own.
pub fn is_ignored(config: &ModelConfig, name: &str) -> bool {
    let is_tied = config.flag_or("tie_word_embeddings", false).unwrap_or(false);
    match name {
        "encoder.embed_tokens.weight" | "decoder.embed_tokens.weight" | "lm_head.weight" => is_tied,
        "shared.weight" => !is_tied,
        _ => false,
    }
}

/// One attention's keys and values per decoder layer; the source's tokens take as much as the decoder's.
pub fn footprint(config: &ModelConfig) -> Result<Footprint, EngineError> {
    let [num_encoder, num_decoder] = num_layers(config)?;
    let num_layers = num_encoder.saturating_add(num_decoder);
    let heads = (2 * config.size("num_heads")? as u64).saturating_mul(config.size("d_kv")? as u64);
    let token_width = heads.saturating_mul(num_decoder as u64);
    Ok(Footprint { num_layers, token_width, least_token_width: token_width, state_width: 0 })
}

pub fn positions(config: &ModelConfig) -> Result<Positions, EngineError> {
    let default = config.size("n_positions")?.min(MOST_POSITIONS);
    Ok(Positions { default, most: MOST_POSITIONS, limited_by: "the longest input its encoder may read at once" })
}

fn num_layers(config: &ModelConfig) -> Result<[usize; 2], EngineError> {
    let encoder = config.size("num_layers")?;
    Ok([encoder, config.opt_size("num_decoder_layers")?.unwrap_or(encoder)])
}

fn own_embedding(stack: &str) -> String {
    format!("{stack}.embed_tokens.weight")
}

fn decoder_start(config: &ModelConfig, vocab_size: usize) -> Result<u32, EngineError> {
    let start = config.count_or("decoder_start_token_id", 0)?;
    match start < vocab_size {
        true => Ok(start as u32),
        false => {
            let reason = format!("is {start}, the vocabulary has {vocab_size} entries");
            Err(EngineError::Config { key: "decoder_start_token_id", reason })
        }
    }
}

/// Every so many layers of a stack have experts, 0 for none: as the config says, else by the number of sparse layers, of
/// which transformers allows for more than there are layers.
fn sparse_step(config: &ModelConfig, stack: &str, num_blocks: usize) -> Result<usize, EngineError> {
    let (step, num_sparse) = match stack {
        "encoder" => ("encoder_sparse_step", "num_sparse_encoder_layers"),
        _ => ("decoder_sparse_step", "num_sparse_decoder_layers"),
    };
    Ok(config.opt_count(step)?.unwrap_or(num_blocks / config.count_or(num_sparse, 0)?.max(1)))
}

impl Sizes {
    fn from_config(config: &ModelConfig) -> Result<Self, EngineError> {
        config.expect_text("router_dtype", &["float32"])?;
        Ok(Self {
            attention: AttentionSize {
                hidden_size: config.size("d_model")?,
                num_heads: config.size("num_heads")?,
                head_dim: config.size("d_kv")?,
            },
            width: config.size("d_ff")?,
            num_experts: config.size("num_experts")?,
            capacity: config.size("expert_capacity")?,
            router_bias: config.flag_or("router_bias", false)?.into(),
            activation: config.activation("dense_act_fn", "relu")?,
            eps: config.float_or("layer_norm_epsilon", 1e-6)?,
        })
    }
}

/// Which of the two stacks is loaded, and how its blocks are numbered.
#[derive(Clone, Copy)]
struct StackPlace {
    name: &'static str,
    num_blocks: usize,
    sparse_step: usize,
    /// Among all MoE layers of the model.
    first_moe: usize,
}

impl Stack {
    fn load(source: &ModelSource, sizes: &Sizes, embedding: Table, place: StackPlace) -> Result<Self, EngineError> {
        let ModelSource { config, loader, .. } = *source;
        let StackPlace { name, num_blocks, sparse_step, first_moe } = place;
        let mut moe_idx = first_moe;
        let blocks = (0..num_blocks).map(|idx| {
            let is_sparse = sparse_step == 1 || sparse_step > 1 && idx % sparse_step == 1;
            let block = Block::load(loader, sizes, (name, idx), is_sparse.then_some(moe_idx));
            moe_idx += usize::from(is_sparse);
            block
        });
        let blocks = blocks.collect::<Result<Vec<_>, EngineError>>()?;
        let buckets = Buckets::from_config(config, sizes.attention.num_heads, name == "encoder")?;
        let table = format!("{name}.block.0.layer.0.SelfAttention.relative_attention_bias.weight");
        let weights = loader.floats(&table, &[buckets.num_buckets, sizes.attention.num_heads])?;
        let norm = Norm::load(loader, &format!("{name}.final_layer_norm"), sizes.attention.hidden_size, sizes.eps)?;
        Ok(Self { embedding, blocks, norm, bias: buckets.by_distance(&weights, sizes.attention.num_heads) })
    }

    fn moes(&self) -> impl Iterator<Item = &Moe> {
        self.blocks.iter().filter_map(|block| match &block.feed_forward {
            FeedForward::Moe(moe) => Some(&**moe),
            FeedForward::Dense { .. } => None,
        })
    }

    fn num_moe(&self) -> usize {
        self.moes().count()
    }
}

impl Block {
    fn load(
        loader: &Loader,
        sizes: &Sizes,
        (stack, idx): (&str, usize),
        moe_idx: Option<usize>,
    ) -> Result<Self, EngineError> {
        let hidden_size = sizes.attention.hidden_size;
        let layer = |layer: usize| format!("{stack}.block.{idx}.layer.{layer}");
        let norm = |layer: &str| Norm::load(loader, &format!("{layer}.layer_norm"), hidden_size, sizes.eps);
        let is_decoder = stack == "decoder";
        let load_cross = || {
            let attention = CrossAttention::load(loader, &format!("{}.EncDecAttention", layer(1)), sizes.attention)?;
            Ok::<_, EngineError>((norm(&layer(1))?, attention))
        };
        let last = layer(if is_decoder { 2 } else { 1 });
        Ok(Self {
            attention_norm: norm(&layer(0))?,
            attention: SelfAttention::load(loader, &format!("{}.SelfAttention", layer(0)), sizes.attention)?,
            cross: is_decoder.then(load_cross).transpose()?,
            feed_forward_norm: norm(&last)?,
            feed_forward: match moe_idx {
                None => FeedForward::load_dense(loader, &format!("{last}.mlp"), sizes)?,
                Some(moe_idx) => {
                    let moe = Moe::new(load_moe(loader, &format!("{last}.mlp"), sizes)?, moe_idx, loader)?;
                    // A decoder takes its tokens one at a time, so that none finds its expert full, however many of
                    // them a step computes again.
                    FeedForward::Moe(Box::new(if is_decoder { moe } else { moe.with_capacity(sizes.capacity) }))
                }
            },
        })
    }

    /// `x`: the residual stream, `[num_tokens, hidden_size]`.
    fn forward(
        &self,
        x: Tensor,
        (site, bias): (usize, &PositionBias),
        context: &mut ForwardContext,
    ) -> Result<Tensor, EngineError> {
        let mut x = (&x + self.attention.forward(&self.attention_norm.forward(&x)?, (site, bias), context)?)?;
        if let Some((norm, cross)) = &self.cross {
            x = (&x + cross.forward(&norm.forward(&x)?, site, context)?)?;
        }
        Ok((&x + self.feed_forward.forward(&self.feed_forward_norm.forward(&x)?, context)?)?)
    }
}

impl FeedForward {
    fn load_dense(loader: &Loader, prefix: &str, sizes: &Sizes) -> Result<Self, EngineError> {
        let (hidden_size, width) = (sizes.attention.hidden_size, sizes.width);
        let up = Linear::load(loader, &format!("{prefix}.wi"), width, hidden_size, Bias::No)?;
        let down = Linear::load(loader, &format!("{prefix}.wo"), hidden_size, width, Bias::No)?;
        Ok(Self::Dense { up, activation: sizes.activation, down })
    }

    fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        match self {
            Self::Dense { up, activation, down } => down.forward(&kernels::pointwise(&up.forward(x)?, *activation)?),
            Self::Moe(moe) => moe.forward(x, context),
        }
    }
}

/// One expert per token, weighted with its share of the softmax over all.
fn load_moe(loader: &Loader, prefix: &str, sizes: &Sizes) -> Result<MoeParts, EngineError> {
    let (hidden_size, width) = (sizes.attention.hidden_size, sizes.width);
    let expert = |idx: usize| {
        let name = |part: &str| format!("{prefix}.experts.expert_{idx}.{part}.weight");
        Ok(Expert::Glu(ExpertWeights {
            gate_up: loader.expert_weight(&name("wi"), width, hidden_size)?,
            down: loader.expert_weight(&name("wo"), hidden_size, width)?,
            biases: None,
            activation: ExpertActivation::Plain(sizes.activation),
        }))
    };
    let router = format!("{prefix}.router.classifier");
    Ok(MoeParts {
        gate: Linear::load_router(loader, &router, [sizes.num_experts, hidden_size], sizes.router_bias)?,
        spec: RouterSpec::new(Scoring::Softmax, 1),
        experts: (0..sizes.num_experts).map(expert).collect::<Result<_, EngineError>>()?,
        shared: None,
        weighting: Weighting::default(),
    })
}

impl Switch {
    /// Leaves what every decoder layer reads of the source in that layer's site.
    fn encode(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let mut x = self.encoder.embedding.embed(&context.input.input_ids)?;
        for block in &self.encoder.blocks {
            x = block.forward(x, (0, &self.encoder.bias), context)?;
        }
        let x = self.encoder.norm.forward(&x)?;
        for (site, block) in self.decoder.blocks.iter().enumerate() {
            if let Some((_, cross)) = &block.cross {
                cross.keep_source(&x, site, context)?;
            }
        }
        Ok(x)
    }

    fn decode(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let mut x = self.decoder.embedding.embed(&context.input.input_ids)?;
        for (site, block) in self.decoder.blocks.iter().enumerate() {
            x = block.forward(x, (site, &self.decoder.bias), context)?;
        }
        self.decoder.norm.forward(&x)
    }
}

impl Model for Switch {
    fn shape(&self) -> &ModelShape {
        &self.shape
    }

    fn hidden(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        match context.input.pass {
            Pass::Encoder => self.encode(context),
            Pass::Decoder => self.decode(context),
        }
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError> {
        let head = self.lm_head.as_ref().unwrap_or(&self.decoder.embedding);
        head.logits(&scaled(hidden.clone(), self.head_scale)?, None)
    }
}
