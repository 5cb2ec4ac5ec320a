//! Attention over the paged cache.

use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use super::{BF16_TOLERANCE, DEVICE, F32_TOLERANCE, assert_same, moved};
use crate::ops::mla_attention::{MlaSpec, mla_attention};
use crate::ops::paged_attention::{GqaSpec, LearnedScores, PositionBias, Reach, paged_attention};
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::paged_cache::{KvFormat, PagedCache};
use crate::testing::{Numbers, bits};

const BLOCK_SIZE: usize = 8;

/// Rows `first..end` of a sequence.
#[derive(Clone, Copy)]
struct Chunk {
    seq: usize,
    first: usize,
    end: usize,
}

fn chunk(seq: usize, first: usize, end: usize) -> Chunk {
    Chunk { seq, first, end }
}

/// Types of activations and of the cache.
const TYPES: [(DType, KvFormat); 4] = [
    (DType::F32, KvFormat::F32),
    (DType::F32, KvFormat::Bf16),
    (DType::BF16, KvFormat::F32),
    (DType::BF16, KvFormat::Bf16),
];

/// The same sequences in a cache of the CPU and one of the device, in blocks that are handed out in a scattered order.
struct World {
    types: (DType, KvFormat),
    tables: Vec<Vec<u32>>,
    on_cpu: PagedCache,
    on_device: PagedCache,
}

impl World {
    fn new(numbers: &mut Numbers, types: (DType, KvFormat), width: usize, lens: &[usize]) -> Self {
        let num_blocks: Vec<usize> = lens.iter().map(|len| len.div_ceil(BLOCK_SIZE)).collect();
        let all = num_blocks.iter().sum::<usize>() + 1;
        let mut free: Vec<u32> = (0..all as u32).collect();
        free.sort_by_key(|block| block.wrapping_mul(2_654_435_761));
        let tables: Vec<Vec<u32>> = num_blocks.iter().map(|&num| free.drain(..num).collect()).collect();
        let [mut on_cpu, mut on_device] = [&Device::Cpu, &*DEVICE].map(|device| {
            let mut cache = PagedCache::on(device, types.1, BLOCK_SIZE, width, all).unwrap();
            cache.add_slab().unwrap();
            cache
        });
        for (&len, table) in lens.iter().zip(&tables) {
            let rows = numbers.tensor(&[len, width]);
            let slots: Vec<u32> =
                (0..len).map(|i| table[i / BLOCK_SIZE] * BLOCK_SIZE as u32 + (i % BLOCK_SIZE) as u32).collect();
            on_cpu.write(&rows, &slots).unwrap();
            on_device.write(&moved(&rows), &slots).unwrap();
        }
        Self { types, tables, on_cpu, on_device }
    }

    /// Blocks that no row reaches are not there.
    fn batch(&self, chunks: &[Chunk], reach: Reach, source_len: usize) -> PagedBatch {
        let mut batch = BatchLists { cu_seqlens: vec![0], block_offsets: vec![0], ..BatchLists::default() };
        for chunk in chunks {
            batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + (chunk.end - chunk.first) as u32);
            batch.context_lens.push(chunk.end as u32);
            batch.source_lens.push(source_len as u32);
            let mut table = self.tables[chunk.seq].clone();
            table[..reach.start(chunk.first, source_len) / BLOCK_SIZE].fill(PagedBatch::NO_BLOCK);
            batch.block_tables.extend(table);
            batch.block_offsets.push(batch.block_tables.len() as u32);
        }
        batch.into()
    }

    /// Rounded, as f32 on the CPU and as activations on the device.
    fn activations(&self, x: &Tensor) -> [Tensor; 2] {
        let stored = x.to_dtype(self.types.0).unwrap();
        [stored.to_dtype(DType::F32).unwrap(), moved(&stored)]
    }

    /// Type and tolerance of what the device gives.
    fn result(&self) -> (DType, f32) {
        (self.types.0, if self.types.0 == DType::BF16 { BF16_TOLERANCE } else { F32_TOLERANCE })
    }

    /// Both give the same; returns what the device gives.
    #[track_caller]
    fn check_gqa(&self, q: &Tensor, batch: &PagedBatch, spec: &GqaSpec, learned: LearnedScores<'_>) -> Tensor {
        let [q, device_q] = self.activations(q);
        let expected = paged_attention(&q, &self.on_cpu, batch, spec, learned).unwrap();
        let found = paged_attention(&device_q, &self.on_device, batch, spec, learned).unwrap();
        assert_same(&found, &expected, self.result());
        found
    }
}

