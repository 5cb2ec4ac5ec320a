//! One file per family, each turning a config and a checkpoint into a [`Model`]; [`ARCHITECTURES`] lists them.

mod bailing;
mod deepseek;
mod ernie;
mod fine_grained;
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
mod olmoe;
mod phimoe;
mod qwen_moe;

use candle_core::Tensor;

use crate::error::EngineError;
use crate::experts::RoutingStats;
use crate::forward_input::ForwardInput;
use crate::layers::rope::ContextLen;
use crate::memory::KvArena;
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;

/// A loaded model. The step loop knows nothing else of it.
pub trait Model: Send {
    fn shape(&self) -> &ModelShape;

    /// Runs every row of a step: writes its keys and values into the arena, counts its routing, and returns the
    /// normalised last hidden state, `[num_tokens, hidden_size]`.
    fn hidden(&self, context: &mut ForwardContext) -> Result<Tensor, EngineError>;

    /// `[rows, hidden_size]` to `[rows, vocab_size]`.
    fn logits(&self, hidden: &Tensor) -> Result<Tensor, EngineError>;
}

/// What the rest of the engine has to know to make room for a model.
#[derive(Clone, Debug)]
pub struct ModelShape {
    pub vocab_size: usize,
    pub num_layers: usize,
    /// In the order of their indices in the arena.
    pub cache_sites: Vec<CacheSite>,
    /// Routed experts of each MoE layer, in order.
    pub experts_per_moe_layer: Vec<usize>,
}

/// One place where a model keeps something per token. A layer may have several.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheSite {
    /// Keys, then values.
    Gqa { num_kv_heads: usize, head_dim: usize },
    /// The compressed latent, then the shared rotary key.
    Mla { latent_dim: usize, rope_dim: usize },
}

impl CacheSite {
    /// Elements per token.
    pub fn width(&self) -> usize {
        match self {
            Self::Gqa { num_kv_heads, head_dim } => 2 * num_kv_heads * head_dim,
            Self::Mla { latent_dim, rope_dim } => latent_dim + rope_dim,
        }
    }
}

/// What a step gives to the layers.
pub struct ForwardContext<'a> {
    pub input: &'a ForwardInput,
    pub arena: &'a mut KvArena,
    pub routing: &'a mut RoutingStats,
}

/// What a family's loader works from.
#[derive(Clone, Copy)]
pub struct ModelSource<'a, 'c> {
    pub config: &'a ModelConfig,
    pub loader: &'a Loader<'c>,
    /// What the rotary tables follow from.
    pub max_model_len: ContextLen,
}

/// A row of the table of supported architectures.
pub struct Architecture {
    /// `model_type` of config.json.
    pub model_type: &'static str,
    /// Attentions of a layer that keep something per token.
    pub sites_per_layer: u64,
    pub load: fn(&ModelSource) -> Result<Box<dyn Model>, EngineError>,
    /// Tensors of published checkpoints that serving has no use for.
    pub ignored: fn(&ModelConfig, &str) -> bool,
}

/// Every architecture this build serves.
pub static ARCHITECTURES: &[Architecture] = &[
    Architecture { model_type: "mixtral", sites_per_layer: 1, load: mixtral::load, ignored: nothing },
    Architecture { model_type: "qwen2_moe", sites_per_layer: 1, load: qwen_moe::load_qwen2, ignored: nothing },
    Architecture { model_type: "qwen3_moe", sites_per_layer: 1, load: qwen_moe::load_qwen3, ignored: nothing },
    Architecture { model_type: "olmoe", sites_per_layer: 1, load: olmoe::load, ignored: nothing },
    Architecture { model_type: "granitemoe", sites_per_layer: 1, load: granite_moe::load, ignored: nothing },
    Architecture { model_type: "granitemoeshared", sites_per_layer: 1, load: granite_moe::load, ignored: nothing },
    Architecture {
        model_type: "deepseek_v2",
        sites_per_layer: 1,
        load: deepseek::load_v2,
        ignored: fine_grained::is_mtp_tensor,
    },
    Architecture {
        model_type: "deepseek_v3",
        sites_per_layer: 1,
        load: deepseek::load_v3,
        ignored: fine_grained::is_mtp_tensor,
    },
    Architecture {
        model_type: "kimi_k2",
        sites_per_layer: 1,
        load: deepseek::load_v3,
        ignored: fine_grained::is_mtp_tensor,
    },
    Architecture {
        model_type: "pangu_ultra_moe",
        sites_per_layer: 1,
        load: deepseek::load_pangu,
        ignored: fine_grained::is_mtp_tensor,
    },
    Architecture {
        model_type: "glm4_moe",
        sites_per_layer: 1,
        load: glm4_moe::load_glm,
        ignored: fine_grained::is_mtp_tensor,
    },
    Architecture { model_type: "dots1", sites_per_layer: 1, load: glm4_moe::load_dots, ignored: nothing },
    Architecture { model_type: "ernie4_5_moe", sites_per_layer: 1, load: ernie::load, ignored: is_mtp_named },
    Architecture { model_type: "hunyuan_v1_moe", sites_per_layer: 1, load: hunyuan::load, ignored: nothing },
    Architecture {
        model_type: "minimax_m2",
        sites_per_layer: 1,
        load: minimax::load,
        ignored: fine_grained::is_mtp_tensor,
    },
    Architecture { model_type: "minicpm", sites_per_layer: 1, load: minicpm::load, ignored: nothing },
    Architecture { model_type: "longcat_flash", sites_per_layer: 2, load: longcat::load, ignored: longcat::is_ignored },
    Architecture { model_type: "llama4", sites_per_layer: 1, load: llama4::load, ignored: llama4::is_vision_tensor },
    Architecture { model_type: "llama4_text", sites_per_layer: 1, load: llama4::load, ignored: nothing },
    Architecture { model_type: "jetmoe", sites_per_layer: 1, load: jetmoe::load, ignored: nothing },
    Architecture { model_type: "gpt_oss", sites_per_layer: 1, load: gpt_oss::load, ignored: nothing },
    Architecture { model_type: "phimoe", sites_per_layer: 1, load: phimoe::load, ignored: nothing },
    Architecture {
        model_type: "bailing_moe",
        sites_per_layer: 1,
        load: bailing::load,
        ignored: fine_grained::is_mtp_tensor,
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
