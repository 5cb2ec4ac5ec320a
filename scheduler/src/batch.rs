//! What one step computes, and what comes of it.

use std::time::Duration;

use crate::kv::StateSlot;
use crate::request::RequestId;

/// The work of one step: encoder passes alone, or else decodes and then prefills; each by arrival.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// At most one per sequence.
    pub chunks: Vec<Chunk>,
    /// Set when the batch is empty because the batch window is still open: nothing to do before then.
    pub wake_at: Option<Duration>,
    /// Sequences that lost their blocks while this batch was made, in that order.
    pub preempted: Vec<RequestId>,
    /// Recurrent states that sequences start from, copied before anything is computed.
    pub restores: Vec<StateCopy>,
    /// Recurrent states to be kept, copied when all is computed. One may go where a restored one came from.
    pub snapshots: Vec<StateCopy>,
    /// Blocks to be fetched from outside the pool; each is answered by one call of [`crate::Scheduler::loaded`].
    pub loads: Vec<BlockLoad>,
}

/// Leading blocks that a sequence waits for, behind those it found in the pool.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockLoad {
    pub id: RequestId,
    /// In order, as [`crate::ComputedBlock::name`] has them; at least one.
    pub names: Vec<[u8; 32]>,
}

/// The state at one slot, to be written to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateCopy {
    pub from: StateSlot,
    pub to: StateSlot,
}

impl Batch {
    /// Tokens computed, all chunks together.
    pub fn num_rows(&self) -> usize {
        self.chunks.iter().map(|chunk| chunk.len).sum()
    }

    /// Chunks whose last row samples a token: the outcomes that [`crate::Scheduler::complete`] expects.
    pub fn num_samples(&self) -> usize {
        self.chunks.iter().filter(|chunk| chunk.samples).count()
    }
}

/// Consecutive tokens of one sequence: positions `start..start + len`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub id: RequestId,
    /// First position computed; all before it are in the sequence's blocks.
    pub start: usize,
    /// At least 1.
    pub len: usize,
    /// The chunk ends with the last token known so far, so its last row samples the next one.
    pub samples: bool,
    pub phase: Phase,
}

/// What a chunk is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// The whole source of a sequence, for the encoder.
    Encode,
    /// Tokens of the prompt that the decoder reads, or tokens computed again after a preemption.
    Prefill,
    /// One row: the newest token of a sequence that has all others in its blocks.
    Decode,
}

/// What became of the sampled row of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    Token(u32),
    /// The row could not be sampled (NaN logits): its sequence ends, the batch goes on.
    Failed,
}

/// News about one sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    pub id: RequestId,
    pub update: Update,
}

/// What happened to a sequence in a step. After `Failed` or a `Token` with `finished` the scheduler has forgotten it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Update {
    Token {
        token: u32,
        /// The token is the stop token that ended the sequence.
        is_stop: bool,
        finished: Option<FinishReason>,
    },
    Failed,
}

/// Why a sequence ended well.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FinishReason {
    /// This stop token was sampled.
    Stop(u32),
    /// `max_tokens` were generated.
    Length,
}
