//! Parity with the oracle, row invariance to the bit, and refused inputs.

use super::{reference, rms_norm, rms_norm_residual};
use crate::testing::{Numbers, assert_close, bits, tensor, values};

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for (dims, dim) in [(vec![0, 8], 8), (vec![1], 1), (vec![3, 17], 17), (vec![5, 4, 64], 64), (vec![200, 576], 576)] {
        let len = dims.iter().product();
        let (x, residual, weight) = (numbers.with_outliers(len), numbers.normal(len), numbers.normal(dim));
        let (x_tensor, weight_tensor) = (tensor(&x, &dims), tensor(&weight, &[dim]));
        let mut expected = vec![0.0; len];
        reference::rms_norm(&x, &weight, 1e-5, &mut expected);
        let y = rms_norm(&x_tensor, &weight_tensor, 1e-5).unwrap();
        assert_eq!(y.dims(), dims);
        assert_close(&values(&y), &expected, 1e-6);

        let sum: Vec<f32> = x.iter().zip(&residual).map(|(x, residual)| x + residual).collect();
        reference::rms_norm(&sum, &weight, 1e-5, &mut expected);
        let (norm, stream) = rms_norm_residual(&x_tensor, &tensor(&residual, &dims), &weight_tensor, 1e-5).unwrap();
        assert_close(&values(&norm), &expected, 1e-6);
        assert_eq!(values(&stream), sum);
        assert!(norm.is_contiguous() && stream.is_contiguous());
        assert_eq!(bits(&norm), bits(&rms_norm(&stream, &weight_tensor, 1e-5).unwrap()));
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(2);
    let (x, weight) = (numbers.tensor(&[200, 1025]), numbers.tensor(&[1025]));
    let alone: Vec<_> =
        (0..200).map(|row| bits(&rms_norm(&x.narrow(0, row, 1).unwrap(), &weight, 1e-6).unwrap())).collect();
    for num_tokens in (1..=40).chain([200]) {
        let batch = rms_norm(&x.narrow(0, 0, num_tokens).unwrap(), &weight, 1e-6).unwrap();
        assert_eq!(bits(&batch), alone[..num_tokens].concat());
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let mut numbers = Numbers::new(3);
    let x = numbers.tensor(&[2, 6]);
    let weight = numbers.tensor(&[6]);
    assert!(rms_norm(&x, &numbers.tensor(&[5]), 1e-6).is_err());
    assert!(rms_norm(&numbers.tensor(&[]), &weight, 1e-6).is_err());
    assert!(rms_norm_residual(&x, &numbers.tensor(&[1, 6]), &weight, 1e-6).is_err());
}
