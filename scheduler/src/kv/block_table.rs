//! The blocks of one sequence.

use crate::kv::block_pool::BlockId;

/// Blocks in the order of the positions they hold; `blocks()[i]` holds `i * block_size..(i + 1) * block_size`.
#[derive(Debug, Default)]
pub struct BlockTable {
    pub(crate) blocks: Vec<BlockId>,
}

impl BlockTable {
    pub fn blocks(&self) -> &[BlockId] {
        &self.blocks
    }
}
