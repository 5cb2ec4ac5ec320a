//! Rows survive packing, products agree with the oracle, and neither company nor instruction set changes a bit.

use std::sync::Arc;

use super::activations::QuantizedRows;
use super::block::{QuantBlock, WideBlock};
use super::{Codes, GroupRow, Layout, QuantFormat, reference};
use crate::dispatch::{ByWidth, Isa};
use crate::mapped_file::MappedFile;
use crate::testing::{Numbers, QUANTIZED, assert_close};
use crate::weight::{PackedWeight, WeightFormat};

/// Rows and columns: nothing, one, tails of panels and groups, sizes of published models.
const SHAPES: [[usize; 2]; 8] = [[0, 7], [3, 0], [1, 1], [16, 64], [17, 63], [33, 75], [40, 576], [64, 1024]];

fn quantized(format: QuantFormat, [rows, cols]: [usize; 2], values: &[f32]) -> PackedWeight {
    PackedWeight::from_f32(WeightFormat::Quantized(format), rows, cols, values).unwrap()
}

/// Exactly what a coded row stands for.
fn expected(format: QuantFormat, row: &GroupRow) -> Vec<f32> {
    let number = |idx: usize, code: u8| {
        let (scale, min) = (row.scales[idx / format.group()], row.mins[idx / format.group()]);
        match format.codes {
            Codes::Int8 => scale * (f32::from(code) - 128.0),
            Codes::Int4 => scale * (f32::from(code) - 8.0),
            Codes::Int8Min | Codes::Int4Min => scale * f32::from(code) + min,
            Codes::Int8Rotated | Codes::Int4Double => unreachable!("codes of these are made by quantizing only"),
            Codes::Fp4 => {
                let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
                if code < 8 { scale * magnitude } else { -scale * magnitude }
            }
        }
    };
    row.codes.iter().enumerate().map(|(idx, &code)| number(idx, code)).collect()
}

/// Codes that use every value, scales and minima that f16 holds, over many powers of two.
fn coded_row(format: QuantFormat, cols: usize, seed: usize) -> GroupRow {
    let mut numbers = Numbers::new(seed as u64);
    let num_groups = cols.div_ceil(format.group());
    let mut scale = || half::f16::from_f32(numbers.normal(1)[0] * 0.01).to_f32();
    let scales = (0..num_groups).map(|_| scale()).collect();
    let mins = (0..num_groups).map(|_| scale()).collect();
    let codes = (0..cols).map(|_| numbers.below(usize::from(format.codes.largest()) + 1) as u8).collect();
    GroupRow { codes, scales, mins }
}

#[test]
fn coded_rows_survive_in_any_order_and_place() {
    for format in QUANTIZED {
        for [rows, cols] in SHAPES {
            let weight = PackedWeight::from_groups(format, rows, cols, |row_idx, row| {
                *row = coded_row(format, cols, row_idx);
            })
            .unwrap();
            let values: Vec<Vec<f32>> = match format.codes {
                Codes::Int8Rotated | Codes::Int4Double => {
                    weight.to_f32().chunks(cols.max(1)).map(<[f32]>::to_vec).collect()
                }
                _ => (0..rows).map(|row| expected(format, &coded_row(format, cols, row))).collect(),
            };
            let values = if cols == 0 { vec![Vec::new(); rows] } else { values };
            assert_eq!(weight.to_f32(), values.concat(), "{format:?} [{rows}, {cols}]");
            let picked: Vec<usize> = (0..rows).rev().step_by(3).collect();
            let selected = weight.select_rows(&picked).unwrap();
            assert_eq!(selected.to_f32(), picked.iter().flat_map(|&row| values[row].clone()).collect::<Vec<_>>());
            let stacked = PackedWeight::concat_rows(&[&selected, &weight, &weight]).unwrap();
            assert_eq!(stacked.to_f32(), [selected.to_f32(), values.concat(), values.concat()].concat());
            assert_eq!(stacked.num_bytes(), stacked.as_bytes().len());
        }
    }
}

