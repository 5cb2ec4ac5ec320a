//! Parity with the oracle, row invariance to the bit, and refused inputs.

use candle_core::{DType, Tensor};

use super::{linear, reference};
use crate::testing::{Numbers, assert_close, bits, tensor, values};
use crate::weight::{PackedWeight, WeightFormat};

const FORMATS: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16];

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    let shapes =
        [(0, 5, 7), (1, 1, 1), (1, 33, 17), (3, 8, 16), (7, 37, 75), (50, 64, 576), (97, 31, 1537), (2, 100, 0)];
    for (num_tokens, rows, cols) in shapes {
        for format in FORMATS {
            let weight = PackedWeight::from_f32(format, rows, cols, &numbers.normal(rows * cols)).unwrap();
            let x = numbers.with_outliers(num_tokens * cols);
            let bias = numbers.normal(rows);
            let expected = match cols {
                0 => bias.repeat(num_tokens),
                _ => reference(&x, &weight, Some(&bias)),
            };
            let y = linear(&tensor(&x, &[num_tokens, cols]), &weight, Some(&tensor(&bias, &[rows]))).unwrap();
            assert_eq!(y.dims(), [num_tokens, rows]);
            assert_close(&values(&y), &expected, 1e-5);
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(2);
    for (format, rows, cols) in [(FORMATS[0], 37, 75), (FORMATS[1], 70, 64), (FORMATS[2], 530, 129)] {
        let weight = PackedWeight::from_f32(format, rows, cols, &numbers.normal(rows * cols)).unwrap();
        let x = numbers.tensor(&[120, cols]);
        let alone: Vec<_> =
            (0..120).map(|row| bits(&linear(&x.narrow(0, row, 1).unwrap(), &weight, None).unwrap())).collect();
        for num_tokens in (1..=40).chain([47, 48, 49, 96, 120]) {
            for first in [0, 120 - num_tokens] {
                let batch = bits(&linear(&x.narrow(0, first, num_tokens).unwrap(), &weight, None).unwrap());
                assert_eq!(batch, alone[first..first + num_tokens].concat(), "{num_tokens} rows from {first}");
            }
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let mut numbers = Numbers::new(3);
    let weight = PackedWeight::from_f32(WeightFormat::F32, 4, 6, &numbers.normal(24)).unwrap();
    let x = numbers.tensor(&[2, 6]);
    let message = |x: &Tensor, bias: Option<&Tensor>| linear(x, &weight, bias).unwrap_err().to_string();
    assert_eq!(message(&numbers.tensor(&[2, 5]), None), "linear: x has shape [2, 5], expected [2, 6]");
    let cube = numbers.tensor(&[1, 2, 6]);
    assert_eq!(message(&cube, None), "linear: x has shape [1, 2, 6], expected [num_tokens, in_features]");
    assert_eq!(message(&x.to_dtype(DType::F64).unwrap(), None), "linear: x is F64, expected F32");
    assert_eq!(message(&numbers.tensor(&[6, 2]).t().unwrap(), None), "linear: x is not contiguous");
    assert_eq!(message(&x, Some(&numbers.tensor(&[5]))), "linear: bias has shape [5], expected [4]");
}
