//! What the kernels of attention are called with: the structures of `attention.cuh` of the same names.

use super::HeadLayout;
use crate::cuda::address::Address;
use crate::ops::paged_attention::Reach;

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Heads {
    num_heads: u32,
    group_size: u32,
    key_start: u32,
    key_dim: u32,
    value_start: u32,
    value_dim: u32,
}

impl From<HeadLayout> for Heads {
    fn from(layout: HeadLayout) -> Self {
        let HeadLayout { num_heads, group_size, key_start, key_dim, value_start, value_dim } = layout;
        let [num_heads, group_size, key_start, key_dim, value_start, value_dim] =
            [num_heads, group_size, key_start, key_dim, value_start, value_dim].map(|number| number as u32);
        Self { num_heads, group_size, key_start, key_dim, value_start, value_dim }
    }
}

/// `struct Reach`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct DeviceReach {
    kind: u32,
    size: u32,
}

impl From<Reach> for DeviceReach {
    fn from(reach: Reach) -> Self {
        let (kind, size) = match reach {
            Reach::Full => (0, 0),
            Reach::Window(size) => (1, size),
            Reach::Chunk(size) => (2, size),
            Reach::Source => (3, 0),
        };
        // Positions are less.
        Self { kind, size: u32::try_from(size).unwrap_or(u32::MAX) }
    }
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Batch {
    pub(crate) cu_seqlens: Address,
    pub(crate) context_lens: Address,
    pub(crate) source_lens: Address,
    pub(crate) block_tables: Address,
    pub(crate) block_offsets: Address,
    pub(crate) block_size: u32,
    pub(crate) width: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Learned {
    pub(crate) sinks: Address,
    pub(crate) position_bias: Address,
    pub(crate) max_distance: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct Partials {
    pub(crate) sums: Address,
    pub(crate) values: Address,
}

/// `struct Attention`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(crate) struct DeviceAttention {
    pub(crate) queries: [Address; 2],
    pub(crate) query_dims: [u32; 2],
    pub(crate) cache: Address,
    pub(crate) batch: Batch,
    pub(crate) heads: Heads,
    pub(crate) reach: DeviceReach,
    pub(crate) learned: Learned,
    pub(crate) scale: f32,
    pub(crate) tasks: Address,
    pub(crate) partials: Partials,
    pub(crate) out: Address,
}
