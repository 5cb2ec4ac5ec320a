//! Products with weights: of quantized ones to the bit.

use std::slice::from_ref;

use emulator::{Argument, Launch};
use half::bf16;

use super::{Buffer, Number, Output, ROW_THREADS, bits, for_activations, outputs, stored, tolerance, widened};
use crate::cuda::address::Address;
use crate::cuda::products::{
    DenseWeight, PLAIN_OUTS, PLAIN_TOKENS, PRODUCT_THREADS, QuantRows, QuantWeight, TILES, dense_name,
};
use crate::ops::head_linear::head_linear;
use crate::ops::linear::linear;
use crate::quant::{Codes, QuantFormat, QuantizedRows};
use crate::testing::{Numbers, QUANTIZED, assert_close, tensor, values};
use crate::weight::{PackedWeight, WeightFormat};

/// Every code with every group that it may have.
pub(super) fn formats() -> impl Iterator<Item = QuantFormat> {
    let all = QUANTIZED.into_iter().flat_map(|QuantFormat { codes, .. }| [16, 32, 64, 128].map(|group| (codes, group)));
    let mut known: Vec<QuantFormat> = Vec::new();
    for format in all.map(|(codes, group)| QuantFormat { codes, group }).filter(|format| format.is_known()) {
        if !known.contains(&format) {
            known.push(format);
        }
    }
    known.into_iter()
}

/// `struct Terms` of `quant.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C, align(8))]
pub(super) struct Terms {
    pub(super) scale: f32,
    pub(super) sum: i32,
}

/// Rows that were quantized on the device.
pub(super) struct DeviceRows {
    /// From a multiple of 16 bytes.
    codes: Vec<u128>,
    terms: Vec<Terms>,
}

impl DeviceRows {
    pub(super) fn view(&self) -> QuantRows {
        QuantRows { codes: Address::of_host(self.codes.as_ptr()), terms: Address::of_host(self.terms.as_ptr()) }
    }

    fn code_bytes(&self) -> Vec<i8> {
        self.codes.iter().flat_map(|codes| codes.to_le_bytes()).map(u8::cast_signed).collect()
    }
}

impl Output for u128 {
    const POISON: Self = u128::MAX / 3;

    fn bits(self) -> u32 {
        (self ^ (self >> 32) ^ (self >> 64) ^ (self >> 96)) as u32
    }
}

impl Output for Terms {
    const POISON: Self = Self { scale: f32::NAN, sum: 0x5a5a_5a5a };

    fn bits(self) -> u32 {
        self.scale.to_bits().rotate_left(7) ^ self.sum.cast_unsigned()
    }
}

/// As many rows as are said to be there.
pub(super) fn quantize_rows<T: Number>(
    x: &[T],
    cols: usize,
    (format, num_there): (QuantFormat, *const u32),
    seed: u32,
) -> DeviceRows {
    let (num_rows, num_groups) = (x.len() / cols, cols.div_ceil(format.group()));
    let mut codes = Buffer::new(num_rows * num_groups * format.group() / 16);
    let mut terms = Buffer::new(num_rows * num_groups);
    let shape = Launch { grid: [num_rows as u32, 1, 1], block: [ROW_THREADS as u32, 1, 1], shared_bytes: 0, seed };
    let arguments: [&dyn Argument; 7] = [
        &x.as_ptr(),
        &codes.as_mut_ptr(),
        &terms.as_mut_ptr(),
        &(cols as u32),
        &u32::from(format.group),
        &u32::from(format.codes.are_rotated()),
        &num_there,
    ];
    if num_rows > 0 {
        // SAFETY: the arguments of the kernel, with rows of `cols`.
        unsafe { emulator::launch(&format!("quantize_rows_{}", T::NAME), shape, &arguments) }.unwrap();
    }
    DeviceRows { codes: codes.into_vec(), terms: terms.into_vec() }
}

fn all_rows<T: Number>(x: &[T], cols: usize, format: QuantFormat) -> DeviceRows {
    quantize_rows(x, cols, (format, std::ptr::null()), 1)
}

