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
///
/// A block is free, used by one sequence or more, or kept: used by none and not free either, for what it holds may be
/// wanted again.
#[derive(Debug)]
pub(crate) struct BlockPool {
    /// Ids below it can be handed out.
    limit: usize,
    /// Last in, first out: a block freed lately may still be in a cache of the machine.
    free: Vec<BlockId>,
    /// Users by id; 0 for free and kept blocks.
    num_users: Vec<u32>,
    num_used: usize,
    num_kept: usize,
}

impl BlockPool {
    pub(crate) fn new(num_blocks: usize) -> Self {
        let mut pool = Self { limit: 0, free: Vec::new(), num_users: Vec::new(), num_used: 0, num_kept: 0 };
        pool.set_limit(num_blocks);
        pool
    }

    pub(crate) fn num_free(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn num_used(&self) -> usize {
        self.num_used
    }

    pub(crate) fn num_kept(&self) -> usize {
        self.num_kept
    }

    /// Free, used and kept blocks; above the limit while a shrink waits for blocks to be freed.
    pub(crate) fn num_total(&self) -> usize {
        self.free.len() + self.num_used + self.num_kept
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn is_used(&self, block: BlockId) -> bool {
        self.num_users[block.index()] > 0
    }

    pub(crate) fn allocate(&mut self) -> Option<BlockId> {
        let block = self.free.pop()?;
        assert!(!self.is_used(block), "{block:?} was free and used");
        self.num_users[block.index()] = 1;
        self.num_used += 1;
        Some(block)
    }

    /// One more uses a block that is used or kept.
    pub(crate) fn share(&mut self, block: BlockId) {
        if !self.is_used(block) {
            self.num_kept -= 1;
            self.num_used += 1;
        }
        self.num_users[block.index()] += 1;
    }

    /// One less uses a block. True if it was the last: the block is kept until [`Self::free`].
    pub(crate) fn let_go(&mut self, block: BlockId) -> bool {
        assert!(self.is_used(block), "{block:?} was freed twice");
        self.num_users[block.index()] -= 1;
        let is_last = !self.is_used(block);
        if is_last {
            self.num_used -= 1;
            self.num_kept += 1;
        }
        is_last
    }

    /// Nobody will want what a kept block holds.
    pub(crate) fn free(&mut self, block: BlockId) {
        assert!(!self.is_used(block), "{block:?} is used");
        self.num_kept -= 1;
        if block.index() < self.limit {
            self.free.push(block);
        }
    }

    /// Grows at once; shrinks by the free blocks at once and by the used ones as they are freed. The caller keeps none
    /// above the limit.
    pub(crate) fn set_limit(&mut self, limit: usize) {
        let ids = |from: usize, to: usize| {
            let to = u32::try_from(to).expect("the caller keeps the limit within u32");
            (from as u32..to).map(BlockId)
        };
        if limit > self.limit {
            self.num_users.resize(limit.max(self.num_users.len()), 0);
            let num_users = &self.num_users;
            // Lowest last, to be handed out first: a later shrink then finds the high ids free.
            self.free.extend(ids(self.limit, limit).rev().filter(|block| num_users[block.index()] == 0));
        } else if limit < self.limit {
            self.free.retain(|block| block.index() < limit);
        }
        self.limit = limit;
    }

    /// Panics unless every id below the limit is free, used or kept, once, `held` are the used ones as often as they have
    /// users, and `is_kept` knows the others.
    pub(crate) fn assert_accounts_for(&self, held: impl Iterator<Item = BlockId>, is_kept: impl Fn(BlockId) -> bool) {
        let mut num_users = vec![0; self.num_users.len()];
        held.for_each(|block| num_users[block.index()] += 1);
        assert!(num_users == self.num_users, "users of blocks are not the sequences that hold them");
        assert_eq!(self.num_used, num_users.iter().filter(|&&users| users > 0).count(), "used blocks were miscounted");
        let mut is_free = vec![false; self.num_users.len()];
        for &block in &self.free {
            assert!(!self.is_used(block), "{block:?} is free and used");
            assert!(block.index() < self.limit, "{block:?} is free above the limit {}", self.limit);
            assert!(!std::mem::replace(&mut is_free[block.index()], true), "{block:?} is free twice");
        }
        let mut num_kept = 0;
        for idx in 0..self.num_users.len() {
            let block = BlockId(idx as u32);
            let is_kept = num_users[idx] == 0 && is_kept(block);
            assert!(!(is_kept && is_free[idx]), "{block:?} is free and kept");
            assert!(!is_kept || idx < self.limit, "{block:?} is kept above the limit {}", self.limit);
            num_kept += usize::from(is_kept);
            let is_somewhere = is_kept || is_free[idx] || num_users[idx] > 0;
            assert!(is_somewhere || idx >= self.limit, "{block:?} is neither free nor used nor kept");
        }
        assert_eq!(self.num_kept, num_kept, "kept blocks were miscounted");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NONE: fn(BlockId) -> bool = |_| false;

    fn check(pool: &BlockPool, held: &[BlockId], num_free: usize) {
        assert_eq!((pool.num_free(), pool.num_used(), pool.num_kept()), (num_free, held.len(), 0));
        pool.assert_accounts_for(held.iter().copied(), NONE);
    }

    fn drop_block(pool: &mut BlockPool, block: BlockId) {
        assert!(pool.let_go(block));
        pool.free(block);
    }

    #[test]
    fn hands_out_every_block_once() {
        let mut pool = BlockPool::new(3);
        let held: Vec<_> = std::iter::from_fn(|| pool.allocate()).collect();
        assert_eq!(held, [BlockId(0), BlockId(1), BlockId(2)]);
        check(&pool, &held, 0);
        drop_block(&mut pool, held[1]);
        assert_eq!(pool.allocate(), Some(BlockId(1)));
    }

    #[test]
    fn a_shared_block_is_kept_until_its_last_user_lets_go() {
        let mut pool = BlockPool::new(2);
        let block = pool.allocate().unwrap();
        pool.share(block);
        pool.assert_accounts_for([block, block].into_iter(), NONE);
        assert!(!pool.let_go(block));
        assert!(pool.let_go(block));
        assert_eq!((pool.num_free(), pool.num_used(), pool.num_kept()), (1, 0, 1));
        pool.assert_accounts_for(std::iter::empty(), |kept| kept == block);
        pool.share(block);
        check(&pool, &[block], 1);
    }

    #[test]
    fn shrinks_as_blocks_are_freed() {
        let mut pool = BlockPool::new(4);
        let held: Vec<_> = (0..3).map(|_| pool.allocate().unwrap()).collect();
        pool.set_limit(1);
        check(&pool, &held, 0);
        drop_block(&mut pool, held[2]);
        check(&pool, &held[..2], 0);
        drop_block(&mut pool, held[0]);
        check(&pool, &held[1..2], 1);
        drop_block(&mut pool, held[1]);
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
        held.iter().for_each(|&block| drop_block(&mut pool, block));
        check(&pool, &[], 6);
    }

    #[test]
    #[should_panic(expected = "freed twice")]
    fn refuses_a_double_free() {
        let mut pool = BlockPool::new(1);
        let block = pool.allocate().unwrap();
        pool.let_go(block);
        pool.let_go(block);
    }
}