fn gqa([num_heads, num_kv_heads, head_dim]: [usize; 3], reach: Reach) -> GqaSpec {
    GqaSpec { num_heads, num_kv_heads, head_dim, scale: 1.0 / (head_dim as f32).sqrt(), reach }
}

fn width(spec: &GqaSpec) -> usize {
    2 * spec.num_kv_heads * spec.head_dim
}

fn rows(chunks: &[Chunk]) -> usize {
    chunks.iter().map(|chunk| chunk.end - chunk.first).sum()
}

fn device_bits(tensor: &Tensor) -> Vec<u32> {
    bits(&tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap())
}

/// Many rows, one, none, and the last one of a context; then one row of each.
#[test]
fn grouped_heads() {
    let mut numbers = Numbers::new(70);
    let steps = [
        &[chunk(2, 0, 70), chunk(0, 0, 1), chunk(1, 20, 20), chunk(1, 36, 37)][..],
        &[chunk(1, 36, 37), chunk(0, 0, 1), chunk(2, 69, 70)],
    ];
    for types in TYPES {
        for spec in [
            gqa([4, 2, 16], Reach::Full),
            gqa([6, 2, 24], Reach::Window(7)),
            gqa([9, 3, 40], Reach::Chunk(9)),
            gqa([2, 1, 5], Reach::Full),
            gqa([2, 1, 256], Reach::Window(50)),
            // With its static arrays the first of these takes more shared memory than kernels have without asking.
            gqa([2, 1, 144], Reach::Full),
            gqa([1, 1, 512], Reach::Full),
        ] {
            let world = World::new(&mut numbers, types, width(&spec), &[1, 37, 70]);
            let (sinks, table) = (numbers.normal(spec.num_heads), numbers.normal(spec.num_heads * 23));
            let bias = PositionBias { table, max_distance: 11 };
            for (idx, chunks) in steps.iter().enumerate() {
                let batch = world.batch(chunks, spec.reach, 0);
                let q = numbers.tensor(&[rows(chunks), spec.num_heads, spec.head_dim]);
                let learned = [
                    LearnedScores::default(),
                    LearnedScores { sinks: Some(&sinks), ..LearnedScores::default() },
                    LearnedScores { position_bias: Some(&bias), ..LearnedScores::default() },
                    LearnedScores { sinks: Some(&sinks), position_bias: Some(&bias) },
                ];
                let of_step = if idx == 1 { &learned[..] } else { &learned[..1] };
                for &learned in of_step {
                    world.check_gqa(&q, &batch, &spec, learned);
                }
            }
        }
    }
}

#[test]
fn sources_are_seen_whole_or_not_at_all() {
    let mut numbers = Numbers::new(71);
    for types in [TYPES[0], TYPES[3]] {
        for reach in [Reach::Full, Reach::Window(9), Reach::Chunk(9), Reach::Source] {
            let spec = gqa([4, 2, 16], reach);
            let (world, chunks) = (World::new(&mut numbers, types, width(&spec), &[60]), [chunk(0, 43, 60)]);
            let q = numbers.tensor(&[rows(&chunks), 4, 16]);
            world.check_gqa(&q, &world.batch(&chunks, reach, 41), &spec, LearnedScores::default());
        }
    }
}