fn check_quantize_rows<T: Number>() {
    let mut numbers = Numbers::new(20);
    for [rows, cols] in [[1, 1], [3, 63], [2, 200], [2, 1100]] {
        let mut x = numbers.with_outliers(rows * cols);
        // What is no number, and groups of zeros, of denormals and of numbers whose inverse is infinite.
        if cols > 150 {
            x[cols - 1] = f32::NAN;
            x[40] = f32::NEG_INFINITY;
            x[cols..cols + 128].fill(-0.0);
            x[64..128].fill(1e-41);
            x[128] = 3e-38;
        }
        let (x, one_less) = (stored::<T>(&x), rows as u32 - 1);
        for format in formats().filter(|format| matches!(format.codes, Codes::Int8 | Codes::Int8Rotated)) {
            let expected = QuantizedRows::new(&widened(&x), cols, format.row_form());
            let found = all_rows(&x, cols, format);
            let again = quantize_rows(&x, cols, (format, &raw const one_less), 2);
            let (kept, left) = again.terms.split_at(found.terms.len() / rows * (rows - 1));
            assert_eq!(bits(kept), bits(&found.terms[..kept.len()]));
            assert!(left.iter().all(|terms| terms.bits() == Terms::POISON.bits()), "a row that is not there");
            let codes = (0..rows).flat_map(|row| expected.codes(row).as_flattened().to_vec());
            assert_eq!(found.code_bytes(), codes.collect::<Vec<_>>(), "{format:?} [{rows}, {cols}]");
            let terms = (0..rows).flat_map(|row| expected.terms(row));
            assert_eq!(found.terms.len(), terms.clone().count());
            for (found, expected) in found.terms.iter().zip(terms) {
                let is_same = found.scale.to_bits() == expected.scale.to_bits() && found.sum == expected.sum;
                let both_are_none = found.scale.is_nan() && expected.scale.is_nan() && found.sum == 0;
                assert!(is_same || both_are_none, "{format:?}: {found:?}, expected {expected:?}");
                // What the product makes of them.
                let scaled_sum = found.scale * found.sum as f32;
                assert!(scaled_sum.to_bits() == expected.scaled_sum.to_bits() || both_are_none);
            }
        }
    }
}

#[test]
fn rows_are_quantized_as_on_the_cpu() {
    for_activations!(check_quantize_rows);
}

pub(super) fn quant_weight(weight: &PackedWeight, bias: Option<&[f32]>) -> QuantWeight {
    QuantWeight::new(weight, Address::of_host(weight.as_bytes().as_ptr()), bias_of(weight, bias))
}

fn bias_of(weight: &PackedWeight, bias: Option<&[f32]>) -> Address {
    bias.map_or(Address::NULL, |bias| {
        assert_eq!(bias.len(), weight.rows());
        Address::of_host(bias.as_ptr())
    })
}

/// One weight by itself, several as a table.
fn passed<W: Copy>(weights: &[W], none: W) -> (Address, W) {
    match weights {
        [only] => (Address::NULL, *only),
        _ => (Address::of_host(weights.as_ptr()), none),
    }
}

fn device_product<T: Number>(
    (tile, tile_outs, tile_tokens): (&str, usize, usize),
    x: &DeviceRows,
    num_tokens: usize,
    weights: &[QuantWeight],
) -> Vec<T> {
    let num_outs = weights[0].rows as usize;
    let [out] = outputs(num_tokens * weights.len() * num_outs, |seed, [out]: [*mut T; 1]| {
        let grid = [num_outs.div_ceil(tile_outs), num_tokens.div_ceil(tile_tokens), weights.len()];
        let shape =
            Launch { grid: grid.map(|len| len as u32), block: [PRODUCT_THREADS as u32, 1, 1], shared_bytes: 0, seed };
        let (table, only) = passed(weights, QuantWeight::NONE);
        let arguments: [&dyn Argument; 5] = [&table, &only, &x.view(), &out, &(num_tokens as u32)];
        // SAFETY: the arguments of the kernel; the input has a row for each token and weight, in their form.
        unsafe { emulator::launch(&format!("quant_linear_{tile}_{}", T::NAME), shape, &arguments) }.unwrap();
    });
    out
}

