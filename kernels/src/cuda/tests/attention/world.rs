//! Attention of one case by the device code and by the CPU, over the same cache.

use std::ops::Range;
use std::ptr;

use emulator::Launch;
use half::bf16;

use super::super::{Number, ROW_THREADS, SEEDS, outputs_in, stored, widened};
use crate::ops::attention::{self, Attention, HeadLayout};
use crate::ops::paged_attention::{LearnedScores, PositionBias, Reach};
use crate::paged_cache::{KvFormat, PagedBatch, PagedCache};
use crate::testing::{Numbers, tensor};

/// `SPLIT` of `attention.cuh`.
pub(super) const SPLIT: usize = 512;
const NONE: u32 = u32::MAX;

/// `struct Heads` of `attention.cuh`; the structures below are those of the same names.
#[derive(Clone, Copy)]
#[repr(C)]
struct Heads {
    num_heads: u32,
    group_size: u32,
    key_start: u32,
    key_dim: u32,
    value_start: u32,
    value_dim: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct DeviceReach {
    kind: u32,
    size: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Batch {
    cu_seqlens: *const u32,
    context_lens: *const u32,
    source_lens: *const u32,
    block_tables: *const u32,
    block_offsets: *const u32,
    block_size: u32,
    width: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Learned {
    sinks: *const f32,
    position_bias: *const f32,
    max_distance: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Task {
    seq_idx: u32,
    first_pair: u32,
    first_split: u32,
    end_split: u32,
    slot: u32,
    row_slots: u32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct Partials {
    sums: *mut [f32; 2],
    values: *mut f32,
}

#[derive(Clone, Copy)]
#[repr(C)]
struct DeviceAttention<T, Cache> {
    queries: [*const T; 2],
    query_dims: [u32; 2],
    cache: *const Cache,
    batch: Batch,
    heads: Heads,
    reach: DeviceReach,
    learned: Learned,
    scale: f32,
    tasks: *const Task,
    partials: Partials,
    out: *mut T,
}

/// `struct SplitRow` of `attention_merge.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct SplitRow {
    row: u32,
    slot: u32,
    num_splits: u32,
}

/// What a cache is stored as.
pub(super) trait Stored: Number {
    const FORMAT: KvFormat;
}

impl Stored for f32 {
    const FORMAT: KvFormat = KvFormat::F32;
}

impl Stored for bf16 {
    const FORMAT: KvFormat = KvFormat::Bf16;
}

/// The heads of a model, and what they see.
#[derive(Clone, Debug)]
pub(super) struct Case {
    pub(super) heads: HeadLayout,
    pub(super) query_dims: [usize; 2],
    pub(super) reach: Reach,
    pub(super) source_len: usize,
    pub(super) sinks: Option<Vec<f32>>,
    pub(super) bias: Option<PositionBias>,
}

impl Case {
    pub(super) fn grouped([num_heads, num_kv_heads, head_dim]: [usize; 3], reach: Reach) -> Self {
        let heads = HeadLayout {
            num_heads,
            group_size: num_heads / num_kv_heads,
            key_start: 0,
            key_dim: head_dim,
            value_start: num_kv_heads * head_dim,
            value_dim: head_dim,
        };
        Self { heads, query_dims: [head_dim, 0], reach, source_len: 0, sinks: None, bias: None }
    }

    pub(super) fn latent([num_heads, latent_dim, rope_dim]: [usize; 3]) -> Self {
        let heads = HeadLayout {
            num_heads,
            group_size: num_heads,
            key_start: 0,
            key_dim: latent_dim + rope_dim,
            value_start: 0,
            value_dim: latent_dim,
        };
        let query_dims = [latent_dim, rope_dim];
        Self { heads, query_dims, reach: Reach::Full, source_len: 0, sinks: None, bias: None }
    }

    /// With sinks, and a bias that reaches further than some contexts and less far than others.
    pub(super) fn learned(self, numbers: &mut Numbers) -> Self {
        let (num_heads, max_distance) = (self.heads.num_heads, 11);
        let table = numbers.normal(num_heads * (2 * max_distance + 1));
        let (sinks, bias) = (Some(numbers.normal(num_heads)), Some(PositionBias { table, max_distance }));
        Self { sinks, bias, ..self }
    }

    pub(super) fn num_kv_heads(&self) -> usize {
        self.heads.num_heads / self.heads.group_size
    }

    pub(super) fn width(&self) -> usize {
        let HeadLayout { key_start, key_dim, value_start, value_dim, .. } = self.heads;
        (key_start + self.num_kv_heads() * key_dim).max(value_start + self.num_kv_heads() * value_dim)
    }

    fn visible(&self, position: usize) -> Range<usize> {
        let end = if self.reach == Reach::Source { self.source_len } else { position + 1 };
        self.reach.start(position, self.source_len)..end
    }
}

/// Queries and cache rows of some sequences.
pub(super) struct Rows {
    pub(super) lens: Vec<usize>,
    pub(super) queries: Vec<[Vec<f32>; 2]>,
    pub(super) cached: Vec<Vec<f32>>,
}

impl Rows {
    pub(super) fn new(numbers: &mut Numbers, case: &Case, lens: &[usize]) -> Self {
        let queries =
            lens.iter().map(|len| case.query_dims.map(|dim| numbers.normal(len * case.heads.num_heads * dim)));
        let queries = queries.collect();
        Self {
            lens: lens.to_vec(),
            queries,
            cached: lens.iter().map(|len| numbers.normal(len * case.width())).collect(),
        }
    }
}

/// The rows `first..end` of sequence `seq`.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub(super) seq: usize,
    pub(super) first: usize,
    pub(super) end: usize,
}

/// Sequences over a cache whose blocks are handed out in a scattered order, on the device and on the CPU.
pub(super) struct World<'a, T, Cache> {
    case: &'a Case,
    queries: Vec<[Vec<T>; 2]>,
    block_size: usize,
    tables: Vec<Vec<u32>>,
    /// A NaN where no position is.
    cache: Vec<Cache>,
    cpu_cache: PagedCache,
}

/// A kernel of attention.
pub(super) struct Kernel {
    pub(super) name: String,
    /// Pairs of a task.
    pairs: usize,
    threads: usize,
    shared_bytes: usize,
}

/// The one for any types and sizes.
pub(super) fn plain<T: Number, Cache: Number>(case: &Case) -> Kernel {
    let pairs = 8;
    let shared_bytes = 4 * pairs * (case.heads.key_dim + 2 * case.heads.value_dim);
    Kernel { name: format!("attention_{}_{}", T::NAME, Cache::NAME), pairs, threads: ROW_THREADS, shared_bytes }
}

/// Those on tensor cores: for few pairs and for many.
pub(super) fn on_tensor_cores(case: &Case) -> [Kernel; 2] {
    let HeadLayout { num_heads, group_size, key_start, key_dim, value_start, value_dim } = case.heads;
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

/// How a batch becomes tasks.
#[derive(Default)]
struct Plan {
    tasks: Vec<Task>,
    split_rows: Vec<SplitRow>,
    num_slots: usize,
}

impl<'a, T: Number, Cache: Stored> World<'a, T, Cache> {
    pub(super) fn new(case: &'a Case, rows: &Rows, block_size: usize) -> Self {
        let width = case.width();
        let num_blocks: Vec<usize> = rows.lens.iter().map(|len| len.div_ceil(block_size)).collect();
        let all = num_blocks.iter().sum::<usize>() + 1;
        let mut free: Vec<u32> = (0..all as u32).collect();
        free.sort_by_key(|block| block.wrapping_mul(2_654_435_761));
        let tables: Vec<Vec<u32>> = num_blocks.iter().map(|&num| free.drain(..num).collect()).collect();
        let mut cache = vec![Cache::POISON; all * block_size * width];
        let mut cpu_cache = PagedCache::new(Cache::FORMAT, block_size, width, all).unwrap();
        cpu_cache.add_slab().unwrap();
        for (cached, table) in rows.cached.iter().zip(&tables) {
            let slot = |i: usize| table[i / block_size] as usize * block_size + i % block_size;
            for (i, row) in cached.chunks(width).enumerate() {
                cache[slot(i) * width..][..width].copy_from_slice(&stored::<Cache>(row));
            }
            let slots: Vec<u32> = (0..cached.len() / width).map(|i| slot(i) as u32).collect();
            cpu_cache.write(&tensor(cached, &[slots.len(), width]), &slots).unwrap();
        }
        let queries = rows.queries.iter().map(|parts| parts.each_ref().map(|part| stored(part))).collect();
        Self { case, queries, block_size, tables, cache, cpu_cache }
    }

    /// Blocks that no row reaches are not there.
    fn batch(&self, chunks: &[Chunk]) -> PagedBatch {
        let mut batch = PagedBatch { cu_seqlens: vec![0], block_offsets: vec![0], ..PagedBatch::default() };
        for chunk in chunks {
            batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + (chunk.end - chunk.first) as u32);
            batch.context_lens.push(chunk.end as u32);
            batch.source_lens.push(self.case.source_len as u32);
            let mut table = self.tables[chunk.seq].clone();
            table[..self.case.visible(chunk.first).start / self.block_size].fill(PagedBatch::NO_BLOCK);
            batch.block_tables.extend(table);
            batch.block_offsets.push(batch.block_tables.len() as u32);
        }
        batch
    }

    fn queries(&self, chunks: &[Chunk]) -> [Vec<T>; 2] {
        [0, 1].map(|part| {
            let len = self.case.heads.num_heads * self.case.query_dims[part];
            let of_chunk = |chunk: &Chunk| &self.queries[chunk.seq][part][chunk.first * len..chunk.end * len];
            chunks.iter().flat_map(of_chunk).copied().collect()
        })
    }

    fn scale(&self) -> f32 {
        1.0 / (self.case.heads.key_dim as f32).sqrt()
    }

    pub(super) fn on_cpu(&self, chunks: &[Chunk]) -> Vec<f32> {
        let Case { heads, reach, query_dims, .. } = *self.case;
        let queries = self.queries(chunks).map(|part| widened(&part));
        let q = [(queries[0].as_slice(), query_dims[0]), (queries[1].as_slice(), query_dims[1])];
        let learned = LearnedScores { sinks: self.case.sinks.as_deref(), position_bias: self.case.bias.as_ref() };
        let (cache, batch, scale) = (&self.cpu_cache, &self.batch(chunks), self.scale());
        attention::forward(&Attention { q: &q, cache, batch, heads, scale, reach, learned })
    }

    fn plan(&self, chunks: &[Chunk], pairs: usize, is_split: bool) -> Plan {
        let HeadLayout { num_heads, group_size, .. } = self.case.heads;
        let (mut plan, mut row) = (Plan::default(), 0);
        let splits_of = |seen: Range<usize>| seen.start / SPLIT..seen.end.div_ceil(SPLIT);
        for (seq_idx, chunk) in chunks.iter().enumerate() {
            let last = self.case.visible(chunk.end - 1);
            let splits = splits_of(self.case.visible(chunk.first).start..last.end);
            let (first_slot, row_slots) = (plan.num_slots, splits.len() * num_heads);
            for first_pair in (0..(chunk.end - chunk.first) * group_size).step_by(pairs) {
                let (seq_idx, first_pair, row_slots) = (seq_idx as u32, first_pair as u32, row_slots as u32);
                let task = |splits: Range<usize>, slot| Task {
                    seq_idx,
                    first_pair,
                    first_split: splits.start as u32,
                    end_split: splits.end as u32,
                    slot,
                    row_slots,
                };
                if is_split {
                    let slot = |split| (first_slot + (split - splits.start) * num_heads) as u32;
                    plan.tasks.extend(splits.clone().map(|split| task(split..split + 1, slot(split))));
                } else {
                    plan.tasks.push(task(splits.clone(), NONE));
                }
            }
            for position in chunk.first..chunk.end {
                let own = splits_of(self.case.visible(position));
                let before = (position - chunk.first) * row_slots + (own.start - splits.start) * num_heads;
                let (slot, num_splits) = ((first_slot + before) as u32, own.len() as u32);
                plan.split_rows.push(SplitRow { row, slot, num_splits });
                row += 1;
            }
            plan.num_slots += (chunk.end - chunk.first) * row_slots;
        }
        plan
    }

    pub(super) fn on_device(&self, kernel: &Kernel, chunks: &[Chunk]) -> Vec<T> {
        self.on_device_in(4, kernel, chunks, false)
    }

    /// In so many orders of threads, each split a task of its own or not.
    pub(super) fn on_device_in(&self, num_orders: usize, kernel: &Kernel, chunks: &[Chunk], is_split: bool) -> Vec<T> {
        let HeadLayout { num_heads, group_size, key_start, key_dim, value_start, value_dim } = self.case.heads;
        let [num_heads, group_size, key_start, key_dim, value_start, value_dim] =
            [num_heads, group_size, key_start, key_dim, value_start, value_dim].map(|number| number as u32);
        let (batch, queries) = (self.batch(chunks), self.queries(chunks));
        let plan = self.plan(chunks, kernel.pairs, is_split);
        let (kind, size) = match self.case.reach {
            Reach::Full => (0, 0),
            Reach::Window(size) => (1, size),
            Reach::Chunk(size) => (2, size),
            Reach::Source => (3, 0),
        };
        let sinks = self.case.sinks.as_ref().map_or(ptr::null(), |sinks| sinks.as_ptr());
        let len = plan.split_rows.len() * self.case.heads.num_heads * self.case.heads.value_dim;
        let [out] = outputs_in(&SEEDS[..num_orders], len, |seed, [out]: [*mut T; 1]| {
            // The output is not for tasks of one split.
            let mut untouched = vec![T::POISON; len];
            let mut sums = vec![[f32::NAN; 2]; plan.num_slots];
            let mut values = vec![f32::NAN; plan.num_slots * self.case.heads.value_dim];
            let op = DeviceAttention {
                queries: queries.each_ref().map(|part| part.as_ptr()),
                query_dims: self.case.query_dims.map(|dim| dim as u32),
                cache: self.cache.as_ptr(),
                batch: Batch {
                    cu_seqlens: batch.cu_seqlens.as_ptr(),
                    context_lens: batch.context_lens.as_ptr(),
                    source_lens: batch.source_lens.as_ptr(),
                    block_tables: batch.block_tables.as_ptr(),
                    block_offsets: batch.block_offsets.as_ptr(),
                    block_size: self.block_size as u32,
                    width: self.case.width() as u32,
                },
                heads: Heads { num_heads, group_size, key_start, key_dim, value_start, value_dim },
                reach: DeviceReach { kind, size: size as u32 },
                learned: Learned {
                    sinks,
                    position_bias: self.case.bias.as_ref().map_or(ptr::null(), |bias| bias.table.as_ptr()),
                    max_distance: self.case.bias.as_ref().map_or(0, |bias| bias.max_distance as u32),
                },
                scale: self.scale(),
                tasks: plan.tasks.as_ptr(),
                partials: Partials { sums: sums.as_mut_ptr(), values: values.as_mut_ptr() },
                out: if is_split { untouched.as_mut_ptr() } else { out },
            };
            let shape = Launch {
                grid: [plan.tasks.len() as u32, num_heads / group_size, 1],
                block: [kernel.threads as u32, 1, 1],
                shared_bytes: kernel.shared_bytes,
                seed,
            };
            // SAFETY: the argument of the kernel; the batch fits the cache, the tasks the batch.
            unsafe { emulator::launch(&kernel.name, shape, &[&op]) }.unwrap();
            if is_split {
                assert!(untouched.iter().all(|value| value.bits() == T::POISON.bits()), "{}", kernel.name);
                let merge = format!("attention_merge_{}", T::NAME);
                let shape = Launch {
                    grid: [plan.split_rows.len() as u32, num_heads, 1],
                    block: [ROW_THREADS as u32, 1, 1],
                    shared_bytes: 0,
                    seed,
                };
                let (num_heads, value_dim) = (num_heads as i32, value_dim as i32);
                // SAFETY: the arguments of the kernel; what it merges was written just now.
                let done = unsafe {
                    let rows = plan.split_rows.as_ptr();
                    emulator::launch(&merge, shape, &[&rows, &op.partials, &sinks, &out, &num_heads, &value_dim])
                };
                done.unwrap();
            }
        });
        out
    }
}
