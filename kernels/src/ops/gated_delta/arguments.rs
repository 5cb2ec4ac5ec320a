//! What the kernels are called with: the structures of `gated_delta.cu`.

use super::DeltaSpec;
use crate::cuda::address::Address;

/// `CONV_ROWS` and `COLUMNS` of `gated_delta.cu`.
pub(crate) const CONV_ROWS: usize = 32;
pub(crate) const COLUMNS: usize = 32;

/// `struct Delta`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Delta {
    num_key_heads: u32,
    num_value_heads: u32,
    key_dim: u32,
    value_dim: u32,
    conv_kernel: u32,
    activation: u32,
}

impl From<DeltaSpec> for Delta {
    fn from(spec: DeltaSpec) -> Self {
        let DeltaSpec { num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel, activation } = spec;
        let [num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel] =
            [num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel].map(|size| size as u32);
        Self { num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel, activation: activation as u32 }
    }
}

/// `struct Sequences`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Sequences {
    pub(crate) cu_seqlens: Address,
    pub(crate) context_lens: Address,
    pub(crate) source_lens: Address,
    pub(crate) state_slots: Address,
    pub(crate) num_seqs: u32,
}

/// The kernel of the recurrence without its type, and threads of a block of it. None for keys that are too wide.
pub(crate) fn recurrence(key_dim: usize) -> Option<(&'static str, usize)> {
    match key_dim {
        0..=128 => Some(("gated_delta_128", 4 * COLUMNS)),
        129..=256 => Some(("gated_delta_256", 8 * COLUMNS)),
        _ => None,
    }
}
