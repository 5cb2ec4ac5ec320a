//! Parity with the oracle, chunking, batch and block invariance to the bit, and refused batches.

use candle_core::Tensor;

use super::cpu::forward_with;
use super::tile::{SEGMENT, TILE};
use super::{Attention, HeadLayout, reference};
use crate::dispatch::Isa;
use crate::ops::mla_attention::{MlaSpec, mla_attention};
use crate::ops::paged_attention::{GqaSpec, LearnedScores, PositionBias, Reach, paged_attention};
use crate::paged_batch::{BatchLists, PagedBatch};
use crate::paged_cache::{KvFormat, PagedCache};
use crate::testing::{Numbers, assert_close, bits, values};

/// Sequences over a cache whose blocks are handed out in a scattered order.
struct World {
    cache: PagedCache,
    /// Blocks of each sequence.
    tables: Vec<Vec<u32>>,
}

/// The rows `first..end` of sequence `seq`.
#[derive(Clone, Copy)]
struct Chunk {
    seq: usize,
    first: usize,
    end: usize,
}

impl World {
    fn new(format: KvFormat, block_size: usize, rows: &[Tensor]) -> Self {
        let width = rows[0].dims()[1];
        let mut cache = PagedCache::new(format, block_size, width, 4).unwrap();
        let lens: Vec<usize> = rows.iter().map(|rows| rows.dims()[0].div_ceil(block_size)).collect();
        while cache.num_blocks() < lens.iter().sum() {
            cache.add_slab().unwrap();
        }
        let mut free: Vec<u32> = (0..cache.num_blocks() as u32).collect();
        free.sort_by_key(|block| block.wrapping_mul(2_654_435_761));
        let tables: Vec<Vec<u32>> = lens.iter().map(|&len| free.drain(..len).collect()).collect();
        for (rows, table) in rows.iter().zip(&tables) {
            let slot = |i: usize| table[i / block_size] * block_size as u32 + (i % block_size) as u32;
            cache.write(rows, &(0..rows.dims()[0]).map(slot).collect::<Vec<_>>()).unwrap();
        }
        Self { cache, tables }
    }

    fn batch(&self, chunks: &[Chunk]) -> PagedBatch {
        let mut batch = BatchLists { cu_seqlens: vec![0], block_offsets: vec![0], ..BatchLists::default() };
        for chunk in chunks {
            batch.cu_seqlens.push(batch.cu_seqlens.last().unwrap() + (chunk.end - chunk.first) as u32);
            batch.context_lens.push(chunk.end as u32);
            batch.source_lens.push(0);
            batch.block_tables.extend(&self.tables[chunk.seq]);
            batch.block_offsets.push(batch.block_tables.len() as u32);
        }
        batch.into()
    }
}

/// The rows of the chunks, one after the other.
fn gather(rows: &[Tensor], chunks: &[Chunk]) -> Tensor {
    let parts: Vec<_> =
        chunks.iter().map(|chunk| rows[chunk.seq].narrow(0, chunk.first, chunk.end - chunk.first).unwrap()).collect();
    Tensor::cat(&parts, 0).unwrap()
}

fn whole(lens: &[usize]) -> Vec<Chunk> {
    lens.iter().enumerate().map(|(seq, &end)| Chunk { seq, first: 0, end }).collect()
}

const LENS: [usize; 4] = [1, 37, 70, 16];

fn gqa_specs() -> Vec<GqaSpec> {
    let spec = |num_heads, num_kv_heads, head_dim, reach| GqaSpec {
        num_heads,
        num_kv_heads,
        head_dim,
        scale: 1.0 / (head_dim as f32).sqrt(),
        reach,
    };
    vec![
        spec(4, 4, 16, Reach::Full),
        spec(9, 3, 64, Reach::Full),
        spec(6, 2, 24, Reach::Window(7)),
        spec(20, 1, 112, Reach::Window(33)),
        spec(2, 1, 5, Reach::Window(1)),
        spec(6, 2, 24, Reach::Chunk(9)),
    ]
}

/// Sinks, and a bias that reaches further than some contexts and less far than others.
fn learned(numbers: &mut Numbers, spec: &GqaSpec) -> (Vec<f32>, PositionBias) {
    let max_distance = 11;
    let table = numbers.normal(spec.num_heads * (2 * max_distance + 1));
    (numbers.normal(spec.num_heads), PositionBias { table, max_distance })
}

