//! The limits within which the scheduler decides.

use std::time::Duration;

use crate::error::ConfigError;

/// Layers of a model that see the last positions only, and so keep blocks of their own for no more than those.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowConfig {
    /// Positions that a row sees, its own included; at least 1.
    pub len: usize,
    /// Blocks for these layers, with ids of their own, at most `u32::MAX`; at least the smaller of
    /// [`WindowLimits::most_blocks`] and the number of the other blocks, so that every running sequence finds room. Those not
    /// in use keep windows for later ones.
    pub num_blocks: usize,
}

/// What bounds the blocks of windows that are in use.
#[derive(Clone, Copy, Debug)]
pub struct WindowLimits {
    pub block_size: usize,
    pub max_num_seqs: usize,
    pub max_num_batched_tokens: usize,
    pub max_model_len: usize,
}

impl WindowLimits {
    /// Blocks that all running sequences hold at most for a window of `len`, a step's rows among them.
    pub fn most_blocks(self, len: usize) -> usize {
        let Self { block_size, max_num_seqs, max_num_batched_tokens, max_model_len } = self;
        let num_seqs = max_num_seqs.min(max_num_batched_tokens);
        // A range of n positions touches ceil(n / block_size) + 1 blocks at most.
        let of_window = len.saturating_sub(1).div_ceil(block_size).saturating_add(2);
        let of_windows = of_window.saturating_mul(num_seqs).saturating_add(max_num_batched_tokens.div_ceil(block_size));
        of_windows.min(max_model_len.div_ceil(block_size).saturating_mul(num_seqs))
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
    /// For models some of whose layers have a window. Sequences with a source are refused then.
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
            let needed = self.window_limits().most_blocks(window.len).min(self.num_blocks);
            if window.num_blocks < needed {
                return Err(ConfigError::FewWindowBlocks { num_blocks: window.num_blocks, needed });
            }
            if u32::try_from(window.num_blocks).is_err() {
                return Err(ConfigError::TooManyBlocks { num_blocks: window.num_blocks, limit: u32::MAX });
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
        let is_scarce = |window: &WindowConfig| window.num_blocks < self.window_limits().most_blocks(window.len);
        self.window.filter(is_scarce).map_or(u32::MAX as usize, |window| window.num_blocks)
    }

    fn window_limits(&self) -> WindowLimits {
        WindowLimits {
            block_size: self.block_size,
            max_num_seqs: self.max_num_seqs,
            max_num_batched_tokens: self.max_num_batched_tokens,
            max_model_len: self.max_model_len,
        }
    }
}
