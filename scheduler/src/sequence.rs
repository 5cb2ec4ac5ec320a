//! The life of one request as a few lengths.

use std::time::Duration;

use crate::batch::{Chunk, FinishReason, Phase};
use crate::kv::{BlockTable, StateSlot};
use crate::prefix::Prefix;
use crate::queue::Arrival;
use crate::request::{Request, RequestId, StopCriteria};

/// An accepted request with its tokens and blocks. Everything else about it follows from these lengths:
///
/// ```text
/// 0              num_computed      + num_scheduled        num_tokens
/// |  in its blocks    |  in the batch in flight  |  to do    |
/// |  prompt, then generated tokens: 0..prompt_len..num_tokens|
/// ```
///
/// It starts with as many whole blocks computed as the prefix cache has; others may share those, nobody writes to them.
/// The newest token is computed when the one after it is sampled, so between steps `num_computed < num_tokens`.
/// A running sequence holds the blocks of all tokens it had at its admission, and of each later one as it is scheduled;
/// a waiting sequence holds none.
#[derive(Debug)]
pub struct Sequence {
    id: RequestId,
    pub(crate) arrival: Arrival,
    pub(crate) arrived_at: Duration,
    /// Prompt, then what was generated.
    tokens: Vec<u32>,
    prompt_len: usize,
    source_len: usize,
    stop: StopCriteria,
    num_computed: usize,
    num_scheduled: usize,
    pub(crate) blocks: BlockTable,
    /// Held as long as the blocks are.
    pub(crate) state_slot: Option<StateSlot>,
    prefix: Option<Prefix>,
    /// Of the prompt, at its first admission.
    num_cached_tokens: Option<usize>,
    num_preemptions: u32,
    /// Leading blocks that can be had from outside, until it was admitted for the first time.
    pub(crate) num_loadable: usize,
    /// Blocks behind `num_computed` that it waits for; it gets no rows meanwhile.
    pub(crate) num_loading: usize,
}

impl Sequence {
    pub(crate) fn new(request: Request, prefix: Option<Prefix>, arrival: Arrival, now: Duration) -> Self {
        Self {
            id: request.id,
            arrival,
            arrived_at: now,
            tokens: request.prompt.to_vec(),
            prompt_len: request.prompt.len(),
            source_len: request.source_len,
            stop: request.stop,
            num_computed: 0,
            num_scheduled: 0,
            blocks: BlockTable::default(),
            state_slot: None,
            prefix,
            num_cached_tokens: None,
            num_preemptions: 0,
            num_loadable: request.num_loadable,
            num_loading: 0,
        }
    }

    /// Prompt and generated tokens.
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    pub fn prompt_len(&self) -> usize {
        self.prompt_len
    }

    /// Leading tokens that an encoder reads.
    pub fn source_len(&self) -> usize {
        self.source_len
    }

    pub fn num_generated(&self) -> usize {
        self.tokens.len() - self.prompt_len
    }

    /// Leading tokens whose keys and values are in the blocks; the batch in flight does not count.
    pub fn num_computed(&self) -> usize {
        self.num_computed
    }

    /// Position `p` lives in block `p / block_size`, slot `p % block_size`. Covers the batch in flight.
    pub fn block_table(&self) -> &BlockTable {
        &self.blocks
    }

    /// Where its recurrent state is, while it runs and if the model has one.
    pub fn state_slot(&self) -> Option<StateSlot> {
        self.state_slot
    }

    /// Leading tokens of the prompt that the prefix cache had when it was first admitted; 0 before.
    pub fn num_cached_tokens(&self) -> usize {
        self.num_cached_tokens.unwrap_or(0)
    }

    /// Blocks behind the computed ones that it waits for; see [`crate::Scheduler::loaded`].
    pub fn num_loading(&self) -> usize {
        self.num_loading
    }

    /// How often it lost its blocks.
    pub fn num_preemptions(&self) -> u32 {
        self.num_preemptions
    }

    /// Positions computed over a whole life: the last token is never an input.
    pub(crate) fn max_positions(&self) -> usize {
        max_positions(self.prompt_len, &self.stop)
    }

