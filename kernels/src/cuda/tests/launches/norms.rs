//! Norms and rotation.

use candle_core::DType;

use super::{assert_same, moved, on_both};
use crate::ops::layer_norm::layer_norm;
use crate::ops::rms_norm::{rms_norm, rms_norm_residual};
use crate::ops::rope::{RopeStyle, RopeTable, rope};
use crate::testing::Numbers;

#[test]
fn norms() {
    let mut numbers = Numbers::new(1);
    let (x, residual) = (numbers.tensor(&[5, 3, 40]), numbers.tensor(&[5, 3, 40]));
    let (weight, bias) = (numbers.tensor(&[40]), numbers.tensor(&[40]));
    for ((x, device_x, tolerance), (residual, device_residual, _)) in on_both(&x).into_iter().zip(on_both(&residual)) {
        let found = rms_norm(&device_x, &moved(&weight), 0.5).unwrap();
        assert_same(&found, &rms_norm(&x, &weight, 0.5).unwrap(), (device_x.dtype(), tolerance));
        let found = rms_norm_residual(&device_x, &device_residual, &moved(&weight), 0.5).unwrap();
        let expected = rms_norm_residual(&x, &residual, &weight, 0.5).unwrap();
        assert_same(&found.0, &expected.0, (device_x.dtype(), tolerance));
        assert_same(&found.1, &expected.1, (device_x.dtype(), tolerance));
        let found = layer_norm(&device_x, &moved(&weight), &moved(&bias), 0.5).unwrap();
        assert_same(&found, &layer_norm(&x, &weight, &bias, 0.5).unwrap(), (device_x.dtype(), tolerance));
    }
}

/// A tensor may begin within the memory of another.
#[test]
fn parts_of_a_tensor() {
    let mut numbers = Numbers::new(2);
    let (x, weight) = (numbers.tensor(&[6, 8]), numbers.tensor(&[8]));
    for (x, device_x, tolerance) in on_both(&x) {
        let found = rms_norm(&device_x.narrow(0, 2, 3).unwrap(), &moved(&weight), 1e-5).unwrap();
        let expected = rms_norm(&x.narrow(0, 2, 3).unwrap(), &weight, 1e-5).unwrap();
        assert_same(&found, &expected, (device_x.dtype(), tolerance));
    }
}

#[test]
fn no_rows() {
    let empty = moved(&Numbers::new(3).tensor(&[1, 8])).narrow(0, 0, 0).unwrap();
    let weight = moved(&Numbers::new(3).tensor(&[8]));
    assert_eq!(rms_norm(&empty, &weight, 1e-5).unwrap().dims(), [0, 8]);
}

#[test]
fn norms_refuse_what_does_not_fit() {
    let mut numbers = Numbers::new(4);
    let (x, weight) = (numbers.tensor(&[2, 8]), numbers.tensor(&[8]));
    let in_bf16 = moved(&weight.to_dtype(DType::BF16).unwrap());
    assert!(rms_norm(&moved(&x), &in_bf16, 1e-5).is_err());
    assert!(rms_norm(&moved(&x), &weight, 1e-5).is_err());
    let residual = moved(&x.to_dtype(DType::BF16).unwrap());
    let fault = rms_norm_residual(&moved(&x), &residual, &moved(&weight), 1e-5).unwrap_err();
    assert_eq!(fault.to_string(), "rms_norm: residual is BF16, expected F32");
    assert!(rms_norm(&moved(&x).t().unwrap(), &moved(&weight), 1e-5).is_err());
}

#[test]
fn rotation() {
    let mut numbers = Numbers::new(5);
    let (num_positions, rotary_dim) = (7, 12);
    let angles = numbers.normal(num_positions * rotary_dim / 2);
    let [cos, sin] = [f32::cos, f32::sin].map(|function| angles.iter().map(|&angle| function(angle)).collect());
    let table = RopeTable::new(cos, sin, rotary_dim).unwrap();
    for head_dim in [12, 20] {
        for (x, device_x, tolerance) in on_both(&numbers.tensor(&[4, 3, head_dim])) {
            for style in [RopeStyle::Halves, RopeStyle::Pairs] {
                let found = rope(&device_x, &table, &[6, 0, 3, 3], style).unwrap();
                let expected = rope(&x, &table, &[6, 0, 3, 3], style).unwrap();
                assert_same(&found, &expected, (device_x.dtype(), tolerance));
            }
        }
    }
}