/// Equal bits, where a NaN is as good as any other.
#[track_caller]
pub(super) fn assert_same<T: Number>(found: &[T], expected: &[f32], what: &dyn std::fmt::Debug) {
    assert_eq!(found.len(), expected.len());
    for (i, (found, expected)) in found.iter().zip(&stored::<T>(expected)).enumerate() {
        let both_are_none = found.to_f32().is_nan() && expected.to_f32().is_nan();
        let is_same = found.bits() == expected.bits() || both_are_none;
        assert!(is_same, "{what:?}, entry {i}: {}, expected {}", found.to_f32(), expected.to_f32());
    }
}

fn quantized(numbers: &mut Numbers, format: QuantFormat, [rows, cols]: [usize; 2]) -> PackedWeight {
    PackedWeight::from_f32(WeightFormat::Quantized(format), rows, cols, &numbers.normal(rows * cols)).unwrap()
}

fn check_quant_linear<T: Number>() {
    let mut numbers = Numbers::new(21);
    for (num_tokens, [rows, cols]) in [(1, [1, 1]), (3, [17, 63]), (9, [70, 300]), (33, [130, 16])] {
        // Types differ behind the product only, and so do blocks of one matrix.
        let is_plain = T::NAME == "float" && num_tokens < 30;
        for format in formats().filter(|format| is_plain || QUANTIZED.contains(format)) {
            let weight = quantized(&mut numbers, format, [rows, cols]);
            let bias = numbers.normal(rows);
            let mut x = numbers.with_outliers(num_tokens * cols);
            if num_tokens > 1 {
                x[cols + cols / 2] = f32::NAN;
            }
            let x = stored::<T>(&x);
            let device_x = all_rows(&x, cols, format);
            let x = tensor(&widened(&x), &[num_tokens, cols]);
            let expected = values(&linear(&x, &weight, Some(&tensor(&bias, &[rows]))).unwrap());
            let device_weight = quant_weight(&weight, Some(&bias));
            for tile in TILES {
                let found = device_product::<T>(tile, &device_x, num_tokens, from_ref(&device_weight));
                assert_same(&found, &expected, &(format, tile, num_tokens, rows, cols));
            }
        }
    }
}

#[test]
fn a_quantized_product_is_that_of_the_cpu_to_the_bit() {
    for_activations!(check_quant_linear);
}

/// The largest sums of a group that there are, above and below zero, and coded weights that use every scale.
#[test]
fn the_largest_integers_are_exact() {
    let mut numbers = Numbers::new(22);
    for format in formats().filter(|format| format.codes != Codes::Int4Double && !format.codes.are_rotated()) {
        let largest = format.codes.largest();
        let weight = PackedWeight::from_groups(format, 40, 256, |row_idx, row| {
            let code = |col: usize| if row_idx == 39 { (col * 37) as u8 } else { [largest, 0][row_idx % 2] };
            row.codes = (0..256).map(|col| code(col) & largest).collect();
            row.scales = (0..256 / format.group()).map(|idx| (idx + row_idx) as f32 * 0.25 - 3.0).collect();
            row.mins = row.scales.iter().map(|scale| 1.0 - 2.0 * scale).collect();
        })
        .unwrap();
        let x = [vec![1.0; 256], vec![-1.0; 256], numbers.normal(256)].concat();
        let expected = values(&linear(&tensor(&x, &[3, 256]), &weight, None).unwrap());
        let x = all_rows(&x, 256, format);
        for tile in TILES {
            let found = device_product::<f32>(tile, &x, 3, &[quant_weight(&weight, None)]);
            assert_same(&found, &expected, &(format, tile));
        }
    }
}

