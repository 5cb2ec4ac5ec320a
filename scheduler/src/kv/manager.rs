//! Counts of blocks: what a sequence needs, what fits, what is found again, and how far the pool may shrink.

use std::collections::BTreeMap;

use crate::kv::block_hash::BlockHash;
use crate::kv::block_pool::{BlockId, BlockPool};
use crate::kv::block_table::BlockTable;
use crate::kv::evict::Tick;
use crate::kv::prefix_tree::PrefixTree;
use crate::kv::snapshots::Snapshots;
use crate::kv::state_slots::StateSlot;
use crate::kv::windows::WindowBlocks;

/// The pool, the tree of what is in it, and the promise that every accepted sequence fits in it alone.
///
/// Every block is free, used, or cached: full, found by its name, and given up as soon as a free one is missing.
#[derive(Debug)]
pub(crate) struct BlockManager {
    block_size: usize,
    pool: BlockPool,
    tree: PrefixTree,
    /// States at the ends of blocks of the tree; a block that leaves it takes its state along.
    pub(crate) snapshots: Snapshots,
    /// Of models that have layers with a window; the pool is for their other layers, and for the names of blocks.
    windows: Option<WindowBlocks>,
    /// Counts releases.
    now: Tick,
    /// Blocks asked for. The pool is larger while an accepted sequence needs more than these.
    num_wanted: usize,
    /// Most blocks that accepted sequences will need → how many of them need that many.
    promises: BTreeMap<usize, usize>,
}

/// The leading blocks of a sequence that the tree has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CachedPrefix {
    pub(crate) num_blocks: usize,
    /// Those that others use, so that taking them takes nothing from what is available. They come first.
    pub(crate) num_used: usize,
}

impl BlockManager {
    pub(crate) fn new(block_size: usize, num_blocks: usize) -> Self {
        Self {
            block_size,
            pool: BlockPool::new(num_blocks),
            tree: PrefixTree::default(),
            snapshots: Snapshots::new(0, 0),
            windows: None,
            now: Tick::default(),
            num_wanted: num_blocks,
            promises: BTreeMap::new(),
        }
    }

    /// The same for sequences that have recurrent states, of which some are kept.
    pub(crate) fn with_snapshots(self, snapshots: Snapshots) -> Self {
        Self { snapshots, ..self }
    }

    /// The same for sequences that have windows.
    pub(crate) fn with_windows(self, windows: Option<WindowBlocks>) -> Self {
        Self { windows, ..self }
    }

    pub(crate) fn windows(&self) -> Option<&WindowBlocks> {
        self.windows.as_ref()
    }

