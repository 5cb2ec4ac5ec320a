//! Ops that mixture-of-experts models need beyond plain candle: each with a reference, a fast CPU path, and checks.
//!
//! Map: `weight` and `mapped_file` hold weights, `range_file` reads parts of files for them, `huge_pages` backs them, `freed_memory` keeps what steps give back, `paged_cache` holds keys and values, `paged_batch` says who reads them, `state_cache` what recurrent layers
//! carry, `slabs` their memory, `pool` runs tasks on the compute threads, `dispatch` and `lanes` choose and wrap the instruction set, `amx` has
//! its matrix tiles, `quant` has the quantized formats and their product, `ops` has one folder per op, and `bench` measures
//! them beside the machine's limits.
//!
//! Invariant of every op: an output row is a function of its own input row (and of its context) alone, to the bit.
//! The order of every reduction depends on the reduced length only, never on the number of rows, on which rows share a
//! tile, or on the thread that computes it.

#[cfg(target_endian = "big")]
compile_error!("weights are little-endian bytes that are read in place");

mod affinity;
#[cfg(target_arch = "x86_64")]
mod amx;
pub mod bench;
pub mod block_format;
mod check;
mod cuda;
mod device;
mod dispatch;
mod error;
mod freed_memory;
mod huge_pages;
mod lanes;
mod mapped_file;
mod matmul;
mod memory;
mod ops;
mod paged_batch;
mod paged_cache;
pub mod pool;
mod quant;
mod range_file;
mod slabs;
mod state_cache;
#[cfg(test)]
mod testing;
mod weight;

/// Which bits the ops give. To be raised with every change after which an op, or a layer or sampler made of them, may give
/// other bits for the same input: outputs and prefixes that were computed under another number are not found again, not
/// even by another process that shares a store with this one.
pub const NUMERICS_VERSION: u32 = 3;

pub use device::{
    DeviceChoice, DeviceMemory, device_kind, device_memory, device_name, device_step_bytes, open_device, to_host,
};
pub use dispatch::{choose_isa, isa, isas};
pub use error::{KernelError, Result};
pub use freed_memory::keep_freed_memory;
pub use huge_pages::HugePages;
pub use mapped_file::{MappedFile, MappedParts};
pub use ops::embedding::{embedding, embedding_as};
pub use ops::gated_delta::{DeltaSpec, DeltaWeights, gated_delta};
pub use ops::glu::{GluActivation, glu};
pub use ops::grouped_swiglu::{
    Expert, ExpertActivation, ExpertBiases, ExpertPass, ExpertSlots, ExpertWeights, Experts, grouped_experts,
    grouped_swiglu,
};
pub use ops::head_linear::head_linear;
pub use ops::layer_norm::layer_norm;
pub use ops::linear::{linear, linear_f32};
pub use ops::mla_attention::{MlaSpec, mla_attention};
pub use ops::paged_attention::{GqaSpec, LearnedScores, PositionBias, Reach, paged_attention};
pub use ops::pointwise::{Pointwise, pointwise};
pub use ops::rms_norm::{rms_norm, rms_norm_residual};
pub use ops::rope::{RopeStyle, RopeTable, rope};
#[cfg(feature = "cuda")]
pub use ops::route::DeviceChoices;
pub use ops::route::{Choices, Chosen, GroupScore, Groups, RouterSpec, Scoring, TopK, choose, route};
pub use ops::sampling::{Choice, Draw, LogitRow, Penalties, ReadRow, read_logits};
pub use paged_batch::{BatchLists, PagedBatch};
pub use paged_cache::{KvFormat, PagedCache};
pub use quant::{Codes, GroupRow, QuantFormat};
pub use range_file::{FileStamp, RangeBytes, RangeFile, ReadMode};
pub use state_cache::StateCache;
pub use weight::{PackedWeight, WeightFormat};
