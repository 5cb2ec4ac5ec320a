//! What the scheduler refuses.

use thiserror::Error;

/// Why a [`crate::SchedulerConfig`] cannot be used.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum ConfigError {
    #[error("{name} is 0, at least 1 is needed")]
    Zero { name: &'static str },
    #[error("num_blocks is {num_blocks}, the limit is {limit}")]
    TooManyBlocks { num_blocks: usize, limit: u32 },
    #[error("num_state_slots and num_snapshot_slots are {num_slots} together, the limit is {limit}")]
    TooManyStateSlots { num_slots: usize, limit: u32 },
    #[error("the windows have {num_blocks} blocks, at least {needed} are needed")]
    FewWindowBlocks { num_blocks: usize, needed: usize },
}

/// Why a request was not accepted. Nothing is held for it.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum AdmissionError {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("the source has {source_len} of {prompt_len} prompt tokens, at least one must be left for the decoder")]
    NothingToDecode { source_len: usize, prompt_len: usize },
    #[error("the model reads no source beside its windows, the request has one of {source_len} tokens")]
    SourceBesideWindows { source_len: usize },
    #[error("prompt has {prompt_len} tokens and {max_tokens} are to be generated, the limit is {limit} in all")]
    TooLong { prompt_len: usize, max_tokens: usize, limit: usize },
    #[error("the request needs {needed} KV blocks, the pool has {total}")]
    NeverFits { needed: usize, total: usize },
    #[error("{limit} requests are already waiting")]
    QueueFull { limit: usize },
}
