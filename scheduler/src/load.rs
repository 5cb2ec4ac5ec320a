//! Blocks from outside the pool: who waits for some, and what happens when they come.
//!
//! A sequence whose prompt is known outside is admitted as any other, with the blocks of all its tokens, and gets no rows
//! until its leading blocks were filled or could not be. It may be preempted or aborted meanwhile; what comes for it then
//! is not wanted any more, and a sequence that was preempted computes for itself.

use crate::batch::BlockLoad;
use crate::kv::BlockId;
use crate::request::RequestId;
use crate::scheduler::Scheduler;

impl Scheduler {
    /// True if a block is all there is to know of its positions: there is a prefix cache, and no layer has a recurrent state or
    /// a window.
    pub fn can_load(&self) -> bool {
        self.config.prefix_cache.is_some() && self.state_slots.is_unused() && self.blocks.windows().is_none()
    }

    /// The blocks of `id` that are to be filled, in the order of the names that were asked for; none where nobody waits.
    pub fn loading(&self, id: RequestId) -> &[BlockId] {
        let Some(sequence) = self.sequences.get(&id).filter(|sequence| sequence.num_loading > 0) else { return &[] };
        let first = sequence.num_computed() / self.config.block_size;
        &sequence.blocks.blocks()[first..first + sequence.num_loading]
    }

    /// The first `num_blocks` of [`Self::loading`] hold what their names say; the others are computed. Does nothing where
    /// nobody waits.
    pub fn loaded(&mut self, id: RequestId, num_blocks: usize) {
        let num_blocks = num_blocks.min(self.loading(id).len());
        let block_size = self.config.block_size;
        let Some(sequence) = self.sequences.get_mut(&id).filter(|sequence| sequence.num_loading > 0) else { return };
        sequence.load(num_blocks * block_size);
        self.in_flight.end_loading(id);
        self.num_loaded += (num_blocks * block_size) as u64;
        // They can be found from now on, but nobody computed them.
        let num_computed = self.computed.len();
        self.publish(id);
        self.computed.truncate(num_computed);
    }

    /// Has a sequence that was just admitted for the first time wait for what can be loaded of it, if that is more than it found.
    /// At least its last token is left to compute.
    pub(crate) fn start_loading(&mut self, id: RequestId) {
        let (can_load, block_size) = (self.can_load(), self.config.block_size);
        let sequence = self.sequences.get_mut(&id).expect("queues name only known sequences");
        let num_loadable = std::mem::take(&mut sequence.num_loadable);
        let first = sequence.num_computed() / block_size;
        let end = num_loadable.min((sequence.tokens().len() - 1) / block_size);
        let Some(prefix) = sequence.prefix().filter(|prefix| can_load && prefix.may_reuse() && first < end) else {
            return;
        };
        let names: Vec<[u8; 32]> = prefix.names()[first..end].iter().map(|name| name.bytes()).collect();
        sequence.num_loading = names.len();
        self.in_flight.begin_loading(id);
        self.loads.push(BlockLoad { id, names });
    }
}