fn gqa_rows(numbers: &mut Numbers, spec: &GqaSpec) -> (Vec<Tensor>, Vec<Tensor>) {
    let q = LENS.iter().map(|&len| numbers.tensor(&[len, spec.num_heads, spec.head_dim])).collect();
    let kv = LENS.iter().map(|&len| numbers.tensor(&[len, 2 * spec.num_kv_heads * spec.head_dim])).collect();
    (q, kv)
}

#[test]
fn grouped_heads_agree_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for spec in gqa_specs() {
        let (q, kv) = gqa_rows(&mut numbers, &spec);
        let (sinks, bias) = learned(&mut numbers, &spec);
        let all = LearnedScores { sinks: Some(&sinks), position_bias: Some(&bias) };
        for (format, learned) in [
            (KvFormat::F32, LearnedScores::default()),
            (KvFormat::Bf16, LearnedScores::default()),
            (KvFormat::F32, all),
        ] {
            let world = World::new(format, 16, &kv);
            let chunks = [
                Chunk { seq: 2, first: 30, end: 70 },
                Chunk { seq: 0, first: 0, end: 1 },
                Chunk { seq: 1, first: 36, end: 37 },
            ];
            let (q, batch) = (gather(&q, &chunks), world.batch(&chunks));
            let GqaSpec { num_heads, num_kv_heads, head_dim, scale, reach } = spec;
            let heads = HeadLayout {
                num_heads,
                group_size: num_heads / num_kv_heads,
                key_start: 0,
                key_dim: head_dim,
                value_start: num_kv_heads * head_dim,
                value_dim: head_dim,
            };
            let q_values = values(&q);
            let parts = [(q_values.as_slice(), head_dim)];
            let op = Attention { q: &parts, cache: &world.cache, batch: &batch, heads, scale, reach, learned };
            let y = paged_attention(&q, &world.cache, &batch, &spec, learned).unwrap();
            assert_eq!(y.dims(), [42, num_heads * head_dim]);
            assert_close(&values(&y), &reference::forward(&op), 2e-6);
        }
    }
}

/// Runs the sequences whole and together, then in chunks of many sizes and alone, over blocks of another size.
fn check_chunking(worlds: [&World; 2], attend: impl Fn(&World, &[Chunk]) -> Vec<u32>) {
    let together = attend(worlds[0], &whole(&LENS));
    let row_len = together.len() / LENS.iter().sum::<usize>();
    for chunk_len in [1, 2, 3, 5, 8, 13, 40, 70] {
        let mut pieces = Vec::new();
        for (seq, &len) in LENS.iter().enumerate() {
            for first in (0..len).step_by(chunk_len) {
                let piece = attend(worlds[1], &[Chunk { seq, first, end: len.min(first + chunk_len) }]);
                assert_eq!(piece.len(), chunk_len.min(len - first) * row_len);
                pieces.extend(piece);
            }
        }
        assert!(pieces == together, "chunks of {chunk_len}");
    }
}

#[test]
fn grouped_heads_do_not_depend_on_chunks_batches_or_blocks() {
    let mut numbers = Numbers::new(2);
    for spec in gqa_specs() {
        let (q, kv) = gqa_rows(&mut numbers, &spec);
        let (sinks, bias) = learned(&mut numbers, &spec);
        let learned = LearnedScores { sinks: Some(&sinks), position_bias: Some(&bias) };
        for format in [KvFormat::F32, KvFormat::Bf16] {
            check_chunking([&World::new(format, 16, &kv), &World::new(format, 5, &kv)], |world, chunks| {
                let batch = world.batch(chunks);
                bits(&paged_attention(&gather(&q, chunks), &world.cache, &batch, &spec, learned).unwrap())
            });
        }
    }
}

fn mla_rows(numbers: &mut Numbers, spec: &MlaSpec) -> [Vec<Tensor>; 3] {
    let mut query = |dim| LENS.iter().map(|&len| numbers.tensor(&[len, spec.num_heads, dim])).collect();
    let (latent, rope) = (query(spec.latent_dim), query(spec.rope_dim));
    [latent, rope, LENS.iter().map(|&len| numbers.tensor(&[len, spec.latent_dim + spec.rope_dim])).collect()]
}

fn mla_specs() -> Vec<MlaSpec> {
    let spec = |num_heads, latent_dim, rope_dim| MlaSpec { num_heads, latent_dim, rope_dim, scale: 0.1 };
    vec![spec(16, 512, 64), spec(3, 20, 6), spec(1, 16, 8)]
}

