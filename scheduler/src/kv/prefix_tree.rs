//! Which full blocks can be found by name: those that running sequences share, and those that ended ones left behind.

use std::collections::{HashMap, HashSet};

use crate::kv::block_hash::BlockHash;
use crate::kv::block_pool::BlockId;
use crate::kv::evict::{EvictionOrder, Tick};

/// A forest of blocks by name. Who uses a block uses all blocks above it, so that below an idle block everything is idle
/// and idle blocks can always go, leaves first.
#[derive(Debug, Default)]
pub(crate) struct PrefixTree {
    by_hash: HashMap<BlockHash, BlockId>,
    nodes: HashMap<BlockId, Node>,
    order: EvictionOrder,
}

#[derive(Debug)]
struct Node {
    hash: BlockHash,
    /// The block before it in every sequence that has it.
    parent: Option<BlockId>,
    depth: usize,
    num_children: usize,
    /// When its last user let it go; `None` while it is in use.
    idle_since: Option<Tick>,
}

impl PrefixTree {
    pub(crate) fn find(&self, hash: BlockHash) -> Option<BlockId> {
        self.by_hash.get(&hash).copied()
    }

    pub(crate) fn has(&self, block: BlockId) -> bool {
        self.nodes.contains_key(&block)
    }

    /// Adds a block in use behind its parent, which is in use too.
    pub(crate) fn insert(&mut self, hash: BlockHash, block: BlockId, parent: Option<BlockId>) {
        let depth = parent.map_or(0, |parent| {
            let parent = self.node_mut(parent);
            assert!(parent.idle_since.is_none(), "{block:?} follows a block that nobody uses");
            parent.num_children += 1;
            parent.depth + 1
        });
        let node = Node { hash, parent, depth, num_children: 0, idle_since: None };
        assert!(self.by_hash.insert(hash, block).is_none(), "{block:?} has the name of another block");
        assert!(self.nodes.insert(block, node).is_none(), "{block:?} has two names");
    }

    /// Somebody uses an idle block again.
    pub(crate) fn wake(&mut self, block: BlockId) {
        if let Some(since) = self.node_mut(block).idle_since.take() {
            self.order.remove(since, block);
        }
    }

    /// Nobody uses the block any more.
    pub(crate) fn rest(&mut self, block: BlockId, now: Tick) {
        let node = self.node_mut(block);
        assert!(node.idle_since.replace(now).is_none(), "{block:?} was let go twice");
        if node.num_children == 0 {
            self.order.insert(now, block);
        }
    }

    /// Takes the least recently used idle leaf out.
    pub(crate) fn evict(&mut self) -> Option<BlockId> {
        let block = self.order.oldest()?;
        self.remove_leaf(block);
        Some(block)
    }

    /// Takes out every idle block from id `limit` on, and those behind them.
    pub(crate) fn evict_from(&mut self, limit: u32) -> Vec<BlockId> {
        let mut idle: Vec<(usize, BlockId)> = self
            .nodes
            .iter()
            .filter(|(_, node)| node.idle_since.is_some())
            .map(|(&block, node)| (node.depth, block))
            .collect();
        idle.sort_unstable();
        let mut evicted: Vec<BlockId> = Vec::new();
        let mut is_evicted = HashSet::new();
        for (_, block) in idle {
            // Parents come first; one that is in use stays.
            let follows_evicted = self.nodes[&block].parent.is_some_and(|parent| is_evicted.contains(&parent));
            if block.0 >= limit || follows_evicted {
                is_evicted.insert(block);
                evicted.push(block);
            }
        }
        evicted.iter().rev().for_each(|&block| self.remove_leaf(block));
        evicted
    }

    /// Panics unless links, names and the order of eviction agree, and the blocks in use are those that `is_used`.
    pub(crate) fn assert_invariants(&self, is_used: impl Fn(BlockId) -> bool) {
        assert_eq!(self.by_hash.len(), self.nodes.len(), "a name without a block, or a block without a name");
        let mut num_children: HashMap<BlockId, usize> = HashMap::new();
        for (&block, node) in &self.nodes {
            assert_eq!(self.by_hash.get(&node.hash), Some(&block), "{block:?} cannot be found by its name");
            assert_eq!(node.idle_since.is_none(), is_used(block), "{block:?} is idle and used");
            let Some(parent) = node.parent else { continue };
            *num_children.entry(parent).or_default() += 1;
            let above = self.nodes.get(&parent).expect("a parent stays as long as its children");
            assert!(node.idle_since.is_some() || above.idle_since.is_none(), "{block:?} is used, its parent is not");
            assert!(
                above.idle_since.is_none_or(|since| Some(since) >= node.idle_since),
                "{block:?} outlived its parent"
            );
            assert_eq!(above.depth + 1, node.depth);
        }
        let mut leaves = 0;
        for (block, node) in &self.nodes {
            assert_eq!(node.num_children, num_children.get(block).copied().unwrap_or(0), "children of {block:?}");
            leaves += usize::from(node.num_children == 0 && node.idle_since.is_some());
        }
        assert_eq!(leaves, self.order.len(), "idle leaves up for eviction");
    }

