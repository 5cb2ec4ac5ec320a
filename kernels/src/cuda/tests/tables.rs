//! Rows of a table, and the best of a row.

use half::{bf16, f16};

use super::linear::{formats, quant_weight};
use super::{Number, bits, for_activations, launch, outputs, stored};
use crate::ops::argmax::argmax;
use crate::ops::embedding::embedding;
use crate::quant::Codes;
use crate::testing::{Numbers, values};
use crate::weight::{PackedWeight, WeightFormat};

fn check_embedding<Stored: Copy, T: Number>(format: WeightFormat, name: &str, table: &[Stored], rows: &[f32]) {
    let (width, ids) = (33, [4u32, 0, 4, 9]);
    let weight = PackedWeight::from_f32(format, rows.len() / width, width, rows).unwrap();
    let expected = embedding(&ids, &weight).unwrap();
    let [out] = outputs(ids.len() * width, |seed, [out]: [*mut T; 1]| {
        let (kernel, width) = (format!("embedding_{name}_{}", T::NAME), width as i32);
        // SAFETY: the arguments of the kernel; all ids are in the table.
        unsafe { launch(&kernel, ids.len(), seed, &[&ids.as_ptr(), &table.as_ptr(), &out, &width]) };
    });
    assert_eq!(bits(&out), bits(&stored::<T>(&values(&expected))), "{name} to {}", T::NAME);
}

#[test]
fn embeddings_are_the_rows_of_the_table() {
    let rows = Numbers::new(6).with_outliers(10 * 33);
    let halves: Vec<f16> = rows.iter().map(|&value| f16::from_f32(value)).collect();
    let brains = stored::<bf16>(&rows);
    check_embedding::<_, f32>(WeightFormat::F32, "float", &rows, &rows);
    check_embedding::<_, bf16>(WeightFormat::F32, "float", &rows, &rows);
    check_embedding::<_, f32>(WeightFormat::F16, "f16", &halves, &rows);
    check_embedding::<_, bf16>(WeightFormat::F16, "f16", &halves, &rows);
    check_embedding::<_, f32>(WeightFormat::Bf16, "bf16", &brains, &rows);
    check_embedding::<_, bf16>(WeightFormat::Bf16, "bf16", &brains, &rows);
}

fn check_quantized_embedding<T: Number>() {
    let mut numbers = Numbers::new(8);
    // Across panels, of a part of a group, of all warps and beyond.
    for [rows, cols] in [[40, 63], [17, 200], [3, 1100]] {
        let ids: Vec<u32> = [0, rows - 1, 1, rows / 2, rows - 1].map(|id| id as u32).to_vec();
        let table = numbers.with_outliers(rows * cols);
        for format in formats() {
            let table = PackedWeight::from_f32(WeightFormat::Quantized(format), rows, cols, &table).unwrap();
            let expected = embedding(&ids, &table).unwrap();
            let [out] = outputs(ids.len() * cols, |seed, [out]: [*mut T; 1]| {
                let kernel = format!("embedding_quant_{}", T::NAME);
                let table = quant_weight(&table, None);
                // SAFETY: the arguments of the kernel; all ids are in the table.
                unsafe { launch(&kernel, ids.len(), seed, &[&ids.as_ptr(), &table, &out]) };
            });
            assert_eq!(bits(&out), bits(&stored::<T>(&values(&expected))), "{format:?} [{rows}, {cols}]");
        }
    }
}

#[test]
fn embeddings_of_a_quantized_table_are_those_of_the_cpu_to_the_bit() {
    for_activations!(check_quantized_embedding);
}

/// Every code, with scales below zero too.
#[test]
fn every_code_is_read_as_on_the_cpu() {
    for format in formats().filter(|format| format.codes != Codes::Int4Double) {
        let table = PackedWeight::from_groups(format, 18, 256, |row_idx, row| {
            row.codes = (0..256).map(|col| (col + row_idx) as u8 & format.codes.largest()).collect();
            row.scales = (0..256 / format.group()).map(|idx| (idx + row_idx) as f32 * 0.3 - 2.0).collect();
            row.mins = row.scales.iter().map(|scale| 1.0 - 2.0 * scale).collect();
        })
        .unwrap();
        let ids: Vec<u32> = (0..18).collect();
        let expected = embedding(&ids, &table).unwrap();
        let [out] = outputs(18 * 256, |seed, [out]: [*mut f32; 1]| {
            let table = quant_weight(&table, None);
            // SAFETY: the arguments of the kernel; all ids are in the table.
            unsafe { launch("embedding_quant_float", 18, seed, &[&ids.as_ptr(), &table, &out]) };
        });
        assert_eq!(bits(&out), bits(&values(&expected)), "{format:?}");
    }
}

/// Numbers through a table of one row.
fn converted<Stored, T: Number>(kernel: &str, table: &[Stored]) -> Vec<T> {
    let [out] = outputs(table.len(), |seed, [out]: [*mut T; 1]| {
        let (id, width) = (0u32, table.len() as i32);
        // SAFETY: the arguments of the kernel; the table has a first row.
        unsafe { launch(kernel, 1, seed, &[&std::ptr::from_ref(&id), &table.as_ptr(), &out, &width]) };
    });
    out
}

#[test]
fn every_half_is_widened_and_every_kind_of_number_rounded() {
    let halves: Vec<f16> = (0..=u16::MAX).map(f16::from_bits).collect();
    for (half, found) in halves.iter().zip(converted::<_, f32>("embedding_f16_float", &halves)) {
        let expected = half.to_f32();
        assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{half:?}: {found}");
    }
    // Around every number of bf16: what is just below and above a tie, and the tie.
    let rest = [0u32, 1, 0x7fff, 0x8000, 0x8001, 0xffff];
    let floats: Vec<f32> =
        (0..=u32::from(u16::MAX)).flat_map(|upper| rest.map(|lower| f32::from_bits(upper << 16 | lower))).collect();
    for (float, found) in floats.iter().zip(converted::<_, bf16>("embedding_float_bf16", &floats)) {
        let expected = bf16::from_f32(*float);
        assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{float:e}: {found}");
    }
}

#[test]
fn argmax_is_that_of_the_cpu() {
    let mut numbers = Numbers::new(7);
    for width in [1, 2, 255, 256, 257, 5000] {
        let mut rows: Vec<Vec<f32>> = (0..4).map(|_| numbers.normal(width)).collect();
        let (first, last) = (width / 3, width - 1);
        (rows[0][first], rows[0][last]) = (9.0, 9.0);
        rows[1][first] = f32::NAN;
        rows[2].fill(f32::NEG_INFINITY);
        (rows[3][first], rows[3][last]) = (f32::INFINITY, f32::INFINITY);
        rows.push(vec![f32::NAN; width]);
        rows.push(vec![-0.0; width]);
        let flat = rows.concat();
        let [out] = outputs(rows.len(), |seed, [out]: [*mut u32; 1]| {
            let width = width as i32;
            // SAFETY: the arguments of the kernel, with rows of `width`.
            unsafe { launch("argmax_float", rows.len(), seed, &[&flat.as_ptr(), &out, &width]) };
        });
        let expected: Vec<u32> = rows.iter().map(|row| argmax(row).map_or(u32::MAX, |idx| idx as u32)).collect();
        assert_eq!(out, expected, "rows of {width}");
    }
}