#[test]
fn latent_heads_agree_with_the_reference() {
    let mut numbers = Numbers::new(3);
    for spec in mla_specs() {
        let [latent, rope, rows] = mla_rows(&mut numbers, &spec);
        for format in [KvFormat::F32, KvFormat::Bf16] {
            let world = World::new(format, 16, &rows);
            let chunks = [Chunk { seq: 1, first: 5, end: 9 }, Chunk { seq: 2, first: 69, end: 70 }];
            let (latent, rope, batch) = (gather(&latent, &chunks), gather(&rope, &chunks), world.batch(&chunks));
            let MlaSpec { num_heads, latent_dim, rope_dim, scale } = spec;
            let heads = HeadLayout {
                num_heads,
                group_size: num_heads,
                key_start: 0,
                key_dim: latent_dim + rope_dim,
                value_start: 0,
                value_dim: latent_dim,
            };
            let (latent_values, rope_values) = (values(&latent), values(&rope));
            let parts = [(latent_values.as_slice(), latent_dim), (rope_values.as_slice(), rope_dim)];
            let op = Attention {
                q: &parts,
                cache: &world.cache,
                batch: &batch,
                heads,
                scale,
                reach: Reach::Full,
                learned: LearnedScores::default(),
            };
            let y = mla_attention(&latent, &rope, &world.cache, &batch, &spec).unwrap();
            assert_eq!(y.dims(), [5, num_heads, latent_dim]);
            assert_close(&values(&y), &reference::forward(&op), 2e-6);
        }
    }
}

#[test]
fn latent_heads_do_not_depend_on_chunks_batches_or_blocks() {
    let mut numbers = Numbers::new(4);
    for spec in mla_specs() {
        let [latent, rope, rows] = mla_rows(&mut numbers, &spec);
        for format in [KvFormat::F32, KvFormat::Bf16] {
            check_chunking([&World::new(format, 16, &rows), &World::new(format, 7, &rows)], |world, chunks| {
                let batch = world.batch(chunks);
                let (latent, rope) = (gather(&latent, chunks), gather(&rope, chunks));
                bits(&mla_attention(&latent, &rope, &world.cache, &batch, &spec).unwrap())
            });
        }
    }
}

/// Rows of an encoder see the whole source, rows of a decoder see it too or only what is their own.
#[test]
fn sources_are_seen_whole_or_not_at_all() {
    let mut numbers = Numbers::new(8);
    for spec in [gqa_specs()[0], gqa_specs()[2]] {
        let (q, kv) = gqa_rows(&mut numbers, &spec);
        let (_, bias) = learned(&mut numbers, &spec);
        let learned = LearnedScores { sinks: None, position_bias: Some(&bias) };
        let world = World::new(KvFormat::F32, 16, &kv);
        let attend = |reach, chunk: Chunk, source_len| {
            let batch = PagedBatch::from(BatchLists {
                source_lens: vec![source_len],
                ..BatchLists::clone(&world.batch(&[chunk]))
            });
            let (q, spec) = (gather(&q, &[chunk]), GqaSpec { reach, ..spec });
            values(&paged_attention(&q, &world.cache, &batch, &spec, learned).unwrap())
        };
        let oracle = |reach, chunk: Chunk, source_len| {
            let batch = PagedBatch::from(BatchLists {
                source_lens: vec![source_len],
                ..BatchLists::clone(&world.batch(&[chunk]))
            });
            let q = values(&gather(&q, &[chunk]));
            let heads = HeadLayout {
                num_heads: spec.num_heads,
                group_size: spec.num_heads / spec.num_kv_heads,
                key_start: 0,
                key_dim: spec.head_dim,
                value_start: spec.num_kv_heads * spec.head_dim,
                value_dim: spec.head_dim,
            };
            let parts = [(q.as_slice(), spec.head_dim)];
            let (cache, batch, scale) = (&world.cache, &batch, spec.scale);
            reference::forward(&Attention { q: &parts, cache, batch, heads, scale, reach, learned })
        };
        let encoder = Chunk { seq: 2, first: 0, end: 41 };
        let decoder = Chunk { seq: 2, first: 47, end: 70 };
        for (reach, chunk) in [(Reach::Source, encoder), (Reach::Source, decoder), (spec.reach, decoder)] {
            assert_close(&attend(reach, chunk, 41), &oracle(reach, chunk, 41), 2e-6);
        }
        let cut: Vec<f32> =
            (47..70).flat_map(|first| attend(spec.reach, Chunk { seq: 2, first, end: first + 1 }, 41)).collect();
        assert_eq!(cut, attend(spec.reach, decoder, 41), "a decoder's rows are the same one by one");
    }
}