#[test]
fn heads_have_weights_of_their_own() {
    let mut numbers = Numbers::new(23);
    let (num_tokens, num_heads, rows, cols) = (11, 3, 37, 100);
    for format in QUANTIZED {
        let weights: Vec<_> = (0..num_heads).map(|_| quantized(&mut numbers, format, [rows, cols])).collect();
        let x = numbers.normal(num_tokens * num_heads * cols);
        let expected = head_linear(&tensor(&x, &[num_tokens, num_heads, cols]), &weights).unwrap();
        let x = all_rows(&x, cols, format);
        let device_weights: Vec<_> = weights.iter().map(|weight| quant_weight(weight, None)).collect();
        for tile in TILES {
            let found = device_product::<f32>(tile, &x, num_tokens, &device_weights);
            assert_same(&found, &values(&expected), &(format, tile));
        }
    }
}

#[test]
fn a_product_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(24);
    let (num_tokens, rows, cols) = (21, 40, 160);
    let weight = quantized(&mut numbers, QuantFormat::INT4, [rows, cols]);
    let weight = quant_weight(&weight, None);
    let x = numbers.with_outliers(num_tokens * cols);
    let all = all_rows(&x, cols, QuantFormat::INT4);
    for tile in TILES {
        let all: Vec<bf16> = device_product(tile, &all, num_tokens, from_ref(&weight));
        for (row, all) in x.chunks(cols).zip(all.chunks(rows)) {
            let alone = all_rows(row, cols, QuantFormat::INT4);
            assert_eq!(bits(&device_product::<bf16>(TILES[0], &alone, 1, from_ref(&weight))), bits(all));
        }
    }
}

/// Nothing is summed up where there are no columns.
#[test]
fn without_columns_the_bias_is_left() {
    for format in QUANTIZED {
        let weight = PackedWeight::from_f32(WeightFormat::Quantized(format), 20, 0, &[]).unwrap();
        let bias: Vec<f32> = (0..20).map(|idx| idx as f32).collect();
        let nothing = DeviceRows { codes: Vec::new(), terms: Vec::new() };
        for tile in TILES {
            let found = device_product::<f32>(tile, &nothing, 3, &[quant_weight(&weight, Some(&bias))]);
            assert_eq!(found, bias.repeat(3));
        }
    }
}

pub(super) fn dense_weight(weight: &PackedWeight, bias: Option<&[f32]>) -> DenseWeight {
    DenseWeight::new(weight, Address::of_host(weight.as_bytes().as_ptr()), bias_of(weight, bias))
}

/// Numbers from a multiple of 16 bytes.
pub(super) struct Aligned<T> {
    numbers: Vec<T>,
    first: usize,
}

impl<T: Number> Aligned<T> {
    pub(super) fn new(values: &[T]) -> Self {
        let mut numbers = vec![T::POISON; values.len() + 16];
        let first = numbers.as_ptr().align_offset(16);
        numbers[first..first + values.len()].copy_from_slice(values);
        Self { numbers, first }
    }

    pub(super) fn as_ptr(&self) -> *const T {
        self.numbers[self.first..].as_ptr()
    }
}

/// Multiplies as one of the kernels does: (kernel, threads, outputs and tokens of a block).
fn device_dense<X: Number, T: Number>(
    (kernel, threads, outs, tokens): (&str, usize, usize, usize),
    x: &[X],
    num_tokens: usize,
    weights: &[DenseWeight],
) -> Vec<T> {
    let (num_outs, x) = (weights[0].rows as usize, Aligned::new(x));
    let [out] = outputs(num_tokens * weights.len() * num_outs, |seed, [out]: [*mut T; 1]| {
        let grid = [num_outs.div_ceil(outs), num_tokens.div_ceil(tokens), weights.len()].map(|len| len as u32);
        let shape = Launch { grid, block: [threads as u32, 1, 1], shared_bytes: 0, seed };
        let (table, only) = passed(weights, DenseWeight::NONE);
        let arguments: [&dyn Argument; 5] = [&table, &only, &x.as_ptr(), &out, &(num_tokens as u32)];
        // SAFETY: the arguments of the kernel; the input has a row for each token and weight.
        unsafe { emulator::launch(kernel, shape, &arguments) }.unwrap();
    });
    out
}

