//! One file per family, each turning a config and a checkpoint into a [`Model`]; [`ARCHITECTURES`] lists them.

mod bailing;
mod deepseek;
mod ernie;
mod fine_grained;
mod footprint;
mod glm4_moe;
mod gpt_oss;
mod granite_moe;
mod hunyuan;
mod jetmoe;
mod llama4;
mod longcat;
mod minicpm;
mod minimax;
mod mixtral;
mod mtp;
mod olmoe;
mod phimoe;
mod qwen3_next;
mod qwen_moe;
mod switch;

use std::sync::Arc;

use candle_core::Tensor;
use kernels::{Choices, PagedCache};

pub use footprint::{Footprint, MAX_MODEL_LEN, Positions};
pub use mtp::MtpStorage;

use crate::error::EngineError;
use crate::experts::{
    ExpertCost, ExpertStore, ExpertTraffic, MoeShape, RoutedRows, Router, RoutingControl, RoutingStats,
};
use crate::forward_input::{ForwardInput, PagedRows};
use crate::layers::rope::ContextLen;
use crate::memory::KvArena;
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;

/// A loaded model. The step loop knows nothing else of it.
pub trait Model: Send {
    fn shape(&self) -> &ModelShape;

    /// Runs every row of a step: writes its keys and values into the arena, counts its routing, and returns the
    /// normalised last hidden state, `[num_tokens, hidden_size]`: the decoder's, or in a step of [`Pass::Encoder`], which
    /// only models of [`Prefill::Whole`] get, the encoder's.
    ///
    /// [`Pass::Encoder`]: crate::forward_input::Pass::Encoder
    fn hidden(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError>;

    /// `[rows, hidden_size]` to `[rows, vocab_size]`.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError>;

    /// Runs the rows of a step through one multi-token-prediction layer, which keeps its own keys and values: the rows
    /// stand at the positions of the hidden states, `input_ids` are the tokens behind those that the states have
    /// predicted so far.
    ///
    /// # Panics
    /// There is no such layer; see [`ModelShape::num_mtp_layers`].
    fn draft(&self, input: &DraftInput, _context: &mut ForwardContext) -> Result<Draft, EngineError> {
        panic!("the model has no multi-token-prediction layer {}", input.mtp_idx);
    }
}

/// What a multi-token-prediction layer starts from.
pub struct DraftInput<'a> {
    /// Which of them.
    pub mtp_idx: usize,
    /// `[num_tokens, hidden_size]`, as [`Model::hidden`] or the layer before returned it.
    pub hidden: &'a Tensor,
    /// Rows whose logits are wanted.
    pub rows: &'a [u32],
}

/// What a multi-token-prediction layer gives.
pub struct Draft {
    /// `[num_tokens, hidden_size]`, for the next such layer.
    pub hidden: Tensor,
    /// `[rows.len(), vocab_size]`: of the token behind the row's input token.
    pub logits: Tensor,
}

/// What the rest of the engine has to know to make room for a model.
#[derive(Clone, Debug)]
pub struct ModelShape {
    pub vocab_size: usize,
    pub num_layers: usize,
    /// Loaded multi-token-prediction layers, which no count above has.
    pub num_mtp_layers: usize,
    /// In the order of their indices in the arena; those of multi-token-prediction layers last.
    pub cache_sites: Vec<CacheSite>,
    /// Every router, in the order in which a token meets them; those of multi-token-prediction layers last.
    pub moe_layers: Vec<MoeShape>,
    /// What the experts of each of them cost.
    pub expert_costs: Vec<ExpertCost>,
    /// How many of them are of multi-token-prediction layers.
    pub num_mtp_moe_layers: usize,
    pub prefill: Prefill,
}

impl ModelShape {
    /// The routers that are not of multi-token-prediction layers.
    pub fn own_moe_layers(&self) -> &[MoeShape] {
        &self.moe_layers[..self.moe_layers.len() - self.num_mtp_moe_layers]
    }
}

/// How a model reads a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefill {
    /// From left to right, in chunks of any length.
    Causal,
    /// An encoder reads it whole, in a step of its own; the decoder then starts from this token.
    Whole { decoder_start: u32 },
}

impl Prefill {
    /// What a sequence of the scheduler begins with, and how much of that is for the encoder.
    pub fn sequence(self, prompt: &Arc<[u32]>) -> (Arc<[u32]>, usize) {
        match self {
            Self::Causal => (prompt.clone(), 0),
            Self::Whole { decoder_start } => (prompt.iter().copied().chain([decoder_start]).collect(), prompt.len()),
        }
    }

