//! Blocks of the layers that look back over a window only: a sequence holds those of its window, and what it left behind
//! is kept beside the block of the same positions in the tree, for sequences that start there.

use std::collections::HashMap;

use crate::config::WindowConfig;
use crate::kv::block_pool::{BlockId, BlockPool};
use crate::kv::block_table::BlockTable;
use crate::kv::evict::{EvictionOrder, Tick};

/// A pool of its own, in which every running sequence finds room: only kept blocks ever go, least recently used first.
/// A block is the sequence's own until its positions are full and published; then it belongs to the tree's block of the
/// same name, goes with it at the latest, and may be shared.
#[derive(Debug)]
pub(crate) struct WindowBlocks {
    /// Positions that a row sees, its own included.
    len: usize,
    block_size: usize,
    pool: BlockPool,
    /// By the tree's block of the same positions.
    kept: HashMap<BlockId, Kept>,
    /// The tree's blocks whose kept ones nobody uses.
    order: EvictionOrder,
    now: Tick,
}

#[derive(Debug)]
struct Kept {
    block: BlockId,
    /// When its last user let it go; `None` while it is in use.
    idle_since: Option<Tick>,
}

impl WindowBlocks {
    pub(crate) fn new(config: WindowConfig, block_size: usize) -> Self {
        Self {
            len: config.len,
            block_size,
            pool: BlockPool::new(config.num_blocks),
            kept: HashMap::new(),
            order: EvictionOrder::default(),
            now: Tick::default(),
        }
    }

    pub(crate) fn pool(&self) -> &BlockPool {
        &self.pool
    }

    /// The first block that the row behind `num_tokens` positions sees.
    pub(crate) fn first_seen(&self, num_tokens: usize) -> usize {
        (num_tokens + 1).saturating_sub(self.len) / self.block_size
    }

    /// True if the window's part of the tree's `block` is kept.
    pub(crate) fn has(&self, block: BlockId) -> bool {
        self.kept.contains_key(&block)
    }

    /// Shares what a sequence sees that starts behind the blocks of `table`, all of them from the tree.
    pub(crate) fn take(&mut self, table: &mut BlockTable) {
        assert!(table.window.is_empty(), "a sequence is admitted without blocks");
        let first = self.first_seen(table.blocks.len() * self.block_size);
        table.window_start = first;
        for tree_block in &table.blocks[first..] {
            table.window.push(self.share(*tree_block).expect("sequences start where their window is kept"));
        }
    }

    /// Makes the window reach to the end of `num_tokens` positions.
    pub(crate) fn cover(&mut self, table: &mut BlockTable, num_tokens: usize) {
        let num_held = table.window_start + table.window.len();
        let num_missing = num_tokens.div_ceil(self.block_size).saturating_sub(num_held);
        table.window.extend((0..num_missing).map(|_| self.allocate()));
    }

    /// The block at `idx` of `table` was published as `table.blocks[idx]`. Where that has its window's part already the table
    /// gets that one, for they hold the same.
    pub(crate) fn publish(&mut self, table: &mut BlockTable, idx: usize) {
        let tree_block = table.blocks[idx];
        let own = &mut table.window[idx - table.window_start];
        if let Some(same) = self.share(tree_block) {
            let block = std::mem::replace(own, same);
            self.let_go(tree_block, block);
        } else {
            self.kept.insert(tree_block, Kept { block: *own, idle_since: None });
        }
    }

    /// Lets go of what no row behind `num_tokens` positions sees.
    pub(crate) fn leave(&mut self, table: &mut BlockTable, num_tokens: usize) {
        let first = self.first_seen(num_tokens);
        let num_left = (first - table.window_start).min(table.window.len());
        self.let_go_first(table, num_left);
        table.window_start = first;
    }

    /// Lets go of all.
    pub(crate) fn release(&mut self, table: &mut BlockTable) {
        self.let_go_first(table, table.window.len());
        table.window_start = 0;
    }

    /// The tree's `block` goes, and what is kept of its window with it.
    pub(crate) fn forget(&mut self, tree_block: BlockId) {
        if let Some(kept) = self.kept.remove(&tree_block) {
            let since = kept.idle_since.expect("who uses the window's block uses the tree's");
            assert!(self.order.remove(since, tree_block), "{tree_block:?} was not up for eviction");
            self.pool.free(kept.block);
        }
    }

    /// Panics unless the used blocks are those of `tables`, the others free or kept for blocks that `can_be_found`.
    pub(crate) fn assert_accounts_for<'a>(
        &self,
        tables: impl Iterator<Item = &'a BlockTable>,
        can_be_found: impl Fn(BlockId) -> bool,
    ) {
        let held = tables.flat_map(|table| table.window.iter().copied());
        let idle: Vec<BlockId> =
            self.kept.values().filter(|kept| kept.idle_since.is_some()).map(|kept| kept.block).collect();
        self.pool.assert_accounts_for(held, |block| idle.contains(&block));
        assert_eq!(idle.len(), self.order.len(), "kept windows up for eviction");
        assert!(self.kept.keys().all(|&block| can_be_found(block)), "a window is kept where nobody can find it");
    }

    /// Panics unless `table` has exactly the window of a sequence with `num_tokens` positions and blocks up to `num_blocks`,
    /// of which the first `num_published` are those that others would get.
    pub(crate) fn assert_window(&self, table: &BlockTable, num_tokens: usize, ends: [usize; 2]) {
        let [num_published, num_blocks] = ends;
        let first = self.first_seen(num_tokens);
        assert_eq!(table.window_start, first, "the window of {num_tokens} tokens starts elsewhere");
        assert_eq!(
            first + table.window.len(),
            num_blocks.max(first),
            "the window of {num_tokens} tokens ends elsewhere"
        );
        for idx in first..num_published {
            let kept = self.kept.get(&table.blocks[idx]).map(|kept| kept.block);
            assert_eq!(kept, Some(table.window[idx - first]), "block {idx} of the window is not the published one");
        }
    }

    /// One more uses what is kept for the tree's block, if anything is.
    fn share(&mut self, tree_block: BlockId) -> Option<BlockId> {
        let kept = self.kept.get_mut(&tree_block)?;
        self.pool.share(kept.block);
        if let Some(since) = kept.idle_since.take() {
            self.order.remove(since, tree_block);
        }
        Some(kept.block)
    }

    fn let_go_first(&mut self, table: &mut BlockTable, num_blocks: usize) {
        // In order, so that a window which has lost its beginning does not cost a younger one a block.
        for (idx, block) in (table.window_start..).zip(table.window.drain(..num_blocks)) {
            self.let_go(table.blocks[idx], block);
        }
    }

    /// One less uses the window's block at the place of `tree_block`.
    fn let_go(&mut self, tree_block: BlockId, block: BlockId) {
        if !self.pool.let_go(block) {
            return;
        }
        match self.kept.get_mut(&tree_block) {
            Some(kept) if kept.block == block => {
                self.now = self.now.next();
                kept.idle_since = Some(self.now);
                self.order.insert(self.now, tree_block);
            }
            _ => self.pool.free(block),
        }
    }

    fn allocate(&mut self) -> BlockId {
        if self.pool.num_free() == 0 {
            let oldest = self.order.oldest().expect("every running sequence finds room for its window");
            self.forget(oldest);
        }
        self.pool.allocate().expect("a block is free")
    }
}