#[test]
fn rounding_errors_are_bounded_by_the_step() {
    let mut numbers = Numbers::new(1);
    for format in QUANTIZED {
        for shape @ [rows, cols] in SHAPES {
            let values: Vec<f32> = numbers.normal(rows * cols).into_iter().map(|value| value * 0.02).collect();
            let weight = quantized(format, shape, &values);
            let group = format.group();
            for (row, got) in values.chunks(cols.max(1)).zip(weight.to_f32().chunks(cols.max(1))) {
                let largest_of_row = row.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                for (values, got) in row.chunks(group).zip(got.chunks(group)) {
                    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
                    // Half a step; a range may be cut on both sides for a smaller step.
                    let bound = match format.codes {
                        Codes::Int8 => largest / 250.0,
                        // Errors of a turned block add up in any of its numbers, at random.
                        Codes::Int8Rotated => largest / 50.0,
                        // Half a step as above, and the rounding of scale and minimum by the largest of the row.
                        Codes::Int4Double => largest * 2.0 * (0.075 + 0.04) + largest_of_row * 0.03,
                        Codes::Int8Min => largest * 2.0 * (0.075 + 0.01),
                        Codes::Int4 => largest * 1.1 / 8.0,
                        Codes::Int4Min => largest * 2.0 * (0.075 + 0.04),
                        Codes::Fp4 => largest / 3.0,
                    };
                    for (got, value) in got.iter().zip(values) {
                        assert!((got - value).abs() <= bound, "{format:?}: {got} for {value}, bound {bound}");
                    }
                }
            }
        }
    }
}

#[test]
fn sizes_are_as_promised() {
    for (format, share) in [(QuantFormat::INT8, 0.27), (QuantFormat::INT4, 0.15)] {
        for [rows, cols] in [[1024, 1024], [1024, 512], [2048, 2048]] {
            let bytes = WeightFormat::Quantized(format).bytes_for(rows, cols) as f64;
            assert!(bytes <= share * (rows * cols * 4) as f64, "{format:?} [{rows}, {cols}]: {bytes}");
        }
    }
}

#[test]
fn packed_bytes_are_self_contained() {
    let mut numbers = Numbers::new(2);
    for format in QUANTIZED {
        let weight = quantized(format, [33, 75], &numbers.normal(33 * 75));
        let whole = WeightFormat::Quantized(format);
        let copy = PackedWeight::from_bytes(whole, 33, 75, weight.as_bytes()).unwrap();
        assert_eq!(copy.to_f32(), weight.to_f32());
        let path = std::env::temp_dir().join(format!("moesaic-quantized-{}", std::process::id()));
        std::fs::write(&path, [&[0; 64], weight.as_bytes()].concat()).unwrap();
        let file = Arc::new(MappedFile::open(&path).unwrap());
        std::fs::remove_file(path).unwrap();
        let mapped = PackedWeight::mapped(file.clone(), 64, whole, 33, 75).unwrap();
        assert!(format!("{mapped:?}").ends_with("mapped)"));
        assert_eq!(mapped.to_f32(), weight.to_f32());
        assert!(PackedWeight::mapped(file, 128, whole, 33, 75).is_err());
    }
}

#[test]
fn numbers_that_are_none_are_refused() {
    for format in QUANTIZED {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut values = vec![1.0; 20 * 64];
            values[18 * 64 + 5] = bad;
            let error = PackedWeight::from_f32(WeightFormat::Quantized(format), 20, 64, &values).unwrap_err();
            assert_eq!(error.to_string(), "weight: row 18 has a scale that is not finite", "{format:?} {bad}");
        }
    }
    let odd = WeightFormat::Quantized(QuantFormat { codes: Codes::Int8, group: 48 });
    assert!(PackedWeight::from_f32(odd, 1, 48, &[0.0; 48]).is_err());
    assert!(PackedWeight::from_bytes(odd, 1, 48, &[0; 900]).is_err());
}

/// Products of rows on one path.
fn product(isa: Isa, x: &QuantizedRows, rows: &[u32], weight: &PackedWeight, outs: std::ops::Range<usize>) -> Vec<f32> {
    let WeightFormat::Quantized(format) = weight.format() else { panic!("not quantized") };
    let mut out = vec![0.0; rows.len() * outs.len()];
    let layout = Layout::new(format, weight.cols());
    let block = QuantBlock { x, rows, layout, weight: weight.as_bytes(), outs, out: &mut out };
    isa.run_by_width(WideBlock(block));
    out
}

