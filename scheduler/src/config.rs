//! The limits within which the scheduler decides.

use std::time::Duration;

use crate::error::ConfigError;

/// Every limit of a [`crate::Scheduler`]. All counts are at least one.
#[derive(Clone, Debug)]
pub struct SchedulerConfig {
    /// Tokens per KV block.
    pub block_size: usize,
    /// KV blocks at start, at most `u32::MAX`; see [`crate::Scheduler::set_num_blocks`].
    pub num_blocks: usize,
    /// Recurrent states that fit in memory, each for one running sequence; 0 for models that have none. The one limit that
    /// may be 0, with the next.
    pub num_state_slots: usize,
    /// Recurrent states that are kept for later sequences, at slots `num_state_slots..`; of no use where sequences have no
    /// state. With none of them, models that have states reuse nothing.
    pub num_snapshot_slots: usize,
    /// Blocks from one place where a recurrent state is kept to the next.
    pub snapshot_interval: usize,
    /// Sequences running at once. Never more than `max_num_batched_tokens` run, so that each gets its row in each step.
    pub max_num_seqs: usize,
    /// Rows (prompt and decode tokens together) in one step. Only an encoder's pass may be longer, alone in its step.
    pub max_num_batched_tokens: usize,
    /// Prompt plus generated tokens of one sequence.
    pub max_model_len: usize,
    /// Requests waiting for their first step; preempted ones do not count.
    pub max_queue: usize,
    /// On: full blocks are found again by later sequences, under numerics of this fingerprint. Sequences with a source
    /// reuse nothing.
    pub prefix_cache: Option<[u8; 32]>,
    /// How long an idle scheduler gathers requests before the first step.
    pub batch_timeout: Duration,
}

impl SchedulerConfig {
    /// Checks the limits.
    ///
    /// # Errors
    /// Names the first limit that is zero, or a count of blocks or state slots that ids cannot hold.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let limits = [
            ("block_size", self.block_size),
            ("snapshot_interval", self.snapshot_interval),
            ("num_blocks", self.num_blocks),
            ("max_num_seqs", self.max_num_seqs),
            ("max_num_batched_tokens", self.max_num_batched_tokens),
            ("max_model_len", self.max_model_len),
            ("max_queue", self.max_queue),
        ];
        if let Some((name, _)) = limits.into_iter().find(|&(_, limit)| limit == 0) {
            return Err(ConfigError::Zero { name });
        }
        if u32::try_from(self.num_blocks).is_err() {
            return Err(ConfigError::TooManyBlocks { num_blocks: self.num_blocks, limit: u32::MAX });
        }
        let num_slots = self.num_state_slots.saturating_add(self.num_snapshot_slots);
        if u32::try_from(num_slots).is_err() {
            return Err(ConfigError::TooManyStateSlots { num_slots, limit: u32::MAX });
        }
        Ok(())
    }
}
