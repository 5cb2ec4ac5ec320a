//! Bytes: how many there are ([`room`]), how many the KV cache gets ([`budget`]), where they lie ([`kv_arena`]), and how blocks of them leave it
//! ([`block_coding`]).

mod block_coding;
pub mod budget;
mod kv_arena;
pub mod room;

pub use block_coding::BlockCoding;
pub use kv_arena::{ArenaSize, KvArena};
