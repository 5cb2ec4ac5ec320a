//! What the kernels of sampling are called with: the structures of the `.cu` files of the same names.

use crate::cuda::address::Address;

/// `VOCAB_THREADS` of `sampling.cuh`.
pub(crate) const VOCAB_THREADS: usize = 512;
/// No token, no mask.
pub(crate) const NONE: u32 = u32::MAX;

#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct SampleRow {
    pub(crate) row: u32,
    pub(crate) top_k: u32,
    pub(crate) temperature: f32,
    pub(crate) top_p: f32,
    pub(crate) min_p: f32,
    pub(crate) is_adjusted: u32,
    pub(crate) uniform: f64,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Adjustment {
    pub(crate) row: u32,
    pub(crate) mask: u32,
    /// First and number of biases, forbidden tokens, tokens that were seen.
    pub(crate) parts: [[u32; 2]; 3],
    /// For repetition, frequency and presence.
    pub(crate) penalties: [f32; 3],
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct AdjustmentLists {
    pub(crate) bias_tokens: Address,
    pub(crate) biases: Address,
    pub(crate) forbidden: Address,
    pub(crate) seen: Address,
    pub(crate) output_counts: Address,
    pub(crate) masks: Address,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct LogprobRow {
    pub(crate) row: u32,
    pub(crate) num_top: u32,
}
