//! Reading checkpoints: files to named tensors ([`checkpoint`]), tensors to what layers take ([`loader`]).
//!
//! [`gguf`] reads GGUF files, [`gguf_model`] serves what they hold under Hugging Face's names, [`model_files`] tells them
//! from folders, [`upcycle`] turns a dense one into an MoE folder, [`inspect`] sizes a model up. [`quantize`] writes folders of packed
//! weights, [`packed_folder`] reads them.

mod bounded_read;
pub mod checkpoint;
mod class_defaults;
mod fp8;
pub mod gguf;
#[cfg(test)]
mod gguf_fixture;
pub mod gguf_model;
mod gguf_types;
mod grouped_ints;
pub mod inspect;
pub mod loader;
pub mod model_config;
pub mod model_files;
pub mod mxfp4;
mod pack_writer;
pub mod packed_folder;
pub mod quantization;
pub mod quantize;
mod quantized;
mod storage;
pub mod tally;
pub mod upcycle;

pub use bounded_read::read_bounded;
pub use storage::Role;