    /// Tokens of a sequence that are neither its prompt nor generated.
    pub fn num_extra_tokens(self) -> usize {
        match self {
            Self::Causal => 0,
            Self::Whole { .. } => 1,
        }
    }
}

/// One place where a model keeps something of a sequence. A layer may have several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheSite {
    /// Keys, then values; of every position, or where rows see a window only, of the last so many.
    Gqa { num_kv_heads: usize, head_dim: usize, window: Option<usize> },
    /// The compressed latent, then the shared rotary key.
    Mla { latent_dim: usize, rope_dim: usize },
    /// So many f32 per sequence, whatever its length.
    Recurrent { width: usize },
}

impl CacheSite {
    /// Elements per token.
    pub fn token_width(&self) -> usize {
        match self {
            Self::Gqa { num_kv_heads, head_dim, .. } => 2 * num_kv_heads * head_dim,
            Self::Mla { latent_dim, rope_dim } => latent_dim + rope_dim,
            Self::Recurrent { .. } => 0,
        }
    }

    /// Positions that a row sees, if not all.
    pub fn window(&self) -> Option<usize> {
        match *self {
            Self::Gqa { window, .. } => window,
            Self::Mla { .. } | Self::Recurrent { .. } => None,
        }
    }

    /// True if the site has a window, and none longer than `longest`, for which there are blocks.
    pub fn has_window_within(&self, longest: Option<usize>) -> bool {
        self.window().zip(longest).is_some_and(|(window, longest)| window <= longest)
    }

    /// Bytes per sequence, beside those of its tokens.
    pub fn state_bytes(&self) -> u64 {
        match *self {
            Self::Gqa { .. } | Self::Mla { .. } => 0,
            Self::Recurrent { width } => (width * size_of::<f32>()) as u64,
        }
    }
}

/// What a step gives to the layers.
pub struct ForwardContext<'a> {
    pub input: &'a ForwardInput,
    pub arena: &'a mut KvArena,
    pub routing: &'a mut RoutingStats,
    pub routed: &'a mut RoutedRows,
    pub control: &'a mut RoutingControl,
    /// Where the layers' experts are, if not in the layers.
    pub experts: Option<&'a mut ExpertStore>,
    /// Of each sequence that wants to know what was read for it; empty where none does.
    pub traffic: &'a mut [Option<ExpertTraffic>],
}

impl<'a> ForwardContext<'a> {
    /// The cache of a site that keeps something per token, and where this step's rows and sequences are in it.
    pub fn paged(&mut self, site: usize) -> (&mut PagedCache, &'a PagedRows) {
        let (cache, has_window) = self.arena.paged_mut(site);
        (cache, if has_window { &self.input.windowed } else { &self.input.paged })
    }

    /// What a router chooses for all rows under the options in effect; recorded.
    pub fn route(
        &mut self,
        logits: &Tensor, /* [num_tokens, num_experts] */
        router: Router<'_>,
    ) -> Result<Choices, EngineError> {
        let choices = self.control.route(self.input, logits, router)?;
        self.record_routing(router.moe_idx, &choices);
        if let (Some(capacity), Some(topk)) = (self.control.options().capacity, choices.host()) {
            // What was dropped is not among the choices that run, and counted where it was.
            let num_places = capacity.num_places(topk.experts.len(), router.is_free);
            self.routing.record_capacity(router.moe_idx, (num_places, 0));
        }
        Ok(choices)
    }

    /// Counts the choices of a router for all rows, and keeps them with the rows' blocks: those on a device when the step is over.
    pub fn record_routing(&mut self, moe_idx: usize, choices: &Choices) {
        match choices.host() {
            Some(topk) => {
                self.routing.record(moe_idx, topk);
                self.routed.write(moe_idx, topk, &self.input.paged.slot_mapping);
            }
            None => self.routing.record_later(moe_idx, choices.clone()),
        }
    }
}

/// What a family's loader works from.
#[derive(Clone, Copy)]
pub struct ModelSource<'a, 'c> {
    pub config: &'a ModelConfig,
    pub loader: &'a Loader<'c>,
    /// What the rotary tables follow from.
    pub max_model_len: ContextLen,
    /// Multi-token-prediction layers to load; more than 0 only where [`Architecture::mtp`] has some.
    pub num_mtp_layers: usize,
}

/// A row of the table of supported architectures.
pub struct Architecture {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    pub load: Load,
    /// Tensors of published checkpoints that serving has no use for.
    pub ignored: fn(&ModelConfig, &str) -> bool,
    /// What the cache sites will take, before any weight is read.
    pub footprint: fn(&ModelConfig) -> Result<Footprint, EngineError>,
    pub positions: fn(&ModelConfig) -> Result<Positions, EngineError>,
    pub mtp: MtpStorage,
}