#[test]
fn products_agree_with_the_reference_on_every_path() {
    let mut numbers = Numbers::new(3);
    for format in QUANTIZED {
        for shape @ [rows, cols] in SHAPES {
            let weight = quantized(format, shape, &numbers.normal(rows * cols));
            let x = numbers.with_outliers(9 * cols);
            let quantized_x = QuantizedRows::new(&x, cols, format.row_form());
            let layout = Layout::new(format, cols);
            for num_rows in if cols == 0 { 0..0 } else { 1..9 } {
                let picked: Vec<u32> = (0..num_rows).map(|row| 8 - row).collect();
                let expected: Vec<f32> = picked
                    .iter()
                    .flat_map(|&row| reference(&x[row as usize * cols..][..cols], &layout, weight.as_bytes(), rows))
                    .collect();
                let results: Vec<Vec<f32>> = Isa::available()
                    .into_iter()
                    .map(|isa| product(isa, &quantized_x, &picked, &weight, 0..rows))
                    .collect();
                assert_close(&results[0], &expected, 2e-6);
                for result in &results {
                    assert!(result.iter().zip(&results[0]).all(|(a, b)| a.to_bits() == b.to_bits()), "{format:?}");
                }
            }
        }
    }
}

#[test]
fn narrow_blocks_give_the_bits_of_wide_ones() {
    let mut numbers = Numbers::new(8);
    let large_groups = [Codes::Int8, Codes::Fp4].map(|codes| QuantFormat { codes, group: 128 });
    for format in QUANTIZED.into_iter().chain(large_groups).chain([QuantFormat::INT4]) {
        for [rows, cols] in [[1, 1], [33, 75], [70, 300]] {
            let random = numbers.normal(rows * cols);
            // The largest code of each format everywhere but in every 16th column, which the others differ from.
            let largest: Vec<f32> = (0..rows * cols).map(|idx| f32::from(idx % cols % 16 != 0)).collect();
            let mut x = numbers.with_outliers(100 * cols);
            x[3 * cols] = f32::NAN;
            // As are the codes of some rows.
            x[5 * cols..9 * cols].fill(1.0);
            x[9 * cols..11 * cols].fill(-1.0);
            let x = QuantizedRows::new(&x, cols, format.row_form());
            for weight in [random, largest].map(|values| quantized(format, [rows, cols], &values)) {
                let layout = Layout::new(format, cols);
                for num_rows in [1, 2, 3, 4, 5, 6, 7, 12, 48, 49, 99] {
                    let picked: Vec<u32> = (0..num_rows).map(|row| 99 - row).rev().collect();
                    let outs = numbers.below(rows)..rows;
                    for isa in Isa::available() {
                        let block = |out| QuantBlock {
                            x: &x,
                            rows: &picked,
                            layout,
                            weight: weight.as_bytes(),
                            outs: outs.clone(),
                            out,
                        };
                        let [mut wide, mut narrow] = [(); 2].map(|()| vec![f32::INFINITY; picked.len() * outs.len()]);
                        isa.run(WideBlock(block(&mut wide)));
                        isa.run(WideBlock(block(&mut narrow)).narrow());
                        let same = wide.iter().zip(&narrow).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same, "{format:?} [{rows}, {cols}], {num_rows} rows");
                    }
                }
            }
        }
    }
}

#[test]
fn a_product_does_not_depend_on_its_company() {
    let mut numbers = Numbers::new(4);
    for format in QUANTIZED {
        let weight = quantized(format, [70, 200], &numbers.normal(70 * 200));
        let x = numbers.with_outliers(48 * 200);
        let all = QuantizedRows::new(&x, 200, format.row_form());
        let isa = Isa::available()[0];
        let whole = product(isa, &all, &(0..48).collect::<Vec<_>>(), &weight, 0..70);
        for row in 0..48 {
            let alone = QuantizedRows::new(&x[row * 200..(row + 1) * 200], 200, format.row_form());
            let first = row % 30;
            // Outputs that start and end within panels.
            let outs = first..(first + 32).min(70);
            let got = product(isa, &alone, &[0], &weight, outs.clone());
            let same = whole[row * 70..(row + 1) * 70][outs].iter().zip(&got).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(same, "{format:?} row {row}");
        }
    }
}