fn check_dense<X: Number, T: Number>(format: WeightFormat) {
    let mut numbers = Numbers::new(25);
    let plain = format!("plain_linear_{}_{}_{}", dense_name(format), X::NAME, T::NAME);
    let [few, many] = ["few", "many"].map(|tile| format!("dense_linear_{tile}_{}", T::NAME));
    let kernels = match (format, X::NAME) {
        (WeightFormat::Bf16, "bf16") => TILES
            .map(|(tile, outs, tokens)| (if tile == "few" { &few } else { &many }, PRODUCT_THREADS, outs, tokens))
            .to_vec(),
        _ => vec![(&plain, ROW_THREADS, PLAIN_OUTS, PLAIN_TOKENS)],
    };
    // The last have heads.
    for [num_tokens, rows, cols, num_heads] in
        [[1, 1, 1, 1], [3, 17, 64, 1], [9, 150, 333, 1], [35, 40, 136, 1], [2, 8, 0, 1], [10, 33, 48, 3], [2, 5, 7, 2]]
    {
        let values_of = |values: Vec<f32>| PackedWeight::from_f32(format, rows, cols, &values).unwrap();
        let weights: Vec<_> = (0..num_heads).map(|_| values_of(numbers.normal(rows * cols))).collect();
        let bias = (num_heads == 1).then(|| numbers.normal(rows));
        let x = stored::<X>(&numbers.with_outliers(num_tokens * num_heads * cols));
        let expected = match &bias {
            Some(bias) => linear(&tensor(&widened(&x), &[num_tokens, cols]), &weights[0], Some(&tensor(bias, &[rows]))),
            None => head_linear(&tensor(&widened(&x), &[num_tokens, num_heads, cols]), &weights),
        };
        let expected = values(&expected.unwrap());
        let weights: Vec<_> = weights.iter().map(|weight| dense_weight(weight, bias.as_deref())).collect();
        let mut found: Vec<Vec<T>> = Vec::new();
        for &(kernel, threads, outs, tokens) in &kernels {
            let kernel = (kernel.as_str(), threads, outs, tokens);
            found.push(device_dense(kernel, &x, num_tokens, &weights));
            assert_close(&widened(found.last().unwrap()), &expected, tolerance::<T>(1e-5));
            // A row alone.
            let (width, last) = (num_heads * cols, num_tokens - 1);
            let alone: Vec<T> = device_dense(kernel, &x[last * width..], 1, &weights);
            assert_eq!(bits(&alone), bits(&found[0][last * num_heads * rows..]), "{kernel:?}");
        }
        assert!(found.iter().all(|other| bits(other) == bits(&found[0])));
    }
}

#[test]
fn dense_products_agree_with_the_cpu() {
    check_dense::<bf16, f32>(WeightFormat::Bf16);
    check_dense::<bf16, bf16>(WeightFormat::Bf16);
}

#[test]
fn plain_products_agree_with_the_cpu() {
    for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
        check_dense::<f32, f32>(format);
        if format != WeightFormat::Bf16 {
            check_dense::<bf16, f32>(format);
            check_dense::<bf16, bf16>(format);
        }
    }
}

/// A row that is none spoils no other, and no output is spoilt by what lies behind a row.
#[test]
fn a_nan_stays_with_its_row() {
    let mut numbers = Numbers::new(26);
    for cols in [40, 37] {
        let weight = PackedWeight::from_f32(WeightFormat::Bf16, 20, cols, &numbers.normal(20 * cols)).unwrap();
        let mut x = numbers.normal(3 * cols);
        x[cols] = f32::NAN;
        let x = stored::<bf16>(&x);
        let weights = [dense_weight(&weight, None)];
        let found: Vec<f32> = device_dense(("dense_linear_few_float", PRODUCT_THREADS, 64, 8), &x, 3, &weights);
        for (row, found) in found.chunks(20).enumerate() {
            assert!(found.iter().all(|value| value.is_nan() == (row == 1)), "row {row}: {found:?}");
        }
    }
}

#[test]
fn codes_are_numbered_as_they_are_listed() {
    let listed =
        [Codes::Int8, Codes::Int8Min, Codes::Int4, Codes::Int4Min, Codes::Int8Rotated, Codes::Int4Double, Codes::Fp4];
    for (place, codes) in listed.into_iter().enumerate() {
        assert_eq!(codes as usize, place);
    }
}
