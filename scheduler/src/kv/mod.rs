//! Who holds which KV block: `block_pool` what is free, `block_table` what one sequence holds, `manager` what fits.

mod block_pool;
mod block_table;
mod manager;

pub use block_pool::BlockId;
pub use block_table::BlockTable;
pub(crate) use manager::BlockManager;
