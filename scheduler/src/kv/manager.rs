//! Counts of blocks: what a sequence needs, what fits, and how far the pool may shrink.

use std::collections::BTreeMap;

use crate::kv::block_pool::{BlockId, BlockPool};
use crate::kv::block_table::BlockTable;

/// The pool, and the promise that every accepted sequence fits in it alone.
#[derive(Debug)]
pub(crate) struct BlockManager {
    block_size: usize,
    pool: BlockPool,
    /// Blocks asked for. The pool is larger while an accepted sequence needs more than these.
    num_wanted: usize,
    /// Most blocks that accepted sequences will need → how many of them need that many.
    promises: BTreeMap<usize, usize>,
}

impl BlockManager {
    pub(crate) fn new(block_size: usize, num_blocks: usize) -> Self {
        Self { block_size, pool: BlockPool::new(num_blocks), num_wanted: num_blocks, promises: BTreeMap::new() }
    }

    pub(crate) fn blocks_for(&self, num_tokens: usize) -> usize {
        num_tokens.div_ceil(self.block_size)
    }

    pub(crate) fn num_wanted(&self) -> usize {
        self.num_wanted
    }

    pub(crate) fn num_free(&self) -> usize {
        self.pool.num_free()
    }

    pub(crate) fn num_used(&self) -> usize {
        self.pool.num_used()
    }

    pub(crate) fn num_total(&self) -> usize {
        self.pool.num_total()
    }

    /// Holds the pool at `num_blocks` or more until [`Self::withdraw`].
    pub(crate) fn promise(&mut self, num_blocks: usize) {
        assert!(num_blocks <= self.num_wanted, "{num_blocks} blocks promised of {}", self.num_wanted);
        *self.promises.entry(num_blocks).or_default() += 1;
    }

    pub(crate) fn withdraw(&mut self, num_blocks: usize) {
        let count = self.promises.get_mut(&num_blocks).expect("each promise is withdrawn once");
        *count -= 1;
        if *count == 0 {
            self.promises.remove(&num_blocks);
        }
        self.resize();
    }

    /// Blocks the pool has from now on: at least one, at most what ids can name. Returns [`Self::num_total`].
    pub(crate) fn set_num_wanted(&mut self, num_blocks: usize) -> usize {
        self.num_wanted = num_blocks.clamp(1, u32::MAX as usize);
        self.resize();
        self.num_total()
    }

    /// Makes `table` cover `num_tokens` positions. False, with nothing changed, where too few blocks are free.
    pub(crate) fn try_cover(&mut self, table: &mut BlockTable, num_tokens: usize) -> bool {
        let num_missing = self.blocks_for(num_tokens).saturating_sub(table.blocks.len());
        if num_missing > self.pool.num_free() {
            return false;
        }
        table.blocks.extend((0..num_missing).map(|_| self.pool.allocate().expect("enough blocks are free")));
        true
    }

    /// Frees all of `table`.
    pub(crate) fn release(&mut self, table: &mut BlockTable) {
        // Backwards, so that the next sequence gets them in the same order.
        table.blocks.drain(..).rev().for_each(|block| self.pool.free(block));
    }

    /// Panics unless `held` are exactly the used blocks and the pool has the size it must have.
    pub(crate) fn assert_accounts_for(&self, held: impl Iterator<Item = BlockId>) {
        self.pool.assert_accounts_for(held);
        assert_eq!(self.pool.limit(), self.limit(), "the pool is not as large as asked for and promised");
        assert!(self.num_total() >= self.pool.limit(), "blocks were lost");
    }

    fn limit(&self) -> usize {
        let largest_promise = self.promises.last_key_value().map_or(0, |(&num_blocks, _)| num_blocks);
        self.num_wanted.max(largest_promise)
    }

    fn resize(&mut self) {
        let limit = self.limit();
        if limit != self.pool.limit() {
            self.pool.set_limit(limit);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn covers_or_changes_nothing() {
        let mut manager = BlockManager::new(4, 3);
        let mut table = BlockTable::default();
        for (num_tokens, covered, num_held) in [(1, true, 1), (4, true, 1), (5, true, 2), (13, false, 2), (12, true, 3)]
        {
            assert_eq!(manager.try_cover(&mut table, num_tokens), covered, "{num_tokens} tokens");
            assert_eq!(table.blocks().len(), num_held, "{num_tokens} tokens");
        }
        manager.release(&mut table);
        manager.assert_accounts_for(std::iter::empty());
    }

    #[test]
    fn never_shrinks_below_a_promise() {
        let mut manager = BlockManager::new(4, 8);
        manager.promise(5);
        manager.promise(3);
        assert_eq!(manager.set_num_wanted(2), 5);
        manager.withdraw(5);
        assert_eq!(manager.num_total(), 3);
        manager.withdraw(3);
        assert_eq!(manager.num_total(), 2);
        assert_eq!(manager.set_num_wanted(0), 1);
        assert_eq!(manager.set_num_wanted(8), 8);
    }
}
