//! Attention on a CUDA device: a block for each task of the plan and key-value head, then what was split is joined.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;
use candle_core::cuda_backend::cudarc::driver::sys::CUdevice_attribute;
use candle_core::{CudaStorage, Layout, bail};

use super::HeadLayout;
use super::arguments::{Batch, DeviceAttention, Learned, Partials};
use super::plan::{Limits, Plan, Shape, SplitRow, Task, fair_splits};
use super::variant::{Kernel, Operands, choose};
use crate::cuda::ROW_THREADS;
use crate::cuda::batch::DevicePlan;
use crate::cuda::device::{Argument, Launch, attribute, launch, most_shared_bytes};
use crate::cuda::kept::{Copied, upload_kept};
use crate::cuda::memory::{Address, aligned_activations, name_of, output, scratch, upload};
use crate::ops::paged_attention::{LearnedScores, Reach};
use crate::paged_batch::PagedBatch;
use crate::paged_cache::PagedCache;

/// Blocks that a multiprocessor is to have at a time, before contexts are left in one piece.
const BLOCKS_OF_MULTIPROCESSOR: usize = 2;
/// Memory for the sums of splits.
pub(crate) const MOST_PARTIAL_BYTES: usize = 512 << 20;

// SAFETY: numbers and addresses without padding that a kernel would read.
unsafe impl DeviceRepr for DeviceAttention {}
// SAFETY: an address each.
unsafe impl DeviceRepr for Partials {}
// SAFETY: numbers.
unsafe impl DeviceRepr for Task {}
// SAFETY: numbers.
unsafe impl DeviceRepr for SplitRow {}

/// Checked inputs of one call: those of [`super::Attention`].
pub(crate) struct Call<'a> {
    /// Parts of a query, one or two: `[num_tokens, num_heads, dim]` and `dim`.
    pub(crate) q: &'a [(&'a CudaStorage, &'a Layout, usize)],
    pub(crate) cache: &'a PagedCache,
    pub(crate) batch: &'a PagedBatch,
    pub(crate) heads: HeadLayout,
    pub(crate) scale: f32,
    pub(crate) reach: Reach,
    pub(crate) learned: LearnedScores<'a>,
}

/// `[num_tokens, num_heads, value_dim]` of the type of the queries.
pub(crate) fn forward(call: &Call<'_>) -> candle_core::Result<CudaStorage> {
    let Call { q, cache, batch, heads, scale, reach, learned } = *call;
    let (device, dtype) = (q[0].0.device(), q[0].0.dtype());
    let kernels = choose(&call.operands()?);
    let on_device = batch.on_device(device)?;
    let shape = Shape {
        num_heads: heads.num_heads,
        group_size: heads.group_size,
        reach,
        pairs: kernels.iter().map(|kernel| kernel.pairs).collect(),
    };
    let plan = on_device.plan(shape, |shape| planned(device, batch, shape, heads.value_dim))?;

    // What is allocated here lives until the launches, behind which it is given back.
    let num_tokens = batch.cu_seqlens[batch.num_seqs()] as usize;
    let (out, target) = output(device, dtype, num_tokens * heads.num_heads * heads.value_dim)?;
    let sums = scratch::<[f32; 2]>(device, plan.num_slots)?;
    let values = scratch::<f32>(device, plan.num_slots * heads.value_dim)?;
    let (_learned, learned) = learned_on_device(device, learned)?;
    let (_copies, queries, query_dims) = call.queries()?;
    let op = DeviceAttention {
        queries,
        query_dims,
        cache: cache.address()?,
        batch: Batch {
            cu_seqlens: on_device.cu_seqlens,
            context_lens: on_device.context_lens,
            source_lens: on_device.source_lens,
            block_tables: on_device.block_tables,
            block_offsets: on_device.block_offsets,
            block_size: cache.block_size() as u32,
            width: cache.width() as u32,
        },
        heads: heads.into(),
        reach: reach.into(),
        learned,
        scale,
        tasks: Address::NULL,
        partials: Partials { sums: Address::of(&sums), values: Address::of(&values) },
        out: target,
    };
    for (Kernel { name, threads, shared_bytes, .. }, (tasks, num_tasks)) in kernels.iter().zip(&plan.tasks) {
        let grid = [*num_tasks, heads.num_heads / heads.group_size, 1];
        let launched = Launch { grid, threads: *threads, shared_bytes: *shared_bytes };
        let op = DeviceAttention { tasks: Address::of(tasks), ..op };
        // SAFETY: the argument of the kernel; the batch was checked to fit the cache and the queries, and has its plan.
        unsafe { launch(device, name, launched, &[&op]) }?;
    }
    let (rows, num_rows) = &plan.split_rows;
    let merged = Launch { grid: [*num_rows, heads.num_heads, 1], threads: ROW_THREADS, shared_bytes: 0 };
    let (kernel, rows) = (format!("attention_merge_{}", name_of(dtype)?), Address::of(rows));
    let (num_heads, value_dim) = (heads.num_heads as i32, heads.value_dim as i32);
    let arguments: [&dyn Argument; 6] = [&rows, &op.partials, &learned.sinks, &target, &num_heads, &value_dim];
    // SAFETY: the arguments of the kernel; the tasks of the plan have written all that it merges.
    unsafe { launch(device, &kernel, merged, &arguments) }?;
    Ok(out)
}

