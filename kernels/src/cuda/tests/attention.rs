//! Attention over the paged cache: parity with the CPU, and the same bits however a batch is cut.

use std::ops::Range;
use std::ptr;

use emulator::Launch;
use half::bf16;

use super::{Number, ROW_THREADS, assert_rounded, bits, outputs_in, stored, tolerance, widened};
use crate::ops::attention::{self, Attention, HeadLayout};
use crate::ops::paged_attention::{LearnedScores, PositionBias, Reach};
use crate::paged_cache::{KvFormat, PagedBatch, PagedCache};
use crate::testing::{Numbers, assert_close, tensor};

/// `SPLIT` of `attention.cuh`.
const SPLIT: usize = 512;
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
trait Stored: Number {
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
struct Case {
    heads: HeadLayout,
    query_dims: [usize; 2],
    reach: Reach,
    source_len: usize,
    sinks: Option<Vec<f32>>,
    bias: Option<PositionBias>,
}

impl Case {
    fn grouped([num_heads, num_kv_heads, head_dim]: [usize; 3], reach: Reach) -> Self {
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

    fn latent([num_heads, latent_dim, rope_dim]: [usize; 3]) -> Self {
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
    fn learned(self, numbers: &mut Numbers) -> Self {
        let (num_heads, max_distance) = (self.heads.num_heads, 11);
        let table = numbers.normal(num_heads * (2 * max_distance + 1));
        let (sinks, bias) = (Some(numbers.normal(num_heads)), Some(PositionBias { table, max_distance }));
        Self { sinks, bias, ..self }
    }

    fn num_kv_heads(&self) -> usize {
        self.heads.num_heads / self.heads.group_size
    }

    fn width(&self) -> usize {
        let HeadLayout { key_start, key_dim, value_start, value_dim, .. } = self.heads;
        (key_start + self.num_kv_heads() * key_dim).max(value_start + self.num_kv_heads() * value_dim)
    }

    fn visible(&self, position: usize) -> Range<usize> {
        let end = if self.reach == Reach::Source { self.source_len } else { position + 1 };
        self.reach.start(position, self.source_len)..end
    }
}

/// Queries and cache rows of some sequences.
struct Rows {
    lens: Vec<usize>,
    queries: Vec<[Vec<f32>; 2]>,
    cached: Vec<Vec<f32>>,
}

impl Rows {
    fn new(numbers: &mut Numbers, case: &Case, lens: &[usize]) -> Self {
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
struct Chunk {
    seq: usize,
    first: usize,
    end: usize,
}

/// Sequences over a cache whose blocks are handed out in a scattered order, on the device and on the CPU.
struct World<'a, T, Cache> {
    case: &'a Case,
    queries: Vec<[Vec<T>; 2]>,
    block_size: usize,
    tables: Vec<Vec<u32>>,
    /// A NaN where no position is.
    cache: Vec<Cache>,
    cpu_cache: PagedCache,
}

/// A kernel of attention.
struct Kernel {
    name: String,
    /// Pairs of a task.
    pairs: usize,
    threads: usize,
    shared_bytes: usize,
}

/// The one for any types and sizes.
fn plain<T: Number, Cache: Number>(case: &Case) -> Kernel {
    let pairs = 8;
    let shared_bytes = 4 * pairs * (case.heads.key_dim + 2 * case.heads.value_dim);
    Kernel { name: format!("attention_{}_{}", T::NAME, Cache::NAME), pairs, threads: ROW_THREADS, shared_bytes }
}

/// Those on tensor cores: for few pairs and for many.
fn on_tensor_cores(case: &Case) -> [Kernel; 2] {
    let HeadLayout { num_heads, group_size, key_start, key_dim, value_start, value_dim } = case.heads;
    let (most, sizes, tile) = match value_dim {
        ..=128 => (128, [(16, 4), (64, 8)], 64),
        ..=256 => (256, [(16, 4), (64, 8)], 64),
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
    fn new(case: &'a Case, rows: &Rows, block_size: usize) -> Self {
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

    fn on_cpu(&self, chunks: &[Chunk]) -> Vec<f32> {
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

    fn on_device(&self, kernel: &Kernel, chunks: &[Chunk]) -> Vec<T> {
        self.on_device_in(4, kernel, chunks, false)
    }

    /// In so many orders of threads, each split a task of its own or not.
    fn on_device_in(&self, num_orders: u32, kernel: &Kernel, chunks: &[Chunk], is_split: bool) -> Vec<T> {
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
        let [out] = outputs_in(num_orders, len, |seed, [out]: [*mut T; 1]| {
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
                out,
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

const LENS: [usize; 4] = [1, 37, 70, 16];

/// Many rows, one, and the last one of a context.
const CHUNKS: [Chunk; 3] =
    [Chunk { seq: 2, first: 30, end: 70 }, Chunk { seq: 0, first: 0, end: 1 }, Chunk { seq: 1, first: 36, end: 37 }];

fn cases(numbers: &mut Numbers) -> Vec<Case> {
    let mut cases = vec![
        Case::grouped([4, 4, 16], Reach::Full),
        Case::grouped([9, 3, 64], Reach::Full).learned(numbers),
        Case::grouped([6, 2, 24], Reach::Window(7)),
        Case::grouped([10, 1, 112], Reach::Window(33)).learned(numbers),
        Case::grouped([2, 1, 5], Reach::Window(1)),
        Case::grouped([6, 2, 24], Reach::Chunk(9)).learned(numbers),
        Case::grouped([4, 2, 80], Reach::Full),
        Case::latent([3, 20, 6]),
        Case::latent([1, 16, 8]),
    ];
    // Keys and values of two widths.
    cases.push(Case::grouped([4, 2, 16], Reach::Full));
    let heads = &mut cases.last_mut().unwrap().heads;
    (heads.key_dim, heads.value_start) = (24, 48);
    cases.last_mut().unwrap().query_dims = [24, 0];
    cases
}

#[test]
fn heads_agree_with_the_cpu() {
    let mut numbers = Numbers::new(30);
    for case in cases(&mut numbers) {
        let rows = Rows::new(&mut numbers, &case, &LENS);
        let world = World::<f32, f32>::new(&case, &rows, 16);
        let found = world.on_device(&plain::<f32, f32>(&case), &CHUNKS);
        assert_close(&found, &world.on_cpu(&CHUNKS), 2e-6);
    }
}

#[test]
fn every_type_is_widened_and_rounded() {
    fn check<T: Number, Cache: Stored>(case: &Case, rows: &Rows) {
        let world = World::<T, Cache>::new(case, rows, 16);
        let found = world.on_device(&plain::<T, Cache>(case), &CHUNKS);
        assert_close(&widened(&found), &world.on_cpu(&CHUNKS), tolerance::<T>(2e-6));
        let rounded = |values: &[f32]| widened(&stored::<T>(values));
        let queries = rows.queries.iter().map(|parts| parts.each_ref().map(|part| rounded(part))).collect();
        let rows = Rows { lens: rows.lens.clone(), queries, cached: rows.cached.clone() };
        let exact = World::<f32, Cache>::new(case, &rows, 16);
        assert_rounded(&found, &exact.on_device(&plain::<f32, Cache>(case), &CHUNKS));
    }
    let mut numbers = Numbers::new(31);
    for case in [Case::grouped([6, 2, 24], Reach::Full), Case::latent([3, 20, 6])] {
        let rows = Rows::new(&mut numbers, &case, &LENS);
        check::<f32, bf16>(&case, &rows);
        check::<bf16, f32>(&case, &rows);
        check::<bf16, bf16>(&case, &rows);
    }
}

/// The bits of `whole` come out of every kernel for each of the pieces, with splits as tasks of their own or not, over blocks of
/// another size.
fn assert_invariant<T: Number, Cache: Stored>(
    case: &Case,
    rows: &Rows,
    whole: &[Chunk],
    pieces: &[&[Chunk]],
    kernels: &[Kernel],
) {
    let together = World::<T, Cache>::new(case, rows, 16).on_device_in(1, &kernels[0], whole, false);
    let world = World::<T, Cache>::new(case, rows, 5);
    let row_len = case.heads.num_heads * case.heads.value_dim;
    // Where a row of a sequence is in the output of the whole.
    let place = |seq: usize, row: usize| {
        let position = whole.iter().position(|chunk| chunk.seq == seq).unwrap();
        let before: usize = whole[..position].iter().map(|chunk| chunk.end - chunk.first).sum();
        (before + row - whole[position].first) * row_len
    };
    for kernel in kernels {
        for piece in pieces {
            for is_split in [false, true] {
                let found = world.on_device_in(1, kernel, piece, is_split);
                let mut found = found.chunks(row_len);
                for chunk in *piece {
                    for row in chunk.first..chunk.end {
                        let expected = &together[place(chunk.seq, row)..][..row_len];
                        let is_equal = bits(found.next().unwrap()) == bits(expected);
                        assert!(is_equal, "{case:?} by {}: row {row} of {chunk:?}, split: {is_split}", kernel.name);
                    }
                }
            }
        }
    }
}

/// A sequence in chunks of `len` rows.
fn chunks(seq: usize, rows: Range<usize>, len: usize) -> Vec<Chunk> {
    rows.clone().step_by(len).map(|first| Chunk { seq, first, end: rows.end.min(first + len) }).collect()
}

fn whole(lens: &[usize]) -> Vec<Chunk> {
    lens.iter().enumerate().map(|(seq, &end)| Chunk { seq, first: 0, end }).collect()
}

/// Whole sequences together, then in chunks, a token at a time, and tokens of several sequences together.
fn check_short<T: Number, Cache: Stored>(case: &Case, kernels: &[Kernel]) {
    let lens = [1, 9, 38];
    let rows = Rows::new(&mut Numbers::new(32), case, &lens);
    let mut pieces: Vec<Vec<Chunk>> = chunks(2, 30..38, 1).into_iter().map(|chunk| vec![chunk]).collect();
    pieces.extend(chunks(2, 0..38, 13).into_iter().map(|chunk| vec![chunk]));
    pieces.push(whole(&lens));
    pieces.push(vec![
        Chunk { seq: 2, first: 37, end: 38 },
        Chunk { seq: 1, first: 8, end: 9 },
        Chunk { seq: 0, first: 0, end: 1 },
    ]);
    let pieces: Vec<&[Chunk]> = pieces.iter().map(Vec::as_slice).collect();
    assert_invariant::<T, Cache>(case, &rows, &whole(&lens), &pieces, kernels);
}

/// The rows around the ends of splits, of a context of several.
fn check_long<T: Number, Cache: Stored>(case: &Case, kernels: &[Kernel]) {
    let len = 2 * SPLIT + 37;
    let rows = Rows::new(&mut Numbers::new(33), case, &[len]);
    for range in [SPLIT - 3..SPLIT + 9, len - 9..len] {
        let whole = [Chunk { seq: 0, first: range.start, end: range.end }];
        let world = World::<T, Cache>::new(case, &rows, 16);
        let found = world.on_device_in(2, &kernels[0], &whole, false);
        assert_close(&widened(&found), &world.on_cpu(&whole), tolerance::<T>(2e-6));
        let pieces = [chunks(0, range.clone(), 5), chunks(0, range.start + 1..range.start + 6, 1)].concat();
        let pieces: Vec<&[Chunk]> = pieces.iter().map(std::slice::from_ref).collect();
        assert_invariant::<T, Cache>(case, &rows, &whole, &pieces, kernels);
    }
}

#[test]
fn a_row_has_the_same_bits_in_a_prefill_a_chunk_and_a_decode_step() {
    let mut numbers = Numbers::new(34);
    for case in [
        Case::grouped([4, 2, 16], Reach::Full).learned(&mut numbers),
        Case::grouped([2, 1, 5], Reach::Window(7)),
        Case::latent([3, 20, 6]),
    ] {
        check_short::<f32, f32>(&case, &[plain::<f32, f32>(&case)]);
        check_short::<bf16, bf16>(&case, &[plain::<bf16, bf16>(&case)]);
    }
}

#[test]
fn splits_are_joined_in_one_way() {
    let mut numbers = Numbers::new(35);
    for case in long_cases(&mut numbers) {
        check_long::<f32, f32>(&case, &[plain::<f32, f32>(&case)]);
    }
}

fn long_cases(numbers: &mut Numbers) -> [Case; 4] {
    [
        Case::grouped([2, 1, 16], Reach::Full).learned(numbers),
        Case::grouped([2, 1, 16], Reach::Window(SPLIT + 9)),
        Case::grouped([2, 1, 16], Reach::Chunk(SPLIT - 1)),
        Case { source_len: SPLIT + 20, ..Case::grouped([2, 1, 16], Reach::Source) },
    ]
}

fn tensor_core_cases(numbers: &mut Numbers) -> Vec<Case> {
    let mut cases = cases(numbers);
    cases.retain(|case| [case.heads.key_dim, case.heads.value_dim, case.query_dims[0]].iter().all(|dim| dim % 8 == 0));
    cases.extend([Case::grouped([2, 1, 256], Reach::Full), Case::latent([3, 24, 8]), Case::latent([5, 512, 64])]);
    cases
}

#[test]
fn tensor_cores_agree_with_the_cpu() {
    let mut numbers = Numbers::new(36);
    for case in tensor_core_cases(&mut numbers) {
        let rows = Rows::new(&mut numbers, &case, &LENS);
        let world = World::<bf16, bf16>::new(&case, &rows, 16);
        let expected = world.on_cpu(&CHUNKS);
        for kernel in on_tensor_cores(&case) {
            assert_close(&widened(&world.on_device(&kernel, &CHUNKS)), &expected, tolerance::<bf16>(0.0));
        }
    }
}

#[test]
fn tensor_cores_give_a_row_the_same_bits_in_a_prefill_a_chunk_and_a_decode_step() {
    let mut numbers = Numbers::new(37);
    for case in [
        Case::grouped([6, 2, 24], Reach::Full).learned(&mut numbers),
        Case::grouped([2, 1, 16], Reach::Window(7)),
        Case::latent([3, 24, 8]),
        Case::latent([3, 256, 16]),
    ] {
        check_short::<bf16, bf16>(&case, &on_tensor_cores(&case));
    }
}

#[test]
fn tensor_cores_join_splits_in_one_way() {
    let mut numbers = Numbers::new(38);
    for case in long_cases(&mut numbers) {
        check_long::<bf16, bf16>(&case, &on_tensor_cores(&case));
    }
}

/// A NaN in a query spoils its row, what is wrong in the cache the rows that see it.
fn check_spoiled<T: Number, Cache: Stored>(case: &Case, kernels: &[Kernel]) {
    let mut numbers = Numbers::new(39);
    let (len, width, query_len) = (40, case.width(), case.heads.num_heads * case.query_dims[0]);
    let clean = Rows::new(&mut numbers, case, &[len]);
    let mut spoiled = Rows { queries: clean.queries.clone(), cached: clean.cached.clone(), lens: vec![len] };
    spoiled.queries[0][0][20 * query_len + 3] = f32::NAN;
    let first_value = case.heads.value_start;
    spoiled.cached[0][30 * width..31 * width].fill(f32::NAN);
    spoiled.cached[0][33 * width + first_value + 1] = f32::INFINITY;
    let whole = [Chunk { seq: 0, first: 0, end: len }];
    let [clean, spoiled] = [clean, spoiled].map(|rows| World::<T, Cache>::new(case, &rows, 16));
    let row_len = case.heads.num_heads * case.heads.value_dim;
    for kernel in kernels {
        let (clean, spoiled) = (clean.on_device(kernel, &whole), spoiled.on_device(kernel, &whole));
        for (row, (clean, spoiled)) in clean.chunks(row_len).zip(spoiled.chunks(row_len)).enumerate() {
            let is_spoiled = |value: &T| !value.to_f32().is_finite();
            match row {
                20 => assert!(spoiled[..case.heads.value_dim].iter().all(is_spoiled), "{}", kernel.name),
                30.. => assert!(spoiled.iter().any(is_spoiled), "{}: row {row}", kernel.name),
                _ => assert_eq!(bits(clean), bits(spoiled), "{}: row {row}", kernel.name),
            }
        }
    }
}

#[test]
fn what_is_no_number_spoils_no_row_that_cannot_see_it() {
    for case in [Case::grouped([4, 2, 16], Reach::Full), Case::latent([3, 24, 8])] {
        check_spoiled::<f32, f32>(&case, &[plain::<f32, f32>(&case)]);
        check_spoiled::<bf16, bf16>(&case, &on_tensor_cores(&case));
    }
}
