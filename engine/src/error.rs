//! What can go wrong in the engine.

use std::path::PathBuf;

use thiserror::Error;

use crate::experts::ExpertFault;

/// Why a model could not be loaded or a step could not be run.
#[derive(Debug, Error)]
pub enum EngineError {
    #[error("cannot read {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("cannot write {path}: {source}", path = path.display())]
    Write { path: PathBuf, source: std::io::Error },
    #[error("{path} is not valid: {reason}", path = path.display())]
    Invalid { path: PathBuf, reason: String },
    #[error("architecture `{found}` is not supported; supported are {supported}")]
    UnknownArchitecture { found: String, supported: String },
    #[error("config.json: `{key}` {reason}")]
    Config { key: &'static str, reason: String },
    #[error("multi-token-prediction layers were asked for (--load-mtp), but {0}")]
    NoMtp(String),
    #[error("config.json: experts per token or expert groups do not fit the experts: {0}")]
    Router(kernels::KernelError),
    #[error("tensor `{name}` is missing from the checkpoint")]
    MissingTensor { name: String },
    #[error("the checkpoint has {count} tensors that the architecture does not know, first of them {names}")]
    ExtraTensors { count: usize, names: String },
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}, in {path}", path = path.display())]
    TensorShape { name: String, found: Vec<usize>, expected: Vec<usize>, path: PathBuf },
    #[error("tensor `{name}` is stored as {dtype}, which is not supported, in {path}", path = path.display())]
    TensorDtype { name: String, dtype: String, path: PathBuf },
    #[error(
        "{what} {} on the device, {} are left: it has {}, {} were free, and {utilization} of all may be used \
         (--gpu-memory-utilization of `serve`); hint: {hint}",
        gib(*.needed), gib(*.left), gib(.memory.total_bytes), gib(.memory.free_bytes)
    )]
    DeviceMemory {
        what: &'static str,
        needed: u64,
        left: u64,
        memory: kernels::DeviceMemory,
        utilization: f64,
        hint: &'static str,
    },
    #[error(
        "a step of {num_tokens} tokens, the largest that there may be, cannot be computed: {source}; \
         hint: fewer tokens at once (--max-num-batched-tokens) take less memory"
    )]
    LargestStep { num_tokens: usize, source: Box<EngineError> },
    #[error("the KV cache has room for {capacity} tokens, fewer than one block of {block_size}")]
    KvTooSmall { capacity: usize, block_size: usize },
    #[error(
        "the recurrent state of one sequence takes {state_bytes} bytes, the KV cache has {capacity} (see --kv-cache-memory)"
    )]
    StateTooLarge { state_bytes: u64, capacity: u64 },
    #[error("the expert profile is of another model: {0}")]
    ForeignProfile(String),
    #[error(
        "--expert-memory is {bytes} bytes; the experts that one token chooses in one layer take {least}, which is the least, \
         and all experts {all}"
    )]
    ExpertMemory { bytes: u64, least: u64, all: u64 },
    #[error(
        "--expert-memory is less than the experts take, which must then be read again from a folder of packed weights, and \
         this model is none; hint: make one with `moesaic quantize`, and serve that"
    )]
    ExpertsNotPacked,
    #[error("--expert-memory is for models that compute on the CPU; hint: leave it out, or take --device cpu")]
    ExpertsOnDevice,
    #[error("{} cannot be read: {}; hint: copy the folder again", .0.id, .0.reason)]
    Expert(ExpertFault),
    #[error("{what} is {value}, allowed are {allowed}")]
    Limit { what: &'static str, value: u64, allowed: String },
    #[error("kernel error: {0}")]
    Kernel(#[from] kernels::KernelError),
    #[error("scheduler settings: {0}")]
    Scheduler(#[from] scheduler::ConfigError),
    #[error("tensor error: {0}")]
    Tensor(#[from] candle_core::Error),
    #[error("the compute thread could not be started: {0}")]
    Thread(std::io::Error),
}

/// Why a request was refused at the door. It holds nothing and may be retried where the text says so.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum SubmitError {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("prompt has {prompt_len} tokens and {max_tokens} are to be generated, the limit is {limit} in all")]
    TooLong { prompt_len: usize, max_tokens: usize, limit: usize },
    #[error("the request needs {needed} KV blocks, the pool has {total}")]
    NeverFits { needed: usize, total: usize },
    #[error("token id {token} is out of range, the vocabulary has {vocab_size} entries")]
    TokenOutOfRange { token: u32, vocab_size: usize },
    #[error("an encoder reads the prompt of this model as a whole: there are no log-probs of prompt tokens")]
    NoPromptLogprobs,
    #[error("{reason}: it is not known which experts a token took")]
    NoRoutedExperts { reason: &'static str },
    #[error("{reason}: it is not known what the experts of a token cost")]
    NoExpertUse { reason: &'static str },
    #[error("{limit} requests are already waiting")]
    QueueFull { limit: usize },
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the engine has stopped after a device error")]
    Dead,
}

/// Why an accepted request ended without finishing.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum GenerationError {
    #[error("the model produced invalid numbers (NaN) for this request")]
    CorruptedLogits,
    #[error("{} cannot be read: {}", .0.id, .0.reason)]
    ExpertUnavailable(ExpertFault),
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the engine stopped after a device error: {0}")]
    Device(String),
}

fn gib(bytes: u64) -> String {
    format!("{:.2} GiB", bytes as f64 / f64::from(1 << 30))
}
