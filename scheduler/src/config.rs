//! The limits within which the scheduler decides.

use std::time::Duration;

use crate::error::ConfigError;

/// Layers of a model that see the last positions only, and so keep blocks of their own for no more than those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowConfig {
    /// Positions that a row sees, its own included; at least 1.
    pub len: usize,
    /// Blocks for these layers, with ids of their own; at most `u32::MAX`. As many as [`Self::most_blocks`], or as the others,
    /// are enough for every running sequence, and others are refused; what is not in use keeps windows for later ones.
    pub num_blocks: usize,
}

impl WindowConfig {
    /// Blocks that `num_seqs` sequences hold at most while `num_rows` rows of them are computed, if all windows are full.
    pub fn most_blocks(len: usize, block_size: usize, num_seqs: usize, num_rows: usize) -> usize {
        // A range of n positions touches ceil(n / block_size) + 1 blocks at most.
        let per_seq = (len - 1).div_ceil(block_size).saturating_add(2);
        per_seq.saturating_mul(num_seqs.min(num_rows)).saturating_add(num_rows.div_ceil(block_size))
    }
}

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
    /// For models some of whose layers have a window. Their sequences have no source.
    pub window: Option<WindowConfig>,
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
    /// Names the first limit that is zero, or a count of blocks or state slots that ids cannot hold, or too few
    /// blocks for windows.
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
        if let Some(window) = self.window {
            if window.len == 0 {
                return Err(ConfigError::Zero { name: "window" });
            }
            let needed = self.most_window_blocks(window).min(self.num_blocks);
            if !(needed..=u32::MAX as usize).contains(&window.num_blocks) {
                return Err(ConfigError::WindowBlocks { num_blocks: window.num_blocks, needed });
            }
        }
        let num_slots = self.num_state_slots.saturating_add(self.num_snapshot_slots);
        if u32::try_from(num_slots).is_err() {
            return Err(ConfigError::TooManyStateSlots { num_slots, limit: u32::MAX });
        }
        Ok(())
    }
    /// Most blocks the pool may grow to: those whose windows have room, whoever runs.
    pub(crate) fn most_blocks(&self) -> usize {
        let most =
            |window: WindowConfig| (window.num_blocks < self.most_window_blocks(window)).then_some(window.num_blocks);
        self.window.and_then(most).unwrap_or(u32::MAX as usize)
    }

    fn most_window_blocks(&self, window: WindowConfig) -> usize {
        WindowConfig::most_blocks(window.len, self.block_size, self.max_num_seqs, self.max_num_batched_tokens)
    }
}
