//! The kernels of attention on a CUDA device, and which of them are for what.

use super::HeadLayout;
use crate::cuda::ROW_THREADS;

/// Of any types and sizes.
const PLAIN_PAIRS: usize = 8;
/// Shared memory that kernels on tensor cores have beside what a launch gives them, at most.
const OWN_SHARED_BYTES: usize = 4 << 10;

/// One of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    /// Pairs of a task.
    pub(crate) pairs: usize,
    pub(crate) threads: usize,
    pub(crate) shared_bytes: usize,
}

/// What a choice follows from; not the rows, so that they have the same bits in any company.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Operands {
    /// What kernels call the types of activations and of the cache.
    pub(crate) types: [&'static str; 2],
    pub(crate) heads: HeadLayout,
    /// Of parts of the queries.
    pub(crate) query_dims: [usize; 2],
    /// Elements of a row of the cache.
    pub(crate) width: usize,
    /// Of a block of the device.
    pub(crate) most_shared_bytes: usize,
}

/// Those that the tasks of a batch are for, by the pairs of a task: on tensor cores where these can.
pub(crate) fn choose(operands: &Operands) -> Vec<Kernel> {
    let Operands { types, heads, query_dims, width, most_shared_bytes } = *operands;
    let HeadLayout { key_start, key_dim, value_start, value_dim, .. } = heads;
    let sizes = [key_start, key_dim, value_start, value_dim, width, query_dims[0], query_dims[1]];
    if types == ["bf16"; 2] && value_dim <= 512 && sizes.iter().all(|size| size.is_multiple_of(8)) {
        let kernels = on_tensor_cores(heads);
        if kernels.iter().all(|kernel| kernel.shared_bytes + OWN_SHARED_BYTES <= most_shared_bytes) {
            return kernels.into();
        }
    }
    vec![plain(types, heads)]
}

/// The one for any types and sizes.
pub(crate) fn plain([activations, cache]: [&str; 2], heads: HeadLayout) -> Kernel {
    let shared_bytes = 4 * PLAIN_PAIRS * (heads.key_dim + 2 * heads.value_dim);
    let name = format!("attention_{activations}_{cache}");
    Kernel { name, pairs: PLAIN_PAIRS, threads: ROW_THREADS, shared_bytes }
}

/// Those on tensor cores: for few pairs and for many, with the same bits. Values have 512 elements at most.
pub(crate) fn on_tensor_cores(heads: HeadLayout) -> [Kernel; 2] {
    let HeadLayout { num_heads, group_size, key_start, key_dim, value_start, value_dim } = heads;
    let (most, sizes, tile) = match value_dim {
        0..=128 => (128, [(16, 4), (64, 8)], 64),
        129..=256 => (256, [(16, 4), (64, 8)], 64),
        _ => (512, [(16, 4), (32, 8)], 32),
    };
    let stride = |dim: usize| dim.next_multiple_of(16) + 8;
    let values_are_keys = group_size == num_heads
        && (key_start..=key_start + key_dim).contains(&value_start)
        && value_start + value_dim <= key_start + key_dim;
    let value_stride = if values_are_keys { 0 } else { stride(value_dim) };
    sizes.map(|(pairs, num_warps)| Kernel {
        name: format!("attention_mma_{pairs}_{most}"),
        pairs,
        threads: 32 * num_warps,
        shared_bytes: 2 * ((pairs + tile) * stride(key_dim) + tile * value_stride) + 4 * pairs * (tile + 4),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grouped(num_kv_heads: usize, head_dim: usize) -> Operands {
        let heads = HeadLayout {
            num_heads: 8,
            group_size: 8 / num_kv_heads,
            key_start: 0,
            key_dim: head_dim,
            value_start: num_kv_heads * head_dim,
            value_dim: head_dim,
        };
        let (types, width) = (["bf16"; 2], 2 * num_kv_heads * head_dim);
        Operands { types, heads, query_dims: [head_dim, 0], width, most_shared_bytes: 227 << 10 }
    }

    #[track_caller]
    fn check(operands: &Operands, names: &[&str]) {
        assert_eq!(choose(operands).iter().map(|kernel| &*kernel.name).collect::<Vec<_>>(), names);
    }

    #[test]
    fn tensor_cores_take_what_they_can() {
        check(&grouped(2, 128), &["attention_mma_16_128", "attention_mma_64_128"]);
        check(&grouped(2, 256), &["attention_mma_16_256", "attention_mma_64_256"]);
        check(&grouped(1, 24), &["attention_mma_16_128", "attention_mma_64_128"]);
        check(&grouped(1, 20), &["attention_bf16_bf16"]);
        check(&Operands { types: ["bf16", "float"], ..grouped(2, 128) }, &["attention_bf16_float"]);
        check(&Operands { types: ["float", "bf16"], ..grouped(2, 128) }, &["attention_float_bf16"]);
        check(&Operands { query_dims: [60, 68], ..grouped(2, 128) }, &["attention_bf16_bf16"]);
        check(&Operands { width: 516, ..grouped(2, 128) }, &["attention_bf16_bf16"]);
        check(&grouped(1, 520), &["attention_bf16_bf16"]);
        // One of the two has no room.
        check(&Operands { most_shared_bytes: 99 << 10, ..grouped(2, 256) }, &["attention_bf16_bf16"]);
    }

    /// One latent row is key and value.
    #[test]
    fn values_that_are_keys_take_no_room() {
        let heads =
            HeadLayout { num_heads: 8, group_size: 8, key_start: 0, key_dim: 576, value_start: 0, value_dim: 512 };
        let latent = Operands { heads, query_dims: [512, 64], width: 576, ..grouped(1, 128) };
        check(&latent, &["attention_mma_16_512", "attention_mma_32_512"]);
        let [few, many] = on_tensor_cores(heads);
        assert_eq!(few.shared_bytes, 2 * (16 + 32) * 584 + 4 * 16 * 36);
        assert_eq!((many.pairs, many.threads), (32, 256));
        let apart = HeadLayout { value_start: 576, ..heads };
        assert_eq!(on_tensor_cores(apart)[0].shared_bytes - few.shared_bytes, 2 * 32 * 520);
    }
}
