//! Counts for gauges and counters.

/// A snapshot of the scheduler.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SchedulerStats {
    /// Sequences that hold blocks.
    pub num_running: usize,
    /// Sequences that hold none: new and preempted ones.
    pub num_waiting: usize,
    pub num_used_blocks: usize,
    /// Held by nobody, found by name, and given up where a free one is missing.
    pub num_cached_blocks: usize,
    /// Free, used and cached blocks. More than [`crate::Scheduler::set_num_blocks`] asked for while a shrink is under way.
    pub num_total_blocks: usize,
    /// Those of layers with a window; they have a pool of their own.
    pub num_used_window_blocks: usize,
    /// Held by nobody, and kept for sequences that start behind them.
    pub num_cached_window_blocks: usize,
    /// 0 for models without windows.
    pub num_total_window_blocks: usize,
    pub num_used_state_slots: usize,
    /// 0 for models without recurrent states.
    pub num_total_state_slots: usize,
    /// Recurrent states kept for later sequences.
    pub num_snapshots: usize,
    pub num_total_snapshot_slots: usize,
    /// Since the start.
    pub num_preemptions: u64,
    /// Tokens of first admissions that were looked up in the cache, since the start.
    pub num_prefix_queries: u64,
    /// Those of them that were there.
    pub num_prefix_hits: u64,
    /// Tokens whose keys and values came from outside the pool, since the start.
    pub num_loaded: u64,
}
