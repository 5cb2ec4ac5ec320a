//! Reading checkpoints: files to named tensors ([`checkpoint`]), tensors to what layers take ([`loader`]).
//!
//! [`gguf`] reads GGUF files, [`upcycle`] turns a dense one into an MoE folder, [`inspect`] sizes a folder up.

mod bounded_read;
pub mod checkpoint;
mod class_defaults;
mod fp8;
pub mod gguf;
#[cfg(test)]
mod gguf_fixture;
mod gguf_types;
mod grouped_ints;
pub mod inspect;
pub mod loader;
pub mod model_config;
pub mod mxfp4;
pub mod quantization;
mod quantized;
pub mod tally;
pub mod upcycle;

pub use bounded_read::read_bounded;
