//! What the engine needs to know before it loads a model.

use std::path::PathBuf;
use std::time::Duration;

use kernels::{DeviceChoice, ReadMode};

use crate::experts::{ExpertPolicy, RoutingOptions};

/// Storage type of the weights in memory. Activations are f32 on the CPU whatever this says, on other devices bf16 unless this says
/// f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightDtype {
    /// As the checkpoint stores them.
    #[default]
    Auto,
    F32,
    Bf16,
    F16,
}

/// What quantizing while loading makes of the matrices of layers; embedding and output projection get eight bits in either
/// case. Routers, norms and biases stay as they are, and so do weights that are stored in as few bits already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightQuant {
    /// Nothing.
    #[default]
    None,
    Int8,
    Int4,
}

/// How weights are kept in memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WeightStorage {
    /// Of what is not quantized.
    pub dtype: WeightDtype,
    pub quant: WeightQuant,
}

impl From<WeightDtype> for WeightStorage {
    fn from(dtype: WeightDtype) -> Self {
        Self { dtype, quant: WeightQuant::None }
    }
}

/// Storage type of keys, values and latents in the block pool.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum KvDtype {
    /// f32 where the weights are f32, else bf16.
    #[default]
    Auto,
    F32,
    Bf16,
}

/// How much memory the experts may take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum ExpertMemory {
    Bytes(u64),
    /// Of the bytes of all experts, 0 to 100.
    Percent(f64),
}

impl ExpertMemory {
    /// Of experts that take `all` bytes together.
    pub fn bytes(self, all: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            Self::Percent(percent) => (all as f64 * percent / 100.0) as u64,
        }
    }
}

/// Which experts are read at the start. Where all are kept, [`Self::None`] says that mapped weights are read at their first use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ExpertWarmup {
    /// As many as there is room for, those that the profile saw in use before the others.
    #[default]
    All,
    /// Those that the profile saw in use, the hottest first.
    Hot,
    None,
}

/// Where the experts of a model are kept.
#[derive(Clone, Debug)]
pub struct ExpertConfig {
    /// What they may take in memory; the others stay in the files of a packed folder. `None` keeps all.
    pub memory: Option<ExpertMemory>,
    /// Which of them stay.
    pub policy: ExpertPolicy,
    /// File of an [`crate::ExpertProfile`], for [`ExpertPolicy::Pinned`] and the order of [`Self::warmup`].
    pub profile: Option<PathBuf>,
    /// Whether they are read ahead of their use.
    pub prefetch: bool,
    pub warmup: ExpertWarmup,
    /// `None`: past the page cache where that has no room for the experts and the file system can.
    pub read_mode: Option<ReadMode>,
}

impl Default for ExpertConfig {
    fn default() -> Self {
        Self {
            memory: None,
            policy: ExpertPolicy::Lfru,
            profile: None,
            prefetch: true,
            warmup: ExpertWarmup::All,
            read_mode: None,
        }
    }
}

/// Everything that shapes an engine. All limits are here: nothing in the engine grows past them.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// Hugging Face folder (`config.json`, `*.safetensors`, `generation_config.json`), or a GGUF file.
    pub model_dir: PathBuf,
    /// Where the model computes.
    pub device: DeviceChoice,
    /// Share of a CUDA device's memory that weights, KV cache and steps may take, beside what others have of it.
    pub gpu_memory_utilization: f64,
    pub dtype: WeightDtype,
    pub quant: WeightQuant,
    pub experts: ExpertConfig,
    pub kv_dtype: KvDtype,
    /// Bytes of the KV block pool; `None` takes what `max_num_seqs` full sequences need, at most 40 % of
    /// `available_memory` after the weights; on a CUDA device all that these and the steps leave of its share.
    pub kv_cache_memory: Option<u64>,
    /// Bytes of memory the process may use, as the host reports it.
    pub available_memory: u64,
    /// Tokens per KV block, a power of two from 1 to 256.
    pub block_size: usize,
    /// Longest prompt plus output; `None` takes the model's own limit.
    pub max_model_len: Option<usize>,
    /// Sequences running at once.
    pub max_num_seqs: usize,
    /// Rows (prompt and decode tokens together) in one step.
    pub max_num_batched_tokens: usize,
    /// Blocks of computed tokens are kept and found again by later requests that begin alike. Models with an encoder reuse
    /// nothing.
    pub enable_prefix_caching: bool,
    /// Tokens from one place where a recurrent state is kept to the next, at least 1, rounded up to whole blocks: where
    /// requests that begin alike can start from, in models that have such states. No chunk of a prompt crosses such a place.
    pub snapshot_interval: usize,
    /// Requests waiting for their first step; one more is refused with [`crate::SubmitError::QueueFull`].
    pub max_queue: usize,
    /// How long an idle engine gathers requests before the first step.
    pub batch_timeout: Duration,
    /// Loads the multi-token-prediction layers too. Asking for them where there are none is an error.
    pub load_mtp: bool,
    /// What is changed about the choices of routers.
    pub routing: RoutingOptions,
    /// Compute threads; `None` takes every core the process may run on.
    pub threads: Option<usize>,
    /// Instruction set of the kernels, one of [`kernels::isas`]; `None` takes the fastest, or the one in use.
    pub isa: Option<&'static str>,
}

impl EngineConfig {
    /// Whether computed blocks are kept for requests that begin alike: never where what is in them depends on other requests.
    pub fn caches_prefixes(&self) -> bool {
        self.enable_prefix_caching && !self.routing.couples_requests()
    }

    /// The defaults for the model in or at `model_dir`.
    pub fn new(model_dir: impl Into<PathBuf>) -> Self {
        Self {
            model_dir: model_dir.into(),
            device: DeviceChoice::default(),
            gpu_memory_utilization: 0.9,
            dtype: WeightDtype::Auto,
            quant: WeightQuant::None,
            experts: ExpertConfig::default(),
            kv_dtype: KvDtype::Auto,
            kv_cache_memory: None,
            available_memory: 4 << 30,
            block_size: 16,
            max_model_len: None,
            max_num_seqs: 512,
            max_num_batched_tokens: 512,
            enable_prefix_caching: true,
            snapshot_interval: 256,
            max_queue: 1024,
            batch_timeout: Duration::ZERO,
            load_mtp: false,
            routing: RoutingOptions::default(),
            threads: None,
            isa: None,
        }
    }
}
