//! The free list of KV blocks.

/// The index of a block in the engine's arena.
#[derive(Copy, Clone, Eq, PartialEq, Hash, Ord, PartialOrd, Debug)]
pub struct BlockId(pub u32);

impl BlockId {
    fn index(self) -> usize {
        self.0 as usize
    }
}

/// Hands out block ids below a limit that may change. A block above a lowered limit that is still held leaves the
/// pool when it is freed, so a shrink never takes a block away.
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// Ids below it can be handed out.
    limit: usize,
    /// Last in, first out: a block freed lately may still be in a cache of the machine.
    free: Vec<BlockId>,
    /// By id.
    is_used: Vec<bool>,
    num_used: usize,
}

impl BlockPool {
    pub(crate) fn new(num_blocks: usize) -> Self {
        let mut pool = Self { limit: 0, free: Vec::new(), is_used: Vec::new(), num_used: 0 };
        pool.set_limit(num_blocks);
        pool
    }

    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn num_used(&self) -> usize {
        self.num_used
    }

    /// Free and used blocks; above the limit while a shrink waits for blocks to be freed.
    pub(crate) fn num_total(&self) -> usize {
        self.free.len() + self.num_used
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        assert!(!self.is_used[block.index()], "{block:?} was free and used");
        self.is_used[block.index()] = true;
        self.num_used += 1;
        Some(block)
    }

    pub(crate) fn free(&mut self, block: BlockId) {
        assert!(self.is_used[block.index()], "{block:?} was freed twice");
        self.is_used[block.index()] = false;
        self.num_used -= 1;
        if block.index() < self.limit {
            self.free.push(block);
        }
    }

    /// Grows at once; shrinks by the free blocks at once and by the others as they are freed.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        let ids = |from: usize, to: usize| {
            let to = u32::try_from(to).expect("the caller keeps the limit within u32");
            (from as u32..to).map(BlockId)
        };
        if limit > self.limit {
            self.is_used.resize(limit.max(self.is_used.len()), false);
            let is_used = &self.is_used;
            // Lowest last, to be handed out first: a later shrink then finds the high ids free.
            self.free.extend(ids(self.limit, limit).rev().filter(|block| !is_used[block.index()]));
        } else if limit < self.limit {
            self.free.retain(|block| block.index() < limit);
        }
        self.limit = limit;
    }

    /// Panics unless every id below the limit is either free or used, once, and `held` are the used ones.
    pub(crate) fn assert_accounts_for(&self, held: impl Iterator<Item = BlockId>) {
        let mut is_seen = vec![false; self.is_used.len()];
        let mut see = |block: BlockId| {
            let was_seen = std::mem::replace(&mut is_seen[block.index()], true);
            assert!(!was_seen, "{block:?} has two owners");
        };
        let mut num_held = 0;
        for block in held {
            assert!(self.is_used[block.index()], "{block:?} is held but not used");
            see(block);
            num_held += 1;
        }
        for &block in &self.free {
            assert!(!self.is_used[block.index()], "{block:?} is free and used");
            assert!(block.index() < self.limit, "{block:?} is free above the limit {}", self.limit);
            see(block);
        }
        assert_eq!(num_held, self.num_used, "used blocks are not those that sequences hold");
        assert!(is_seen[..self.limit].iter().all(|&seen| seen), "a block below the limit is neither free nor used");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(pool: &BlockPool, held: &[BlockId], num_free: usize) {
        assert_eq!((pool.num_free(), pool.num_used()), (num_free, held.len()));
        pool.assert_accounts_for(held.iter().copied());
    }

    #[test]
    fn hands_out_every_block_once() {
        let mut pool = BlockPool::new(3);
        let held: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(held, [BlockId(0), BlockId(1), BlockId(2)]);
        check(&pool, &held, 0);
        pool.free(held[1]);
        assert_eq!(pool.allocate(), Some(BlockId(1)));
    }

    #[test]
    fn shrinks_as_blocks_are_freed() {
        let mut pool = BlockPool::new(4);
        let held: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        pool.set_limit(1);
        check(&pool, &held, 0);
        pool.free(held[2]);
        check(&pool, &held[..2], 0);
        pool.free(held[0]);
        check(&pool, &held[1..2], 1);
        pool.free(held[1]);
        check(&pool, &[], 1);
        assert_eq!(pool.num_total(), 1);
    }

    #[test]
    fn growing_again_keeps_held_blocks() {
        let mut pool = BlockPool::new(4);
        let held: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        pool.set_limit(1);
        pool.set_limit(6);
        check(&pool, &held, 3);
        held.iter().for_each(|&block| pool.free(block));
        check(&pool, &[], 6);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn refuses_a_double_free() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.free(block);
        pool.free(block);
    }
}
