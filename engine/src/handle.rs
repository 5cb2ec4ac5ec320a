//! The door of the engine: submit a request, receive its events; dropping the receiver aborts it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::error::{GenerationError, SubmitError};
use crate::experts::{ExpectedExperts, ExpertLoads, ExpertOptions, ExpertUse, RoutedLayout};
use crate::fingerprint::Fingerprint;
use crate::prefix_tier::{PrefixHint, PrefixTier};
use crate::sampling::params::SamplingParams;
use crate::shared::Front;

pub use scheduler::{FinishReason, StopCriteria};

/// One sequence to generate. A request with `n` choices submits `n` of these.
#[derive(Clone, Debug)]
pub struct GenerateRequest {
    /// Token ids, every one below the vocabulary size, at least one.
    pub prompt: Arc<[u32]>,
    pub sampling: SamplingParams,
    pub stop: StopCriteria,
    /// Only requests of one salt, and of the same `experts`, share what was computed of their prompts.
    pub cache_salt: [u8; 32],
    /// What it changes about the experts of its tokens.
    pub experts: ExpertOptions,
    /// What of the prompt is known in the [`PrefixTier`].
    pub prefix: PrefixHint,
    /// Tell with the tokens which experts they took.
    pub wants_routed_experts: bool,
    /// Tell with the tokens what their experts cost.
    pub wants_expert_use: bool,
    /// Which experts its blocks will take, as far as that is known; measured against what they took.
    pub expected_experts: Option<Arc<ExpectedExperts>>,
}

impl GenerateRequest {
    /// What [`EngineHandle::block_names`] takes for the blocks of this request.
    pub fn block_salt(&self) -> [u8; 32] {
        self.experts.salt(self.cache_salt)
    }
}

/// A full block that was computed and that requests which begin alike can find.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LearnedBlock {
    /// As [`EngineHandle::block_names`] has it.
    pub name: [u8; 32],
    /// Of its tokens, as [`ModelSummary::routed`] lays them out.
    pub experts: Vec<u16>,
}

/// A token with what the caller asked to know about it.
#[derive(Clone, Debug, PartialEq)]
pub struct SampledToken {
    pub token: u32,
    /// Natural log-probability under the model before temperature and filters, where asked for.
    pub logprob: Option<f32>,
    /// The most likely tokens and their log-probs, best first.
    pub top: Vec<(u32, f32)>,
    /// Where asked for, the experts of the tokens that were computed since the last one was sampled, as
    /// [`ModelSummary::routed`] lays them out: of the whole prompt with the first token, then of the token before. What
    /// was sampled last is never computed, and has none.
    pub routed_experts: Vec<u16>,
    /// Where asked for, what the experts of the same tokens cost.
    pub expert_use: Option<Box<ExpertUse>>,
    /// A stop token: counted, never shown as text. `Finished` follows.
    pub is_stop: bool,
}

/// Log-probs of prompt token `position` given those before it.
#[derive(Clone, Debug, PartialEq)]
pub struct PromptLogprob {
    pub token: u32,
    pub logprob: f32,
    pub top: Vec<(u32, f32)>,
}

/// What happens to a generation: `Scheduled` once, `PromptLogprobs` at most once, `Token` any number of times, then exactly
/// one of `Finished` and `Failed`. A request that fails before its first step skips to `Failed`.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// Its first rows are about to be computed.
    Scheduled {
        /// Time since it was submitted.
        queue: Duration,
        /// Leading tokens of its prompt that were computed before, for others.
        num_cached_tokens: usize,
    },
    PromptLogprobs(Vec<PromptLogprob>),
    Token(SampledToken),
    Finished(FinishReason),
    Failed(GenerationError),
}

/// The receiving end of one accepted request. Dropping it frees the request's blocks within one step.
#[derive(Debug)]
pub struct Generation {
    pub(crate) events: mpsc::Receiver<Event>,
}

impl Generation {
    /// The next event; `None` only after `Finished` or `Failed`.
    pub async fn next(&mut self) -> Option<Event> {
        self.events.recv().await
    }

    /// The same for plain threads.
    pub fn next_blocking(&mut self) -> Option<Event> {
        self.events.blocking_recv()
    }
}

/// A snapshot of the engine for gauges and counters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EngineStats {
    pub num_running: usize,
    pub num_waiting: usize,
    pub num_used_blocks: usize,
    /// Held by nobody, and given up where a free block is missing.
    pub num_cached_blocks: usize,
    pub num_total_blocks: usize,
    /// Of layers with a window, in use and kept for requests that begin alike.
    pub num_used_window_blocks: usize,
    pub num_cached_window_blocks: usize,
    pub num_total_window_blocks: usize,
    pub num_used_state_slots: usize,
    pub num_total_state_slots: usize,
    /// Recurrent states kept for requests that begin alike.
    pub num_snapshots: usize,
    pub num_total_snapshot_slots: usize,
    pub num_preemptions: u64,
    /// Computed or cached.
    pub num_prompt_tokens: u64,
    /// Prompt tokens that were looked up in the prefix cache.
    pub num_prefix_queries: u64,
    /// Those of them that were there.
    pub num_prefix_hits: u64,
    /// Tokens whose keys and values came from a [`PrefixTier`].
    pub num_loaded: u64,
    pub num_generation_tokens: u64,
    pub num_corrupted: u64,
    pub num_steps: u64,
}