/// Contexts of several segments: parity, and the same bits in few tasks, in many, in chunks and on every instruction set.
#[test]
fn long_contexts_agree_however_they_are_cut() {
    let mut numbers = Numbers::new(9);
    let len = 2 * SEGMENT + 3 * TILE + 5;
    for (heads, reach) in [
        ([6, 2, 16], Reach::Full),
        ([2, 2, 40], Reach::Window(SEGMENT + 9)),
        ([4, 1, 16], Reach::Chunk(SEGMENT - 1)),
        ([4, 2, 24], Reach::Source),
    ] {
        let [num_heads, num_kv_heads, head_dim] = heads;
        let rows = [numbers.tensor(&[len, 2 * num_kv_heads * head_dim])];
        let q = [numbers.tensor(&[len, num_heads, head_dim])];
        let sinks = numbers.normal(num_heads);
        let learned = LearnedScores { sinks: Some(&sinks), position_bias: None };
        let world = World::new(KvFormat::Bf16, 16, &rows);
        let attend = |chunk: Chunk, isa: Option<Isa>, num_tasks: usize| {
            let source_lens = vec![if reach == Reach::Source { len as u32 - 7 } else { 0 }];
            let batch = PagedBatch::from(BatchLists { source_lens, ..BatchLists::clone(&world.batch(&[chunk])) });
            let q = values(&gather(&q, &[chunk]));
            let (parts, group_size) = ([(q.as_slice(), head_dim)], num_heads / num_kv_heads);
            let value_start = num_kv_heads * head_dim;
            let (key_start, key_dim, value_dim) = (0, head_dim, head_dim);
            let heads = HeadLayout { num_heads, group_size, key_start, key_dim, value_start, value_dim };
            let op = Attention { q: &parts, cache: &world.cache, batch: &batch, heads, scale: 0.3, reach, learned };
            (forward_with(&op, isa, num_tasks), reference::forward(&op))
        };
        let chunk = Chunk { seq: 0, first: len - 40, end: len };
        let (whole, expected) = attend(chunk, None, 1);
        assert_close(&whole, &expected, 2e-6);
        for isa in Isa::available() {
            assert!(attend(chunk, Some(isa), 1000).0 == whole, "{reach:?} in one task per segment");
        }
        for num_rows in [1, 3] {
            let alone = (chunk.first..len).step_by(num_rows).flat_map(|first| {
                let end = len.min(first + num_rows);
                attend(Chunk { first, end, ..chunk }, None, if first % 2 == 0 { 1 } else { 1000 }).0
            });
            assert!(alone.eq(whole.iter().copied()), "{reach:?}, {num_rows} rows at a time");
        }
    }
}

#[test]
fn a_nan_in_the_cache_spoils_no_row_that_cannot_see_it() {
    let spec = GqaSpec { num_heads: 2, num_kv_heads: 1, head_dim: 16, scale: 0.25, reach: Reach::Window(4) };
    let mut numbers = Numbers::new(5);
    let mut kv = numbers.normal(12 * 32);
    kv[6 * 32..7 * 32].fill(f32::NAN);
    let world = World::new(KvFormat::F32, 4, &[crate::testing::tensor(&kv, &[12, 32])]);
    let batch = world.batch(&[Chunk { seq: 0, first: 0, end: 12 }]);
    let q = numbers.tensor(&[12, 2, 16]);
    let y = paged_attention(&q, &world.cache, &batch, &spec, LearnedScores::default()).unwrap();
    for (row, y) in values(&y).chunks(32).enumerate() {
        assert_eq!(y.iter().any(|value| value.is_nan()), (6..10).contains(&row), "row {row}");
    }
}

