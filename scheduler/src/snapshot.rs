//! When recurrent states are copied: kept at the ends of some blocks, and taken from there by who starts behind them.
//!
//! Keys and values of a block are there for good, a state is overwritten row by row. So a model with states can be resumed
//! only where a copy was made, every `snapshot_interval` blocks; chunks end there, for that is when the state is seen.

use crate::batch::{Chunk, StateCopy};
use crate::kv::CachedPrefix;
use crate::request::RequestId;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// Rows that a sequence can use in one step, were there no other: all that it has, or those up to the next place
    /// where its state is to be kept.
    pub(crate) fn num_wanted_rows(&self, id: RequestId) -> usize {
        let sequence = self.seq(id);
        if sequence.prefix().is_none() || self.blocks.snapshots.is_unused() {
            return sequence.num_uncomputed();
        }
        let interval = self.snapshot_tokens();
        sequence.num_uncomputed().min(interval - sequence.num_computed() % interval)
    }

    /// Gives a sequence that was admitted with the cached blocks `cached` the state at their end.
    pub(crate) fn resume(&mut self, id: RequestId, cached: CachedPrefix) {
        let sequence = self.seq(id);
        let Some((to, last)) = sequence.state_slot.zip(cached.num_blocks.checked_sub(1)) else { return };
        let block = sequence.blocks.blocks()[last];
        let from = self.blocks.snapshots.touch(block);
        self.restores.push(StateCopy { from, to });
    }

    /// The states to be kept after a step of these chunks, each with a slot reserved.
    pub(crate) fn reserve_snapshots(&mut self, chunks: &[Chunk]) -> Vec<StateCopy> {
        if self.blocks.snapshots.is_unused() {
            return Vec::new();
        }
        chunks.iter().filter_map(|chunk| self.reserve_snapshot(chunk)).collect()
    }

    fn reserve_snapshot(&mut self, chunk: &Chunk) -> Option<StateCopy> {
        let end = chunk.start + chunk.len;
        if !end.is_multiple_of(self.snapshot_tokens()) {
            return None;
        }
        let sequence = self.sequences.get_mut(&chunk.id).expect("chunks are of known sequences");
        let from = sequence.state_slot?;
        let (prefix, tokens) = sequence.prefix_and_tokens()?;
        let name = prefix.name_of(end / self.config.block_size - 1, tokens);
        if self.blocks.has_snapshot(name) {
            return None;
        }
        let to = self.blocks.snapshots.reserve()?;
        prefix.reserved = Some(to);
        Some(StateCopy { from, to })
    }

    fn snapshot_tokens(&self) -> usize {
        self.config.snapshot_interval.saturating_mul(self.config.block_size)
    }
}