    fn remove_leaf(&mut self, block: BlockId) {
        let node = self.nodes.remove(&block).expect("a leaf is in the tree");
        assert_eq!(node.num_children, 0, "{block:?} is no leaf");
        let since = node.idle_since.expect("only idle blocks are evicted");
        assert!(self.order.remove(since, block), "{block:?} was not up for eviction");
        self.by_hash.remove(&node.hash);
        let Some(parent) = node.parent else { return };
        let above = self.node_mut(parent);
        above.num_children -= 1;
        if above.num_children == 0
            && let Some(since) = above.idle_since
        {
            self.order.insert(since, parent);
        }
    }

    fn node_mut(&mut self, block: BlockId) -> &mut Node {
        self.nodes.get_mut(&block).expect("the caller knows that the block is in the tree")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOT: [u8; 32] = [0; 32];

    /// The name of the block that holds the last of `tokens`, one token per block.
    fn name(tokens: &[u32]) -> BlockHash {
        tokens.iter().fold(BlockHash::root(&ROOT, &ROOT), |parent, &token| parent.child(&[token]))
    }

    /// Blocks 0-1-2 and 0-1-3 and 4, all let go one after another.
    fn forest() -> PrefixTree {
        let mut tree = PrefixTree::default();
        let paths: [(&[u32], u32, Option<u32>); 5] = [
            (&[1], 0, None),
            (&[1, 2], 1, Some(0)),
            (&[1, 2, 3], 2, Some(1)),
            (&[1, 2, 4], 3, Some(1)),
            (&[9], 4, None),
        ];
        for (path, block, parent) in paths {
            tree.insert(name(path), BlockId(block), parent.map(BlockId));
        }
        let mut now = Tick::default();
        for block in [3, 4, 2, 1, 0] {
            now = now.next();
            tree.rest(BlockId(block), now);
        }
        tree.assert_invariants(|_| false);
        tree
    }

    #[test]
    fn the_least_recently_used_leaf_goes_first() {
        let mut tree = forest();
        let gone: Vec<u32> = std::iter::from_fn(|| {
            let block = tree.evict();
            tree.assert_invariants(|_| false);
            block.map(|block| block.0)
        })
        .collect();
        assert_eq!(gone, [3, 4, 2, 1, 0], "2 is younger than 4, and 1 goes only after both of its children");
    }

    #[test]
    fn used_again_is_young_again() {
        let mut tree = forest();
        for block in [0, 1, 3] {
            tree.wake(BlockId(block));
        }
        tree.assert_invariants(|block| [0, 1, 3].contains(&block.0));
        assert_eq!(tree.evict(), Some(BlockId(4)));
        assert_eq!(tree.evict(), Some(BlockId(2)));
        assert_eq!(tree.evict(), None, "what is in use stays");
        let late = (0..9).fold(Tick::default(), |tick, _| tick.next());
        [3, 1, 0].into_iter().for_each(|block| tree.rest(BlockId(block), late));
        assert_eq!(tree.evict(), Some(BlockId(3)));
        assert_eq!((tree.find(name(&[1, 2])), tree.find(name(&[1, 2, 4]))), (Some(BlockId(1)), None));
    }

    #[test]
    fn a_limit_takes_what_follows_the_blocks_above_it() {
        let mut tree = forest();
        let mut gone = tree.evict_from(4);
        assert_eq!(gone, [BlockId(4)]);
        tree.insert(name(&[7]), BlockId(9), None);
        gone = tree.evict_from(3);
        assert_eq!(gone, [BlockId(3)], "9 is in use");
        tree.assert_invariants(|block| block.0 == 9);
        gone = tree.evict_from(0);
        assert_eq!(gone, [BlockId(0), BlockId(1), BlockId(2)]);
    }
}
