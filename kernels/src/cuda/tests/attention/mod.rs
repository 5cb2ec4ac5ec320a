//! Attention over the paged cache: parity with the CPU, and the same bits however a batch is cut.

mod world;

use std::ops::Range;

use half::bf16;
use world::{Case, Chunk, Rows, Stored, World, plain};

use super::{Number, assert_rounded, bits, stored, tolerance, widened};
use crate::ops::attention::plan::SPLIT;
use crate::ops::attention::variant::{Kernel, on_tensor_cores};
use crate::ops::paged_attention::Reach;
use crate::testing::{Numbers, assert_close};

const LENS: [usize; 4] = [1, 37, 70, 16];

/// Many rows, one, and the last one of a context.
const CHUNKS: [Chunk; 3] =
    [Chunk { seq: 2, first: 54, end: 70 }, Chunk { seq: 0, first: 0, end: 1 }, Chunk { seq: 1, first: 36, end: 37 }];

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

/// Rows of a decoder see a source whole, or only what comes after it.
#[test]
fn sources_are_seen_whole_or_not_at_all() {
    let mut numbers = Numbers::new(40);
    for reach in [Reach::Full, Reach::Window(9), Reach::Chunk(9), Reach::Source] {
        let case = Case { source_len: 41, ..Case::grouped([4, 2, 16], reach).learned(&mut numbers) };
        let (rows, decoder) = (Rows::new(&mut numbers, &case, &[60]), [Chunk { seq: 0, first: 43, end: 60 }]);
        let world = World::<f32, f32>::new(&case, &rows, 16);
        assert_close(&world.on_device(&plain::<f32, f32>(&case), &decoder), &world.on_cpu(&decoder), 2e-6);
        let world = World::<bf16, bf16>::new(&case, &rows, 16);
        for kernel in on_tensor_cores(case.heads) {
            let found = widened(&world.on_device_in(2, &kernel, &decoder, false));
            assert_close(&found, &world.on_cpu(&decoder), tolerance::<bf16>(0.0));
        }
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

/// The bits of `whole` come out of every kernel for each of the pieces, with splits as tasks of their own or not, over
/// blocks of another size.
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
    let mut pieces: Vec<Vec<Chunk>> = chunks(2, 32..38, 1).into_iter().map(|chunk| vec![chunk]).collect();
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
    // Of the rows of a task, some see nothing of the second split.
    for range in [SPLIT - 9..SPLIT + 2, len - 6..len] {
        let whole = [Chunk { seq: 0, first: range.start, end: range.end }];
        let world = World::<T, Cache>::new(case, &rows, 16);
        let found = world.on_device_in(2, &kernels[0], &whole, false);
        assert_close(&widened(&found), &world.on_cpu(&whole), tolerance::<T>(2e-6));
        let pieces = [chunks(0, range.clone(), 4), chunks(0, range.start + 1..range.start + 3, 1)].concat();
        let pieces: Vec<&[Chunk]> = pieces.iter().map(std::slice::from_ref).chain([&whole[..]]).collect();
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
        for kernel in on_tensor_cores(case.heads) {
            let found = world.on_device_in(2, &kernel, &CHUNKS, false);
            assert_close(&widened(&found), &expected, tolerance::<bf16>(0.0));
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
        check_short::<bf16, bf16>(&case, &on_tensor_cores(case.heads));
    }
}

#[test]
fn tensor_cores_join_splits_in_one_way() {
    let mut numbers = Numbers::new(38);
    for case in long_cases(&mut numbers) {
        check_long::<bf16, bf16>(&case, &on_tensor_cores(case.heads));
    }
}

/// A NaN in a query spoils its row, one in a cache row all rows that see it; an infinite value is one number of theirs.
fn check_spoiled<T: Number, Cache: Stored>(case: &Case, kernels: &[Kernel]) {
    let mut numbers = Numbers::new(39);
    let (len, width, query_len) = (40, case.width(), case.heads.num_heads * case.query_dims[0]);
    let clean = Rows::new(&mut numbers, case, &[len]);
    let copy = || Rows { queries: clean.queries.clone(), cached: clean.cached.clone(), lens: vec![len] };
    let [mut with_nan, mut with_infinity] = [copy(), copy()];
    with_nan.queries[0][0][20 * query_len + 3] = f32::NAN;
    with_nan.cached[0][30 * width..31 * width].fill(f32::NAN);
    let last = case.heads.value_start + case.num_kv_heads() * case.heads.value_dim - 1;
    with_infinity.cached[0][33 * width + last] = f32::INFINITY;
    let whole = [Chunk { seq: 0, first: 0, end: len }];
    let (row_len, value_dim) = (case.heads.num_heads * case.heads.value_dim, case.heads.value_dim);
    for kernel in kernels {
        let [clean, with_nan, with_infinity] = [&clean, &with_nan, &with_infinity].map(|rows| {
            let found = World::<T, Cache>::new(case, rows, 16).on_device_in(2, kernel, &whole, false);
            found.chunks(row_len).map(<[T]>::to_vec).collect::<Vec<_>>()
        });
        for row in 0..len {
            let is_spoiled = |value: &T| value.to_f32().is_nan();
            match row {
                20 => {
                    let (spoiled, others) = with_nan[row].split_at(value_dim);
                    assert!(spoiled.iter().all(is_spoiled), "{}", kernel.name);
                    assert_eq!(bits(others), bits(&clean[row][value_dim..]), "{}: other heads", kernel.name);
                }
                30.. => assert!(with_nan[row].iter().all(is_spoiled), "{}: row {row}", kernel.name),
                _ => assert_eq!(bits(&clean[row]), bits(&with_nan[row]), "{}: row {row}", kernel.name),
            }
            let first_infinite = if row < 33 { row_len } else { row_len - value_dim * case.heads.group_size };
            for (i, (clean, found)) in clean[row].iter().zip(&with_infinity[row]).enumerate() {
                let is_infinite = i >= first_infinite && i % value_dim == value_dim - 1;
                let expected = if is_infinite { T::from_f32(f32::INFINITY) } else { *clean };
                assert_eq!(found.bits(), expected.bits(), "{}: number {i} of row {row}", kernel.name);
            }
        }
    }
}

#[test]
fn what_is_no_number_spoils_no_row_that_cannot_see_it() {
    let case = Case::grouped([4, 2, 16], Reach::Full);
    check_spoiled::<f32, f32>(&case, &[plain::<f32, f32>(&case)]);
    check_spoiled::<bf16, bf16>(&case, &on_tensor_cores(case.heads));
}