#[test]
fn latent_heads() {
    let mut numbers = Numbers::new(72);
    for types in TYPES {
        for [num_heads, latent_dim, rope_dim] in [[3, 24, 8], [3, 20, 6], [20, 512, 64]] {
            let world = World::new(&mut numbers, types, latent_dim + rope_dim, &[9, 37]);
            let spec = MlaSpec { num_heads, latent_dim, rope_dim, scale: 0.2 };
            for chunks in [[chunk(1, 30, 37), chunk(0, 8, 9)], [chunk(0, 8, 9), chunk(1, 36, 37)]] {
                let batch = world.batch(&chunks, Reach::Full, 0);
                let [q_latent, device_q_latent] =
                    world.activations(&numbers.tensor(&[rows(&chunks), num_heads, latent_dim]));
                let [q_rope, device_q_rope] = world.activations(&numbers.tensor(&[rows(&chunks), num_heads, rope_dim]));
                let expected = mla_attention(&q_latent, &q_rope, &world.on_cpu, &batch, &spec).unwrap();
                let found = mla_attention(&device_q_latent, &device_q_rope, &world.on_device, &batch, &spec).unwrap();
                assert_same(&found, &expected, world.result());
                let other = if types.0 == DType::F32 { DType::BF16 } else { DType::F32 };
                let q_rope = device_q_rope.to_dtype(other).unwrap();
                assert!(mla_attention(&device_q_latent, &q_rope, &world.on_device, &batch, &spec).is_err());
            }
        }
    }
}

/// A sequence alone is cut into splits; among many it may be in one piece.
#[test]
fn long_contexts() {
    let mut numbers = Numbers::new(73);
    for types in [TYPES[0], TYPES[3]] {
        let spec = gqa([2, 1, 16], Reach::Full);
        let mut lens = vec![1061];
        lens.extend([520; 8]);
        let world = World::new(&mut numbers, types, width(&spec), &lens);
        let sinks = numbers.normal(2);
        let learned = LearnedScores { sinks: Some(&sinks), ..LearnedScores::default() };
        let all: Vec<Chunk> = lens.iter().enumerate().map(|(seq, &len)| chunk(seq, len - 1, len)).collect();
        let q = numbers.tensor(&[all.len(), 2, 16]);
        let together = world.check_gqa(&q, &world.batch(&all, spec.reach, 0), &spec, learned);
        for seq in 0..2 {
            let alone = world.batch(&all[seq..=seq], spec.reach, 0);
            let found = world.check_gqa(&q.narrow(0, seq, 1).unwrap(), &alone, &spec, learned);
            assert_eq!(device_bits(&found), device_bits(&together.narrow(0, seq, 1).unwrap()));
        }
        // Rows of which some see a split more than others, and some a split less.
        for reach in [Reach::Full, Reach::Window(515), Reach::Chunk(500)] {
            let spec = GqaSpec { reach, ..spec };
            let chunks = [chunk(0, 1020, 1030), chunk(1, 0, 3)];
            let q = numbers.tensor(&[rows(&chunks), 2, 16]);
            world.check_gqa(&q, &world.batch(&chunks, reach, 0), &spec, learned);
        }
    }
}

#[test]
fn queries_begin_anywhere() {
    let mut numbers = Numbers::new(74);
    let spec = gqa([4, 2, 16], Reach::Full);
    let world = World::new(&mut numbers, TYPES[3], width(&spec), &[37]);
    let batch = world.batch(&[chunk(0, 35, 37)], spec.reach, 0);
    let flat = numbers.tensor(&[3 + 2 * 64]);
    let [_, behind] = world.activations(&flat);
    let q = flat.narrow(0, 3, 128).unwrap().reshape((2, 4, 16)).unwrap();
    let expected = world.check_gqa(&q, &batch, &spec, LearnedScores::default());
    let q = behind.narrow(0, 3, 128).unwrap().reshape((2, 4, 16)).unwrap();
    let found = paged_attention(&q, &world.on_device, &batch, &spec, LearnedScores::default()).unwrap();
    assert_eq!(device_bits(&found), device_bits(&expected));
}