/// What the loaded model is, for `/v1/models`, `/server_info`, `inspect` and validation.
#[derive(Clone, Debug)]
pub struct ModelSummary {
    /// `model_type` of config.json.
    pub architecture: String,
    /// Rows of the embedding; may exceed the tokenizer's vocabulary.
    pub vocab_size: usize,
    pub num_layers: usize,
    /// Loaded multi-token-prediction layers, beside `num_layers`.
    pub num_mtp_layers: usize,
    pub num_experts: usize,
    pub num_experts_per_tok: usize,
    pub num_parameters: u64,
    pub num_active_parameters: u64,
    /// Those of them that are not of experts which a router chose; what such experts cost comes on top, see [`ExpertUse`].
    pub num_shared_parameters: u64,
    pub weight_bytes: u64,
    /// Of all routed experts, and what of that may be in memory at once.
    pub expert_bytes: u64,
    pub expert_memory_bytes: u64,
    /// How the others are read; `None` where there are no others.
    pub expert_read: Option<&'static str>,
    /// Formats of the matrices in memory, most bytes first.
    pub weight_formats: Vec<&'static str>,
    /// Of layers with a window only while the token is in it.
    pub kv_bytes_per_token: u64,
    /// Of a block that is kept elsewhere, experts included.
    pub block_bytes: usize,
    /// The experts of a token, kept beside its keys and values; 0 for models that have no experts, or an encoder.
    pub routing_bytes_per_token: u64,
    /// How [`SampledToken::routed_experts`] are laid out; without layers where routing is not kept.
    pub routed: RoutedLayout,
    /// Of recurrent layers; 0 where there are none.
    pub state_bytes_per_sequence: u64,
    /// Prompt plus output tokens of one sequence.
    pub max_model_len: usize,
    pub block_size: usize,
    pub num_blocks: usize,
    /// For layers with a window, with ids of their own; 0 for models that have none.
    pub num_window_blocks: usize,
    /// Sequences whose recurrent state fits at once; 0 for models that have none.
    pub num_state_slots: usize,
    /// Recurrent states that are kept for requests that begin alike; 0 for models that have none.
    pub num_snapshot_slots: usize,
    /// Prompts that begin alike share what is computed of them.
    pub has_prefix_cache: bool,
    /// The blocks of a prompt are all there is to know of it, so that they can be kept elsewhere: there are no recurrent
    /// states and no windows.
    pub can_load_prefixes: bool,
    /// An encoder reads the prompt: no log-probs of prompt tokens.
    pub has_encoder: bool,
    pub kv_dtype: &'static str,
    pub threads: usize,
    /// Instruction set of the kernels.
    pub isa: &'static str,
    /// `cpu`, or a CUDA device with its name.
    pub device: String,
    /// What steps may take of a CUDA device beside weights and KV cache.
    pub device_step_bytes: Option<u64>,
    /// Of a CUDA device, when the model was loaded.
    pub device_memory: Option<kernels::DeviceMemory>,
    pub generation_defaults: GenerationDefaults,
}

/// `generation_config.json` as far as serving reads it.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// Stop tokens: of generation_config.json, else `eos_token_id` of config.json.
    pub eos_token_ids: Vec<u32>,
    pub temperature: Option<f32>,
    pub top_k: Option<u32>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
}

/// A clonable handle on a running engine.
#[derive(Clone, Debug)]
pub struct EngineHandle {
    pub(crate) front: Arc<Front>,
}

impl EngineHandle {
    /// Queues a request without waiting.
    ///
    /// # Errors
    /// See [`SubmitError`]; nothing is held for a refused request.
    pub fn submit(&self, request: GenerateRequest) -> Result<Generation, SubmitError> {
        self.front.submit(request)
    }

    pub fn model(&self) -> &ModelSummary {
        &self.front.shared.model
    }

    /// What the outputs depend on beside the requests.
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.front.shared.fingerprint
    }

    /// What the routers chose so far, by layer and expert.
    pub fn expert_loads(&self) -> &Arc<ExpertLoads> {
        &self.front.shared.expert_loads
    }

    pub fn stats(&self) -> EngineStats {
        self.front.shared.stats()
    }

    /// The names of the full blocks of a prompt: equal only for equal tokens, with equal ones before them, of one salt. They say
    /// nothing of the weights, so that what outlives the process must add [`Fingerprint::whole`].
    pub fn block_names(&self, tokens: &[u32], block_salt: &[u8; 32]) -> Vec<[u8; 32]> {
        scheduler::block_names(&self.fingerprint().numerics(), block_salt, self.model().block_size, tokens)
    }

    /// From now on full blocks are handed to `tier`, and prompts that it knows are loaded from it: once in an engine's life,
    /// where [`ModelSummary::can_load_prefixes`]. Waits for a place in the queue.
    pub fn attach_prefix_tier(&self, tier: Box<dyn PrefixTier>) {
        self.front.attach(tier);
    }

    /// The routing of every named block that is computed from now on; those that find `capacity` others waiting are left out.
    /// `None` where blocks have no names or no routing, and where somebody listens already.
    pub fn learned_blocks(&self, capacity: usize) -> Option<mpsc::Receiver<LearnedBlock>> {
        let model = self.model();
        let are_named = model.has_prefix_cache && !model.routed.is_empty();
        let (sender, receiver) = mpsc::channel(capacity);
        (are_named && self.front.shared.learn_from_now(sender)).then_some(receiver)
    }

    /// True while the step loop runs and, if it has work, finished a step in the last 60 seconds.
    pub fn is_healthy(&self) -> bool {
        self.front.is_healthy()
    }

    /// Returns when the engine has stopped after a device error or a broken invariant; by then every open request has got
    /// its `Failed`.
    pub async fn died(&self) {
        self.front.shared.died().await;
    }

    /// Refuses new requests from now on; running ones go on.
    pub fn stop_accepting(&self) {
        self.front.stop_accepting();
    }

    /// Ends every open request with `Failed(ShuttingDown)` and stops the step loop.
    pub fn shutdown(&self) {
        self.front.shutdown();
    }
}