    pub(crate) fn block_size(&self) -> usize {
        self.block_size
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

    /// Blocks that can be handed out: free ones, and cached ones that would be given up.
    pub(crate) fn num_available(&self) -> usize {
        self.pool.num_free() + self.pool.num_kept()
    }

    pub(crate) fn num_used(&self) -> usize {
        self.pool.num_used()
    }

    pub(crate) fn num_cached(&self) -> usize {
        self.pool.num_kept()
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

    /// The longest chain of `names` that the tree has from the first on and behind which a sequence can start: where
    /// sequences have states one is kept there, where they have windows all blocks of the window are.
    pub(crate) fn find(&self, names: &[BlockHash]) -> CachedPrefix {
        let (mut chain, mut found) = (CachedPrefix::default(), CachedPrefix::default());
        // Last blocks of the chain whose windows are kept.
        let mut num_windows = 0;
        for block in names.iter().map_while(|&name| self.tree.find(name)) {
            chain.num_blocks += 1;
            chain.num_used += usize::from(self.pool.is_used(block));
            let has_state = self.snapshots.is_unused() || self.snapshots.has(block);
            let has_window = self.windows.as_ref().is_none_or(|windows| {
                num_windows = if windows.has(block) { num_windows + 1 } else { 0 };
                windows.first_seen(chain.num_blocks * self.block_size) + num_windows >= chain.num_blocks
            });
            if has_state && has_window {
                found = chain;
            }
        }
        found
    }

    /// True if the state at the end of the block of this name is kept.
    pub(crate) fn has_snapshot(&self, name: BlockHash) -> bool {
        self.tree.find(name).is_some_and(|block| self.snapshots.has(block))
    }

    /// True if the tree has `blocks` under `names`.
    pub(crate) fn has_chain(&self, names: &[BlockHash], blocks: &[BlockId]) -> bool {
        names.iter().map(|&name| self.tree.find(name)).eq(blocks.iter().map(|&block| Some(block)))
    }

    /// Fills an empty `table` with the blocks of `names`, all of which [`Self::find`] found.
    pub(crate) fn take(&mut self, table: &mut BlockTable, names: &[BlockHash]) {
        assert!(table.blocks.is_empty(), "a sequence is admitted without blocks");
        for &name in names {
            let block = self.tree.find(name).expect("the caller found it");
            self.share(block);
            table.blocks.push(block);
        }
        if let Some(windows) = &mut self.windows {
            windows.take(table);
        }
    }

    /// Makes the window of `table` reach to the end of `num_tokens` positions, which [`Self::try_cover`] covered.
    pub(crate) fn cover_window(&mut self, table: &mut BlockTable, num_tokens: usize) {
        if let Some(windows) = &mut self.windows {
            windows.cover(table, num_tokens);
        }
    }

    /// Lets go of what no row behind `num_tokens` positions sees through a window.
    pub(crate) fn leave_window(&mut self, table: &mut BlockTable, num_tokens: usize) {
        if let Some(windows) = &mut self.windows {
            windows.leave(table, num_tokens);
        }
    }

    /// Makes the full block at `idx` of `table` one that can be found by `name`. Where another has the name already the
    /// table gets that one, for they hold the same; all blocks before `idx` have been published.
    pub(crate) fn publish(&mut self, table: &mut BlockTable, idx: usize, name: BlockHash) {
        let block = table.blocks[idx];
        if let Some(same) = self.tree.find(name) {
            self.share(same);
            table.blocks[idx] = same;
            self.let_go(block);
        } else {
            let parent = idx.checked_sub(1).map(|before| table.blocks[before]);
            self.tree.insert(name, block, parent);
        }
        if let Some(windows) = &mut self.windows {
            windows.publish(table, idx);
        }
    }

    /// Makes `table` cover `num_tokens` positions. False, with nothing changed, where too few blocks are available.
    pub(crate) fn try_cover(&mut self, table: &mut BlockTable, num_tokens: usize) -> bool {
        let num_missing = self.blocks_for(num_tokens).saturating_sub(table.blocks.len());
        if num_missing > self.num_available() {
            return false;
        }
        table.blocks.extend((0..num_missing).map(|_| self.allocate()));
        true
    }

    /// Lets go of all of `table`. What was published stays cached, the rest is free.
    pub(crate) fn release(&mut self, table: &mut BlockTable) {
        self.now = self.now.next();
        if let Some(windows) = &mut self.windows {
            windows.release(table);
        }
        let is_above = table.blocks.iter().any(|block| block.0 as usize >= self.pool.limit());
        // Backwards: leaves before what they follow, and the next sequence gets free blocks in the same order.
        for block in table.blocks.drain(..).rev() {
            self.let_go(block);
        }
        if is_above {
            self.evict_above_limit();
        }
    }

    /// Panics unless every slot for a kept state, `first` and those behind it, is free, in `reserved` or of a block in the
    /// tree.
    pub(crate) fn assert_snapshots(&self, first: usize, reserved: impl Iterator<Item = StateSlot>) {
        self.snapshots.assert_accounts_for(first, reserved, |block| self.tree.has(block));
    }

    /// Panics unless those of `tables` are exactly the used blocks and the pool has the size it must have.
    pub(crate) fn assert_accounts_for<'a>(&self, tables: impl Iterator<Item = &'a BlockTable> + Clone) {
        let held = tables.clone().flat_map(|table| table.blocks.iter().copied());
        self.pool.assert_accounts_for(held, |block| self.tree.has(block));
        if let Some(windows) = &self.windows {
            windows.assert_accounts_for(tables, |block| self.tree.has(block));
        }
        self.tree.assert_invariants(|block| self.pool.is_used(block));
        assert_eq!(self.pool.limit(), self.limit(), "the pool is not as large as asked for and promised");
        assert!(self.num_total() >= self.pool.limit(), "blocks were lost");
    }

    fn allocate(&mut self) -> BlockId {
        if self.pool.num_free() == 0 {
            let block = self.tree.evict().expect("enough blocks are available");
            self.give_up(block);
        }
        self.pool.allocate().expect("a block is free")
    }

    fn share(&mut self, block: BlockId) {
        self.pool.share(block);
        self.tree.wake(block);
    }

    fn let_go(&mut self, block: BlockId) {
        if !self.pool.let_go(block) {
            return;
        }
        if self.tree.has(block) {
            self.tree.rest(block, self.now);
        } else {
            self.pool.free(block);
        }
    }

    fn limit(&self) -> usize {
        let largest_promise = self.promises.last_key_value().map_or(0, |(&num_blocks, _)| num_blocks);
        self.num_wanted.max(largest_promise)
    }

    fn resize(&mut self) {
        let limit = self.limit();
        if limit != self.pool.limit() {
            self.pool.set_limit(limit);
            self.evict_above_limit();
        }
    }

    fn evict_above_limit(&mut self) {
        let limit = u32::try_from(self.pool.limit()).expect("limits are within u32");
        for block in self.tree.evict_from(limit) {
            self.give_up(block);
        }
    }

    /// A block that left the tree is free, and what was kept beside it is gone.
    fn give_up(&mut self, block: BlockId) {
        self.snapshots.forget(block);
        if let Some(windows) = &mut self.windows {
            windows.forget(block);
        }
        self.pool.free(block);
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

    /// Names of the blocks of a sequence of `len` blocks that begins with `first`.
    fn names(first: u32, len: u32) -> Vec<BlockHash> {
        let root = BlockHash::root(&[0; 32], &[0; 32]);
        (first..first + len)
            .scan(root, |parent, token| {
                *parent = parent.child(&[token]);
                Some(*parent)
            })
            .collect()
    }

    fn computed(manager: &mut BlockManager, names: &[BlockHash]) -> BlockTable {
        let mut table = BlockTable::default();
        assert!(manager.try_cover(&mut table, names.len() * manager.block_size));
        names.iter().enumerate().for_each(|(idx, &name)| manager.publish(&mut table, idx, name));
        table
    }

    fn check(manager: &BlockManager, tables: &[&BlockTable], [free, used, cached]: [usize; 3]) {
        assert_eq!([manager.num_free(), manager.num_used(), manager.num_cached()], [free, used, cached]);
        manager.assert_accounts_for(tables.iter().copied());
    }

    #[test]
    fn what_was_published_is_found_until_room_is_needed() {
        let mut manager = BlockManager::new(4, 5);
        let (old, young) = (names(1, 2), names(7, 2));
        for names in [&old, &young] {
            let mut table = computed(&mut manager, names);
            check(&manager, &[&table], [5 - 2 - manager.num_cached(), 2, manager.num_cached()]);
            manager.release(&mut table);
        }
        check(&manager, &[], [1, 0, 4]);
        assert_eq!(manager.find(&old), CachedPrefix { num_blocks: 2, num_used: 0 });
        let mut table = BlockTable::default();
        assert!(!manager.try_cover(&mut table, 24));
        assert!(manager.try_cover(&mut table, 8));
        check(&manager, &[&table], [0, 2, 3]);
        assert_eq!([&old, &young].map(|names| manager.find(names).num_blocks), [1, 2], "the oldest leaf went");
        let mut again = BlockTable::default();
        manager.take(&mut again, &young);
        check(&manager, &[&table, &again], [0, 4, 1]);
        assert_eq!(manager.find(&young), CachedPrefix { num_blocks: 2, num_used: 2 });
        assert!(!manager.try_cover(&mut table, 16), "what is shared cannot go");
        assert!(manager.try_cover(&mut table, 12));
        manager.release(&mut table);
        manager.release(&mut again);
        check(&manager, &[], [3, 0, 2]);
    }

    #[test]
    fn what_two_computed_is_held_once() {
        let mut manager = BlockManager::new(4, 6);
        let names = names(1, 2);
        let mut tables = [0; 2].map(|_| {
            let mut table = BlockTable::default();
            assert!(manager.try_cover(&mut table, 8));
            table
        });
        for table in &mut tables {
            names.iter().enumerate().for_each(|(idx, &name)| manager.publish(table, idx, name));
        }
        assert_eq!(tables[0].blocks(), tables[1].blocks());
        check(&manager, &[&tables[0], &tables[1]], [4, 2, 0]);
        manager.release(&mut tables[0]);
        check(&manager, &[&tables[1]], [4, 2, 0]);
        manager.release(&mut tables[1]);
        check(&manager, &[], [4, 0, 2]);
    }

    #[test]
    fn a_shrink_takes_cached_blocks_above_the_limit() {
        let mut manager = BlockManager::new(4, 6);
        let (low, high) = (names(1, 2), names(7, 3));
        let mut tables = [computed(&mut manager, &low), computed(&mut manager, &high)];
        manager.release(&mut tables[0]);
        assert_eq!(manager.set_num_wanted(1), 4, "three are in use");
        check(&manager, &[&tables[1]], [0, 3, 1]);
        manager.release(&mut tables[1]);
        check(&manager, &[], [0, 0, 1]);
        assert_eq!(manager.find(&low).num_blocks, 1);
        assert_eq!(manager.set_num_wanted(3), 3);
        check(&manager, &[], [2, 0, 1]);
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