#[test]
fn what_is_no_number_stays_with_its_row() {
    let mut numbers = Numbers::new(5);
    let weight = quantized(QuantFormat::INT8, [16, 128], &numbers.normal(16 * 128));
    let mut x = numbers.normal(3 * 128);
    (x[130], x[2 * 128 + 1]) = (f32::NAN, f32::NEG_INFINITY);
    let x = QuantizedRows::new(&x, 128, QuantFormat::INT8.row_form());
    for isa in Isa::available() {
        let y = product(isa, &x, &[0, 1, 2], &weight, 0..16);
        assert!(y[..16].iter().all(|y| y.is_finite()) && y[16..].iter().all(|y| y.is_nan()));
    }
    // Numbers too small to be divided by are as good as zero.
    let tiny = QuantizedRows::new(&[1e-44; 64], 64, QuantFormat::INT8.row_form());
    assert!(tiny.terms(0).iter().all(|terms| terms.scale.is_finite()));
}

/// The product on tiles, on every vector path beside them.
#[cfg(target_arch = "x86_64")]
fn tile_products<U: crate::amx::TileUnit>(unit: U, case: &TileCase<'_>) -> Vec<Vec<f32>> {
    let TileCase { x, rows, weight, outs } = case;
    let WeightFormat::Quantized(format) = weight.format() else { panic!("not quantized") };
    let layout = Layout::new(format, weight.cols());
    let on = |isa: Isa| {
        let mut out = vec![f32::NAN; rows.len() * outs.len()];
        let block = QuantBlock { x, rows, layout, weight: weight.as_bytes(), outs: outs.clone(), out: &mut out };
        super::tiles::multiply_on(isa, block, unit);
        out
    };
    Isa::available().into_iter().map(on).collect()
}

#[cfg(target_arch = "x86_64")]
struct TileCase<'a> {
    x: &'a QuantizedRows,
    rows: &'a [u32],
    weight: &'a PackedWeight,
    outs: std::ops::Range<usize>,
}

#[cfg(target_arch = "x86_64")]
#[test]
fn tiles_give_the_bits_of_vectors() {
    let mut numbers = Numbers::new(6);
    let large_groups = [Codes::Int8, Codes::Fp4].map(|codes| QuantFormat { codes, group: 128 });
    for format in QUANTIZED.into_iter().chain(large_groups).chain([QuantFormat::INT4]) {
        for [rows, cols] in [[1, 1], [17, 63], [33, 75], [70, 300]] {
            let weight = quantized(format, [rows, cols], &numbers.normal(rows * cols));
            let mut x = numbers.with_outliers(120 * cols);
            x[3 * cols] = f32::NAN;
            let x = QuantizedRows::new(&x, cols, format.row_form());
            // In order, two apart, backwards, and picked at random with some twice.
            let picks: [Vec<u32>; 4] = [
                (2..50).collect(),
                (0..33).map(|row| 2 * row).collect(),
                (0..17).rev().collect(),
                (0..55).map(|_| numbers.below(120) as u32).collect(),
            ];
            for pick in &picks {
                for num_rows in [1, 16, pick.len()] {
                    let outs = numbers.below(rows)..rows;
                    let case = TileCase { x: &x, rows: &pick[..num_rows], weight: &weight, outs: outs.clone() };
                    let expected = product(Isa::available()[0], &x, case.rows, &weight, outs);
                    for found in tile_products(crate::amx::Emulation, &case) {
                        let same = found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits());
                        assert!(same && found.len() == expected.len(), "{format:?} [{rows}, {cols}], {num_rows} rows");
                    }
                }
            }
        }
    }
}

/// The instructions themselves: the processor's, or answered by the emulation.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
#[test]
fn tile_instructions_give_the_bits_of_vectors() {
    let mut numbers = Numbers::new(7);
    for format in QUANTIZED {
        let weight = quantized(format, [50, 200], &numbers.normal(50 * 200));
        let x = QuantizedRows::new(&numbers.with_outliers(48 * 200), 200, format.row_form());
        for rows in [(0..48).collect::<Vec<_>>(), (0..21).rev().collect()] {
            let case = TileCase { x: &x, rows: &rows, weight: &weight, outs: 3..50 };
            let expected = product(Isa::available()[0], &x, &rows, &weight, 3..50);
            for found in tile_products(crate::amx::instructions(), &case) {
                assert!(found.iter().zip(&expected).all(|(a, b)| a.to_bits() == b.to_bits()), "{format:?}");
            }
        }
    }
}
