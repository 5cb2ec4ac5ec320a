//! Weights on the device, and products with them.

use candle_core::{DType, Device, Tensor};

use super::{DEVICE, F32_TOLERANCE, assert_same, moved, on_both};
use crate::cuda::tests::linear::formats;
use crate::ops::head_linear::head_linear;
use crate::ops::linear::{linear, linear_f32};
use crate::quant::{Codes, QuantFormat};
use crate::testing::{Numbers, QUANTIZED, bits, tensor, values};
use crate::weight::{PackedWeight, WeightFormat};

const DENSE: [WeightFormat; 3] = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16];

fn weight(numbers: &mut Numbers, format: WeightFormat, [rows, cols]: [usize; 2]) -> PackedWeight {
    PackedWeight::from_f32(format, rows, cols, &numbers.normal(rows * cols)).unwrap()
}

fn on_device(weight: &PackedWeight) -> PackedWeight {
    weight.to_device(&DEVICE).unwrap()
}

/// The device's numbers are those of the CPU to the bit, where a NaN is as good as any other.
#[track_caller]
pub(super) fn assert_equal(found: &Tensor, expected: &Tensor) {
    assert!(found.device().is_cuda());
    assert_eq!((found.dims(), found.dtype()), (expected.dims(), expected.dtype()));
    let of = |tensor: &Tensor| {
        let numbers = values(&tensor.to_device(&Device::Cpu).unwrap().to_dtype(DType::F32).unwrap());
        numbers.into_iter().map(|value| if value.is_nan() { None } else { Some(value.to_bits()) }).collect::<Vec<_>>()
    };
    let (found, expected) = (of(found), of(expected));
    let differs = found.iter().zip(&expected).position(|(found, expected)| found != expected);
    assert_eq!(differs, None, "an entry differs");
}

#[test]
fn weights_come_back_as_they_were() {
    let mut numbers = Numbers::new(40);
    for format in DENSE.into_iter().chain(QUANTIZED.map(WeightFormat::Quantized)) {
        for shape in [[37, 70], [1, 1], [0, 5]] {
            let weight = weight(&mut numbers, format, shape);
            let there = on_device(&weight);
            assert!(there.device().same_device(&DEVICE));
            assert_eq!((there.rows(), there.cols(), there.format()), (shape[0], shape[1], format));
            assert_eq!(there.num_bytes(), weight.num_bytes());
            let back = on_device(&there).to_device(&Device::Cpu).unwrap();
            assert_eq!(back.as_bytes(), weight.as_bytes());
        }
    }
}

#[test]
fn the_host_does_not_have_what_is_on_the_device() {
    let mut numbers = Numbers::new(41);
    let host = weight(&mut numbers, WeightFormat::F32, [2, 3]);
    let there = on_device(&host);
    assert_eq!(format!("{there:?}"), "PackedWeight(f32 [2, 3], on Cuda { gpu_id: 0 })");
    assert!(there.place().is_none() && there.clone().into_range().is_none());
    let message = |result: crate::Result<PackedWeight>| result.unwrap_err().to_string();
    let expected = "is on another device";
    assert!(message(there.select_rows(&[0])).contains(expected));
    assert!(message(PackedWeight::concat_rows(&[&host, &there])).contains(expected));
    assert!(message(there.clone().convert(WeightFormat::Bf16)).contains(expected));
    assert!(there.clone().convert(WeightFormat::F32).is_ok());
    assert!(std::panic::catch_unwind(|| there.as_bytes().len()).is_err());
    assert!(std::panic::catch_unwind(|| there.to_f32()).is_err());
}

/// Each pair of activations and weights, beside the CPU.
#[test]
fn products_with_dense_weights() {
    let mut numbers = Numbers::new(42);
    for [num_tokens, rows, cols] in [[1, 1, 1], [3, 37, 64], [9, 150, 75], [33, 70, 40]] {
        for format in DENSE {
            let weight = weight(&mut numbers, format, [rows, cols]);
            let (there, bias) = (on_device(&weight), numbers.tensor(&[rows]));
            for (x, device_x, tolerance) in on_both(&numbers.tensor(&[num_tokens, cols])) {
                let expected = linear(&x, &weight, Some(&bias)).unwrap();
                let found = linear(&device_x, &there, Some(&moved(&bias))).unwrap();
                assert_same(&found, &expected, (device_x.dtype(), tolerance));
                let found = linear_f32(&device_x, &there, Some(&moved(&bias))).unwrap();
                assert_same(&found, &expected, (DType::F32, F32_TOLERANCE));
                assert_same(
                    &linear(&device_x, &there, None).unwrap(),
                    &linear(&x, &weight, None).unwrap(),
                    (device_x.dtype(), tolerance),
                );
            }
        }
    }
}

#[test]
fn products_with_quantized_weights_are_those_of_the_cpu_to_the_bit() {
    let mut numbers = Numbers::new(43);
    for (num_tokens, [rows, cols]) in [(1, [1, 1]), (3, [17, 63]), (9, [150, 300]), (33, [70, 16])] {
        let all = num_tokens == 3;
        for format in formats().filter(|format| all || QUANTIZED.contains(format)) {
            let weight = weight(&mut numbers, WeightFormat::Quantized(format), [rows, cols]);
            let (there, bias) = (on_device(&weight), numbers.tensor(&[rows]));
            let mut x = numbers.with_outliers(num_tokens * cols);
            if num_tokens > 1 {
                x[cols + cols / 2] = f32::NAN;
            }
            for (x, device_x, _) in on_both(&tensor(&x, &[num_tokens, cols])) {
                let expected = linear(&x, &weight, Some(&bias)).unwrap();
                let found = linear_f32(&device_x, &there, Some(&moved(&bias))).unwrap();
                assert_equal(&found, &expected);
                let found = linear(&device_x, &there, None).unwrap();
                assert_equal(&found, &linear(&x, &weight, None).unwrap().to_dtype(device_x.dtype()).unwrap());
            }
        }
    }
}