impl Call<'_> {
    fn operands(&self) -> candle_core::Result<Operands> {
        Ok(Operands {
            types: [name_of(self.q[0].0.dtype())?, name_of(self.cache.format().dtype())?],
            heads: self.heads,
            query_dims: [self.q[0].2, self.q.get(1).map_or(0, |part| part.2)],
            width: self.cache.width(),
            most_shared_bytes: most_shared_bytes(self.q[0].0.device())?,
        })
    }

    /// Where the parts of the queries are, with copies of those that begin where no kernel takes them, and their sizes.
    fn queries(&self) -> candle_core::Result<(Vec<CudaStorage>, [Address; 2], [u32; 2])> {
        let (mut copies, mut queries, mut query_dims) = (Vec::new(), [Address::NULL; 2], [0; 2]);
        for (idx, &(storage, layout, dim)) in self.q.iter().enumerate() {
            if storage.dtype() != self.q[0].0.dtype() {
                bail!("parts of a query are of one type");
            }
            let (address, copy) = aligned_activations((storage, layout))?;
            (queries[idx], query_dims[idx]) = (address, dim as u32);
            copies.extend(copy);
        }
        Ok((copies, queries, query_dims))
    }
}

fn planned(
    device: &CudaDevice,
    batch: &PagedBatch,
    shape: &Shape,
    value_dim: usize,
) -> candle_core::Result<DevicePlan> {
    let num_multiprocessors = attribute(device, CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
    let num_blocks = BLOCKS_OF_MULTIPROCESSOR * num_multiprocessors;
    let slot_bytes = (2 + value_dim) * size_of::<f32>();
    let limits =
        Limits { most_splits: fair_splits(batch, shape, num_blocks), most_slots: MOST_PARTIAL_BYTES / slot_bytes };
    let Plan { tasks, split_rows, num_slots } = Plan::new(batch, shape, limits);
    let tasks = tasks.iter().map(|tasks| Ok((upload(device, tasks)?, tasks.len())));
    Ok(DevicePlan {
        tasks: tasks.collect::<candle_core::Result<_>>()?,
        split_rows: (upload(device, &split_rows)?, split_rows.len()),
        num_slots,
    })
}

/// Learned scores, and the memory that they are in.
fn learned_on_device(
    device: &CudaDevice,
    learned: LearnedScores<'_>,
) -> candle_core::Result<(Option<Copied>, Learned)> {
    let LearnedScores { sinks, position_bias } = learned;
    let mut found = Learned { sinks: Address::NULL, position_bias: Address::NULL, max_distance: 0 };
    if sinks.is_none() && position_bias.is_none() {
        return Ok((None, found));
    }
    let sinks = sinks.unwrap_or_default();
    let table = position_bias.map_or(&[][..], |bias| &bias.table);
    let memory = upload_kept(device, &[sinks, table].concat())?;
    if !sinks.is_empty() {
        found.sinks = memory.start();
    }
    if let Some(bias) = position_bias {
        found.position_bias = memory.start().plus(size_of_val(sinks));
        found.max_distance = bias.max_distance as u32;
    }
    Ok((Some(memory), found))
}