type Load = fn(&ModelSource) -> Result<Box<dyn Model>, EngineError>;

/// A decoder with one attention per layer: what most rows differ little from.
const fn decoder(model_type: &'static str, load: Load) -> Architecture {
    Architecture {
        model_type,
        load,
        ignored: nothing,
        footprint: footprint::attentions,
        positions: footprint::max_position_embeddings,
        mtp: MtpStorage::Unsupported,
    }
}

/// The same with multi-token-prediction layers behind the others.
const fn with_mtp(model_type: &'static str, load: Load) -> Architecture {
    Architecture { ignored: fine_grained::is_mtp_tensor, ..decoder(model_type, load) }
}

/// The same with latent attention.
const fn latent(model_type: &'static str, load: Load) -> Architecture {
    Architecture { footprint: |config| footprint::latents(config, 1), ..with_mtp(model_type, load) }
}

/// Every architecture this build serves.
pub static ARCHITECTURES: &[Architecture] = &[
    decoder("mixtral", mixtral::load),
    decoder("qwen2_moe", qwen_moe::load_qwen2),
    decoder("qwen3_moe", qwen_moe::load_qwen3),
    Architecture { ignored: is_mtp_named, footprint: qwen3_next::footprint, ..decoder("qwen3_next", qwen3_next::load) },
    decoder("olmoe", olmoe::load),
    decoder("granitemoe", granite_moe::load),
    decoder("granitemoeshared", granite_moe::load),
    latent("deepseek_v2", deepseek::load_v2),
    Architecture { mtp: MtpStorage::BehindLayers, ..latent("deepseek_v3", deepseek::load_v3) },
    latent("kimi_k2", deepseek::load_v3),
    Architecture { ignored: deepseek::is_vision_tensor, ..latent("kimi_k25", deepseek::load_v3) },
    latent("pangu_ultra_moe", deepseek::load_pangu),
    Architecture { mtp: MtpStorage::BehindLayers, ..with_mtp("glm4_moe", glm4_moe::load_glm) },
    decoder("dots1", glm4_moe::load_dots),
    Architecture { ignored: is_mtp_named, ..decoder("ernie4_5_moe", ernie::load) },
    decoder("hunyuan_v1_moe", hunyuan::load),
    with_mtp("minimax_m2", minimax::load),
    decoder("minicpm", minicpm::load),
    Architecture {
        ignored: longcat::is_ignored,
        footprint: |config| footprint::latents(config, 2),
        mtp: MtpStorage::Apart,
        ..decoder("longcat_flash", longcat::load)
    },
    Architecture { ignored: llama4::is_vision_tensor, ..decoder("llama4", llama4::load) },
    decoder("llama4_text", llama4::load),
    Architecture { footprint: footprint::jetmoe, ..decoder("jetmoe", jetmoe::load) },
    decoder("gpt_oss", gpt_oss::load),
    decoder("phimoe", phimoe::load),
    Architecture { mtp: MtpStorage::BehindLayers, ..with_mtp("bailing_moe", bailing::load) },
    Architecture { mtp: MtpStorage::BehindLayers, ..with_mtp("bailing_moe_v2", bailing::load) },
    Architecture {
        ignored: switch::is_ignored,
        footprint: switch::footprint,
        positions: switch::positions,
        ..decoder("switch_transformers", switch::load)
    },
];

/// Looks a `model_type` up.
pub fn architecture(model_type: &str) -> Result<&'static Architecture, EngineError> {
    ARCHITECTURES.iter().find(|row| row.model_type == model_type).ok_or_else(|| EngineError::UnknownArchitecture {
        found: model_type.to_owned(),
        supported: ARCHITECTURES.iter().map(|row| row.model_type).collect::<Vec<_>>().join(", "),
    })
}

/// Tensors that no family uses: tied output projections saved all the same, and buffers of old transformers versions.
pub fn is_ignored_everywhere(config: &ModelConfig, name: &str) -> bool {
    let tied = config.flag_or("tie_word_embeddings", false).unwrap_or(false);
    name.ends_with("rotary_emb.inv_freq") || tied && name.ends_with("lm_head.weight")
}

/// Multi-token-prediction tensors that say so in their name.
fn is_mtp_named(_: &ModelConfig, name: &str) -> bool {
    name.split('.').any(|part| part.starts_with("mtp"))
}

fn nothing(_: &ModelConfig, _: &str) -> bool {
    false
}