#[test]
fn heads_have_weights_of_their_own() {
    let mut numbers = Numbers::new(44);
    let formats = DENSE.into_iter().chain([QuantFormat::INT4, QuantFormat::INT8].map(WeightFormat::Quantized));
    for format in formats {
        for [num_tokens, num_heads, rows, cols] in [[1, 1, 5, 3], [11, 3, 37, 72], [8, 2, 130, 50]] {
            let weights: Vec<_> = (0..num_heads).map(|_| weight(&mut numbers, format, [rows, cols])).collect();
            let there: Vec<_> = weights.iter().map(on_device).collect();
            for (x, device_x, tolerance) in on_both(&numbers.tensor(&[num_tokens, num_heads, cols])) {
                let found = head_linear(&device_x, &there).unwrap();
                let expected = head_linear(&x, &weights).unwrap();
                assert_same(&found, &expected, (device_x.dtype(), tolerance));
                if matches!(format, WeightFormat::Quantized(_)) {
                    assert_equal(&found, &expected.to_dtype(device_x.dtype()).unwrap());
                }
            }
        }
    }
    let of = |numbers: &mut Numbers, codes| {
        let format = QuantFormat { codes, group: 32 };
        weight(numbers, WeightFormat::Quantized(format), [20, 40])
    };
    // Other codes for the same rows go together, other rows do not.
    let mut weights = vec![of(&mut numbers, Codes::Int4), of(&mut numbers, Codes::Int8)];
    let x = numbers.tensor(&[3, 2, 40]);
    let there: Vec<_> = weights.iter().map(on_device).collect();
    assert_equal(&head_linear(&moved(&x), &there).unwrap(), &head_linear(&x, &weights).unwrap());
    weights[1] = weight(&mut numbers, WeightFormat::Bf16, [20, 40]);
    assert!(head_linear(&x, &weights).is_ok());
    let there: Vec<_> = weights.iter().map(on_device).collect();
    let error = head_linear(&moved(&x), &there).unwrap_err().to_string();
    assert!(error.contains("int4 and bf16"), "{error}");
}

/// A part of a tensor, as candle has no memory of no bytes.
#[test]
fn there_may_be_no_rows() {
    let mut numbers = Numbers::new(48);
    for format in [WeightFormat::Bf16, WeightFormat::F32, WeightFormat::Quantized(QuantFormat::INT8)] {
        let weight = on_device(&weight(&mut numbers, format, [20, 40]));
        for (_, x, _) in on_both(&numbers.tensor(&[3, 40])) {
            let nothing = x.narrow(0, 0, 0).unwrap();
            assert_eq!(linear(&nothing, &weight, None).unwrap().dims(), [0, 20]);
            let nothing = nothing.reshape((0, 1, 40)).unwrap();
            assert_eq!(head_linear(&nothing, std::slice::from_ref(&weight)).unwrap().dims(), [0, 1, 20]);
        }
    }
}

/// Rows from an odd place on, which matrix instructions cannot load, and heads that are a part of a tensor.
#[test]
fn inputs_may_begin_anywhere() {
    let mut numbers = Numbers::new(45);
    let weight = weight(&mut numbers, WeightFormat::Bf16, [20, 40]);
    for (x, device_x, tolerance) in on_both(&numbers.tensor(&[3 * 40 + 1])) {
        let part = |x: &Tensor| x.narrow(0, 1, 3 * 40).unwrap().reshape((3, 40)).unwrap();
        assert_same(
            &linear(&part(&device_x), &on_device(&weight), None).unwrap(),
            &linear(&part(&x), &weight, None).unwrap(),
            (device_x.dtype(), tolerance),
        );
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(46);
    for format in [WeightFormat::Bf16, WeightFormat::F32, WeightFormat::Quantized(QuantFormat::INT4)] {
        let weight = on_device(&weight(&mut numbers, format, [70, 96]));
        for (_, x, _) in on_both(&numbers.tensor(&[40, 96])) {
            let of = |first: usize, len: usize| {
                let out = linear_f32(&x.narrow(0, first, len).unwrap(), &weight, None).unwrap();
                bits(&out.to_device(&Device::Cpu).unwrap())
            };
            let all = of(0, 40);
            for (first, len) in [(0, 1), (17, 1), (3, 8), (31, 9)] {
                assert_eq!(of(first, len), all[first * 70..(first + len) * 70]);
            }
        }
    }
}

#[test]
fn refuses_a_weight_that_is_elsewhere() {
    let mut numbers = Numbers::new(47);
    let host = weight(&mut numbers, WeightFormat::F32, [4, 6]);
    let (there, x) = (on_device(&host), numbers.tensor(&[2, 6]));
    let message = |result: crate::Result<Tensor>| result.unwrap_err().to_string();
    assert_eq!(message(linear(&moved(&x), &host, None)), "linear: weight is on another device");
    assert_eq!(message(linear(&x, &there, None)), "linear: weight is on another device");
    let heads = x.reshape((2, 1, 6)).unwrap();
    assert!(message(head_linear(&moved(&heads), &[host])).starts_with("head_linear: a head's weight is on"));
    // A bias is f32, on the device.
    let bias = numbers.tensor(&[4]);
    assert!(linear(&moved(&x), &there, Some(&bias)).is_err());
    assert!(linear(&moved(&x), &there, Some(&moved(&bias.to_dtype(DType::BF16).unwrap()))).is_err());
}
