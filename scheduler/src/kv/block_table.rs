//! The blocks of one sequence.

use crate::kv::block_pool::BlockId;

/// Blocks in the order of the positions they hold; `blocks()[i]` holds `i * block_size..(i + 1) * block_size`. Where a model
/// has layers with a window, `window()[i]` holds the positions of `blocks()[window_start() + i]` for them.
#[derive(Debug, Default)]
pub struct BlockTable {
    pub(crate) blocks: Vec<BlockId>,
    pub(crate) window_start: usize,
    pub(crate) window: Vec<BlockId>,
}

impl BlockTable {
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }

    /// Leading blocks whose positions no row to come sees through a window.
    pub fn window_start(&self) -> usize {
        self.window_start
    }

    /// Blocks with ids of their own; to the end of the batch in flight, not of all tokens.
    pub fn window(&self) -> &[BlockId] {
        &self.window
    }
}