    /// Its encoder has yet to run.
    pub(crate) fn awaits_encoder(&self) -> bool {
        self.num_computed < self.source_len
    }

    /// Only its newest token is to be computed.
    pub(crate) fn is_decoding(&self) -> bool {
        self.num_generated() > 0 && self.num_uncomputed() == 1
    }

    pub(crate) fn num_uncomputed(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    pub(crate) fn num_scheduled(&self) -> usize {
        self.num_scheduled
    }

    pub(crate) fn prefix(&self) -> Option<&Prefix> {
        self.prefix.as_ref()
    }

    pub(crate) fn prefix_and_tokens(&mut self) -> Option<(&mut Prefix, &[u32])> {
        Some((self.prefix.as_mut()?, &self.tokens))
    }

    pub(crate) fn table_and_prefix(&mut self) -> (&mut BlockTable, Option<&mut Prefix>) {
        (&mut self.blocks, self.prefix.as_mut())
    }

    /// It was admitted with its first `num_cached` tokens computed. True the first time.
    pub(crate) fn start_from(&mut self, num_cached: usize) -> bool {
        assert!(num_cached < self.tokens.len(), "{:?} has nothing left to compute", self.id);
        self.num_computed = num_cached;
        let is_first = self.num_cached_tokens.is_none();
        self.num_cached_tokens.get_or_insert(num_cached);
        is_first
    }

    /// What it waited for came, as far as it came.
    pub(crate) fn load(&mut self, num_tokens: usize) {
        self.num_loading = 0;
        self.num_computed += num_tokens;
        assert!(self.num_computed < self.tokens.len(), "{:?} has nothing left to compute", self.id);
        // Later admissions count nothing: who loads is admitted for the first time.
        self.num_cached_tokens = Some(self.num_computed);
    }

    /// Puts the next `num_rows` tokens into the batch being made.
    pub(crate) fn schedule(&mut self, num_rows: usize) {
        assert_eq!(self.num_scheduled + self.num_loading, 0, "{:?} is already in a batch, or loading", self.id);
        assert!((1..=self.num_uncomputed()).contains(&num_rows), "{:?} cannot use {num_rows} rows", self.id);
        assert!(!self.awaits_encoder() || num_rows == self.source_len, "{:?} would have its source cut", self.id);
        self.num_scheduled = num_rows;
    }

    /// Its part of the batch being made, if it has one.
    pub(crate) fn chunk(&self) -> Option<Chunk> {
        (self.num_scheduled > 0).then(|| Chunk {
            id: self.id,
            start: self.num_computed,
            len: self.num_scheduled,
            samples: self.num_scheduled == self.num_uncomputed(),
            phase: match (self.awaits_encoder(), self.is_decoding()) {
                (true, _) => Phase::Encode,
                (false, true) => Phase::Decode,
                (false, false) => Phase::Prefill,
            },
        })
    }

    /// The batch in flight was computed.
    pub(crate) fn advance(&mut self) {
        self.num_computed += self.num_scheduled;
        self.num_scheduled = 0;
        assert!(self.num_computed <= self.tokens.len(), "{:?} computed more than it has", self.id);
    }

    /// Appends a sampled token and says whether it ends the sequence.
    pub(crate) fn append(&mut self, token: u32) -> Option<FinishReason> {
        assert_eq!(self.num_computed, self.tokens.len(), "{:?} sampled before its last token was computed", self.id);
        let may_stop = self.num_generated() >= self.stop.min_tokens;
        self.tokens.push(token);
        if may_stop && self.stop.stop_token_ids.contains(&token) {
            return Some(FinishReason::Stop(token));
        }
        (self.num_generated() >= self.stop.max_tokens).then_some(FinishReason::Length)
    }

    /// Forgets what was computed, and the batch in flight; the caller frees the blocks.
    pub(crate) fn rewind(&mut self) {
        self.num_computed = 0;
        self.num_scheduled = 0;
        self.num_loading = 0;
        self.num_preemptions += 1;
    }
}

/// Positions computed for a prompt of `prompt_len` tokens: all but the last token.
pub(crate) fn max_positions(prompt_len: usize, stop: &StopCriteria) -> usize {
    prompt_len + stop.max_tokens.saturating_sub(1)
}
