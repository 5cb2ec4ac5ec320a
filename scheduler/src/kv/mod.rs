//! Who holds which KV block: `block_pool` what is free, `block_table` what one sequence holds, `manager` what fits,
//! `state_slots` who holds which recurrent state.

mod block_pool;
mod block_table;
mod manager;
mod state_slots;

pub use block_pool::BlockId;
pub use block_table::BlockTable;
pub(crate) use manager::BlockManager;
pub use state_slots::StateSlot;
pub(crate) use state_slots::StateSlots;