#[test]
fn a_batch_is_copied_once_and_again_when_it_changes() {
    let mut numbers = Numbers::new(75);
    let spec = gqa([4, 2, 16], Reach::Full);
    let world = World::new(&mut numbers, TYPES[3], width(&spec), &[37, 30]);
    let mut batch = world.batch(&[chunk(0, 35, 37)], spec.reach, 0);
    let q = numbers.tensor(&[2, 4, 16]);
    let device = DEVICE.as_cuda_device().unwrap();
    world.check_gqa(&q, &batch, &spec, LearnedScores::default());
    let first = batch.on_device(device).unwrap();
    // Other heads and another reach want plans of their own.
    for spec in [GqaSpec { reach: Reach::Window(5), ..spec }, gqa([64, 2, 16], Reach::Full), spec] {
        let q = numbers.tensor(&[2, spec.num_heads, 16]);
        world.check_gqa(&q, &batch, &spec, LearnedScores::default());
    }
    assert!(Arc::ptr_eq(&first, &batch.on_device(device).unwrap()));
    *batch = BatchLists::clone(&world.batch(&[chunk(1, 28, 30)], spec.reach, 0));
    world.check_gqa(&q, &batch, &spec, LearnedScores::default());
    assert!(!Arc::ptr_eq(&first, &batch.on_device(device).unwrap()));
    assert!(!Arc::ptr_eq(&batch.on_device(device).unwrap(), &batch.clone().on_device(device).unwrap()));
}

#[test]
fn a_nan_spoils_the_rows_that_see_it() {
    let mut numbers = Numbers::new(76);
    for types in TYPES {
        let spec = gqa([4, 2, 16], Reach::Full);
        let mut world = World::new(&mut numbers, types, width(&spec), &[40]);
        let batch = world.batch(&[chunk(0, 0, 40)], spec.reach, 0);
        let q = moved(&numbers.tensor(&[40, 4, 16])).to_dtype(types.0).unwrap();
        let attend = |cache: &PagedCache| {
            let found = paged_attention(&q, cache, &batch, &spec, LearnedScores::default()).unwrap();
            device_bits(&found)
        };
        let clean = attend(&world.on_device);
        let spoiled = Tensor::full(f32::NAN, (1, width(&spec)), &Device::Cpu).unwrap();
        let slot = world.tables[0][30 / BLOCK_SIZE] * BLOCK_SIZE as u32 + (30 % BLOCK_SIZE) as u32;
        world.on_device.write(&moved(&spoiled), &[slot]).unwrap();
        let found = attend(&world.on_device);
        assert_eq!(found[..30 * 64], clean[..30 * 64]);
        assert!(found[30 * 64..].iter().all(|&bits| f32::from_bits(bits).is_nan()));
    }
}

#[test]
fn no_rows_give_none() {
    let mut numbers = Numbers::new(78);
    let spec = gqa([4, 2, 16], Reach::Full);
    let world = World::new(&mut numbers, TYPES[3], width(&spec), &[3]);
    let q = moved(&numbers.tensor(&[1, 4, 16])).narrow(0, 0, 0).unwrap();
    for chunks in [&[][..], &[chunk(0, 3, 3)]] {
        let batch = world.batch(chunks, spec.reach, 0);
        let found = paged_attention(&q, &world.on_device, &batch, &spec, LearnedScores::default()).unwrap();
        assert_eq!(found.dims(), [0, 64]);
    }
}

#[test]
fn a_cache_of_another_device_is_refused() {
    let mut numbers = Numbers::new(77);
    let spec = gqa([4, 2, 16], Reach::Full);
    let world = World::new(&mut numbers, TYPES[0], width(&spec), &[3]);
    let batch = world.batch(&[chunk(0, 2, 3)], spec.reach, 0);
    let q = numbers.tensor(&[1, 4, 16]);
    assert!(paged_attention(&moved(&q), &world.on_cpu, &batch, &spec, LearnedScores::default()).is_err());
    assert!(paged_attention(&q, &world.on_device, &batch, &spec, LearnedScores::default()).is_err());
    let latent = MlaSpec { num_heads: 4, latent_dim: 48, rope_dim: 16, scale: 1.0 };
    let [q_latent, q_rope] = [48, 16].map(|dim| numbers.tensor(&[1, 4, dim]));
    assert!(mla_attention(&moved(&q_latent), &moved(&q_rope), &world.on_cpu, &batch, &latent).is_err());
    assert!(mla_attention(&q_latent, &q_rope, &world.on_device, &batch, &latent).is_err());
}
