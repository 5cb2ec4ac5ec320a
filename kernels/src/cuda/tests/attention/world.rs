//! Attention of one case by the device code and by the CPU, over the same cache.

use emulator::Launch;
use half::bf16;

use super::super::{Number, ROW_THREADS, SEEDS, outputs_in, stored, widened};
use crate::cuda::address::Address;
use crate::ops::attention::arguments::{Batch, DeviceAttention, Learned, Partials};
use crate::ops::attention::plan::{Limits, Plan, Shape};
use crate::ops::attention::variant::{self, Kernel};
use crate::ops::attention::{self, Attention, HeadLayout};
use crate::ops::paged_attention::{LearnedScores, PositionBias, Reach};
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::paged_cache::{KvFormat, PagedCache};
use crate::testing::{Numbers, tensor};

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

/// The one for any types and sizes.
pub(super) fn plain<T: Number, Cache: Number>(case: &Case) -> Kernel {
    variant::plain([T::NAME, Cache::NAME], case.heads)
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
        let mut batch = BatchLists { cu_seqlens: vec![0], block_offsets: vec![0], ..BatchLists::default() };
        for chunk in chunks {
            batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + (chunk.end - chunk.first) as u32);
            batch.context_lens.push(chunk.end as u32);
            batch.source_lens.push(self.case.source_len as u32);
            let mut table = self.tables[chunk.seq].clone();
            table[..self.case.reach.start(chunk.first, self.case.source_len) / self.block_size]
                .fill(PagedBatch::NO_BLOCK);
            batch.block_tables.extend(table);
            batch.block_offsets.push(batch.block_tables.len() as u32);
        }
        batch.into()
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

    /// Splits are tasks of their own everywhere or nowhere.
    fn plan(&self, batch: &PagedBatch, pairs: usize, is_split: bool) -> Plan {
        let HeadLayout { num_heads, group_size, .. } = self.case.heads;
        let shape = Shape { num_heads, group_size, reach: self.case.reach, pairs: vec![pairs] };
        let limits = Limits { most_splits: if is_split { 0 } else { usize::MAX }, most_slots: usize::MAX };
        Plan::new(batch, &shape, limits)
    }

    pub(super) fn on_device(&self, kernel: &Kernel, chunks: &[Chunk]) -> Vec<T> {
        self.on_device_in(4, kernel, chunks, false)
    }

    /// In so many orders of threads, each split a task of its own or not.
    pub(super) fn on_device_in(&self, num_orders: usize, kernel: &Kernel, chunks: &[Chunk], is_split: bool) -> Vec<T> {
        let HeadLayout { num_heads, group_size, value_dim, .. } = self.case.heads;
        let (batch, queries) = (self.batch(chunks), self.queries(chunks));
        let plan = self.plan(&batch, kernel.pairs, is_split);
        let of = |numbers: &Vec<u32>| Address::of_host(numbers.as_ptr());
        let sinks = self.case.sinks.as_ref().map_or(Address::NULL, |sinks| Address::of_host(sinks.as_ptr()));
        let bias = self.case.bias.as_ref();
        let len = batch.cu_seqlens[chunks.len()] as usize * num_heads * value_dim;
        let [out] = outputs_in(&SEEDS[..num_orders], len, |seed, [out]: [*mut T; 1]| {
            // The output is not for tasks of one split.
            let mut untouched = vec![T::POISON; len];
            let mut sums = vec![[f32::NAN; 2]; plan.num_slots];
            let mut values = vec![f32::NAN; plan.num_slots * value_dim];
            let op = DeviceAttention {
                queries: queries.each_ref().map(|part| Address::of_host(part.as_ptr())),
                query_dims: self.case.query_dims.map(|dim| dim as u32),
                cache: Address::of_host(self.cache.as_ptr()),
                batch: Batch {
                    cu_seqlens: of(&batch.cu_seqlens),
                    context_lens: of(&batch.context_lens),
                    source_lens: of(&batch.source_lens),
                    block_tables: of(&batch.block_tables),
                    block_offsets: of(&batch.block_offsets),
                    block_size: self.block_size as u32,
                    width: self.case.width() as u32,
                },
                heads: self.case.heads.into(),
                reach: self.case.reach.into(),
                learned: Learned {
                    sinks,
                    position_bias: bias.map_or(Address::NULL, |bias| Address::of_host(bias.table.as_ptr())),
                    max_distance: bias.map_or(0, |bias| bias.max_distance as u32),
                },
                scale: self.scale(),
                tasks: Address::of_host(plan.tasks[0].as_ptr()),
                partials: Partials {
                    sums: Address::of_host(sums.as_mut_ptr()),
                    values: Address::of_host(values.as_mut_ptr()),
                },
                out: Address::of_host(if is_split { untouched.as_mut_ptr() } else { out }),
            };
            let shape = Launch {
                grid: [plan.tasks[0].len() as u32, (num_heads / group_size) as u32, 1],
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
                    grid: [plan.split_rows.len() as u32, num_heads as u32, 1],
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
