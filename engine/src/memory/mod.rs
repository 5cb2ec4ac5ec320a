//! Bytes: how many the KV cache gets ([`budget`]) and where they lie ([`kv_arena`]).

pub mod budget;
mod kv_arena;

pub use kv_arena::{ArenaSize, KvArena};
