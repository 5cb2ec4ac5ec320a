//! Who holds which KV block: `block_pool` what is free and how many hold the others, `block_table` what one sequence
//! holds, `block_hash` the names of full blocks, `prefix_tree` which of them can be found, `evict` which goes first,
//! `manager` what fits, `windows` the blocks of layers that see a window only, `state_slots` who holds which recurrent
//! state, `snapshots` which of them are kept.

mod block_hash;
mod block_pool;
mod block_table;
mod evict;
mod manager;
mod prefix_tree;
mod snapshots;
mod state_slots;
mod windows;

pub(crate) use block_hash::{BlockHash, BlockHashes};
pub use block_pool::BlockId;
pub(crate) use block_pool::BlockPool;
pub use block_table::BlockTable;
pub(crate) use manager::{BlockManager, CachedPrefix};
pub(crate) use snapshots::Snapshots;
pub use state_slots::StateSlot;
pub(crate) use state_slots::StateSlots;
pub(crate) use windows::WindowBlocks;