#[test]
fn what_lies_before_a_window_need_not_be_there() {
    let mut numbers = Numbers::new(9);
    for spec in gqa_specs() {
        let Some(window) = spec.reach.window() else { continue };
        let (q, kv) = gqa_rows(&mut numbers, &spec);
        let world = World::new(KvFormat::F32, 4, &kv);
        for (first, end) in [(69, 70), (50, 70), (61, 64)] {
            let chunks = [Chunk { seq: 2, first, end }, Chunk { seq: 1, first: 36, end: 37 }];
            let whole = world.batch(&chunks);
            let mut cut = whole.clone();
            let mut num_cut = 0;
            for (chunk, &start) in chunks.iter().zip(&whole.block_offsets) {
                let num_blocks = (chunk.first + 1).saturating_sub(window) / 4;
                cut.block_tables[start as usize..][..num_blocks].fill(PagedBatch::NO_BLOCK);
                num_cut += num_blocks;
            }
            assert!(num_cut > 0, "{spec:?} sees everything");
            let attend = |batch: &PagedBatch| {
                paged_attention(&gather(&q, &chunks), &world.cache, batch, &spec, LearnedScores::default())
            };
            assert_eq!(values(&attend(&cut).unwrap()), values(&attend(&whole).unwrap()), "{spec:?}");
            if let Reach::Window(_) = spec.reach {
                // One block more is one too many.
                let num_blocks = (first + 1).saturating_sub(window) / 4 + 1;
                cut.block_tables[..num_blocks].fill(PagedBatch::NO_BLOCK);
                assert!(attend(&cut).is_err(), "{spec:?}");
            }
        }
    }
}

#[test]
fn no_rows_are_no_output() {
    let spec = GqaSpec { num_heads: 2, num_kv_heads: 1, head_dim: 16, scale: 0.25, reach: Reach::Full };
    let cache = PagedCache::new(KvFormat::F32, 4, 32, 1).unwrap();
    let batch = PagedBatch::from(BatchLists { cu_seqlens: vec![0], block_offsets: vec![0], ..BatchLists::default() });
    let q = Numbers::new(6).tensor(&[0, 2, 16]);
    let y = paged_attention(&q, &cache, &batch, &spec, LearnedScores::default()).unwrap();
    assert_eq!(y.dims(), [0, 32]);
}

#[test]
fn refuses_what_does_not_fit() {
    let spec = GqaSpec { num_heads: 4, num_kv_heads: 2, head_dim: 8, scale: 0.25, reach: Reach::Full };
    let mut numbers = Numbers::new(7);
    let world = World::new(KvFormat::F32, 4, &[numbers.tensor(&[10, 32])]);
    let good = world.batch(&[Chunk { seq: 0, first: 8, end: 10 }]);
    let q = numbers.tensor(&[2, 4, 8]);
    let attend = |q: &Tensor, batch: &PagedBatch, spec: &GqaSpec| {
        paged_attention(q, &world.cache, batch, spec, LearnedScores::default())
    };
    let with = |learned| paged_attention(&q, &world.cache, &good, &spec, learned);
    let bias = PositionBias { table: vec![0.0; 4 * 3], max_distance: 1 };
    assert!(with(LearnedScores { position_bias: Some(&bias), ..LearnedScores::default() }).is_ok());
    let bias = PositionBias { max_distance: 2, ..bias.clone() };
    assert!(with(LearnedScores { position_bias: Some(&bias), ..LearnedScores::default() }).is_err());
    assert!(with(LearnedScores { sinks: Some(&[0.0; 3]), ..LearnedScores::default() }).is_err());
    // A row of the source does not see what the decoder makes of it, and without one there is nothing to see.
    assert!(attend(&q, &good, &GqaSpec { reach: Reach::Source, ..spec }).is_err());
    assert!(
        attend(&q, &PagedBatch::from(BatchLists { source_lens: vec![8], ..BatchLists::clone(&good) }), &spec).is_ok()
    );
    assert!(
        attend(&q, &PagedBatch::from(BatchLists { source_lens: vec![9], ..BatchLists::clone(&good) }), &spec).is_err()
    );
    assert!(attend(&q, &good, &spec).is_ok());
    assert!(attend(&numbers.tensor(&[3, 4, 8]), &good, &spec).is_err());
    assert!(attend(&q, &good, &GqaSpec { num_kv_heads: 3, ..spec }).is_err());
    assert!(attend(&q, &good, &GqaSpec { num_kv_heads: 4, ..spec }).is_err());
    assert!(attend(&q, &good, &GqaSpec { reach: Reach::Window(0), ..spec }).is_err());
    let refused = [
        PagedBatch::from(BatchLists { cu_seqlens: vec![0, 3], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { cu_seqlens: vec![0], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { context_lens: vec![1], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { source_lens: vec![], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { context_lens: vec![13], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { block_tables: vec![0, 1, 4], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { block_tables: vec![PagedBatch::NO_BLOCK, 1, 2], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { block_offsets: vec![0, 2], ..BatchLists::clone(&good) }),
        PagedBatch::from(BatchLists { block_offsets: vec![1, 3], ..BatchLists::clone(&good) }),
    ];
    for batch in refused {
        assert!(attend(&q, &batch, &spec).is_err(), "{batch:?}");
    }
}
