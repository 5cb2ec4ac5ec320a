//! Parity with the oracle and row invariance to the bit.

use super::{head_linear, reference};
use crate::testing::{Numbers, assert_close, bits, tensor, values};
use crate::weight::{PackedWeight, WeightFormat};

fn weights(numbers: &mut Numbers, format: WeightFormat, shape: [usize; 3]) -> Vec<PackedWeight> {
    let [heads, rows, cols] = shape;
    (0..heads).map(|_| PackedWeight::from_f32(format, rows, cols, &numbers.normal(rows * cols)).unwrap()).collect()
}

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for [num_tokens, heads, rows, cols] in [[0, 2, 3, 4], [1, 1, 1, 1], [5, 3, 33, 17], [50, 4, 64, 128], [3, 0, 0, 8]]
    {
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
            let weights = weights(&mut numbers, format, [heads, rows, cols]);
            let x = numbers.with_outliers(num_tokens * heads * cols);
            let y = head_linear(&tensor(&x, &[num_tokens, heads, cols]), &weights).unwrap();
            assert_eq!(y.dims(), [num_tokens, heads, rows]);
            assert_close(&values(&y), &reference::head_linear(&x, num_tokens, &weights), 1e-5);
        }
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(2);
    let weights = weights(&mut numbers, WeightFormat::Bf16, [3, 130, 75]);
    let x = numbers.tensor(&[40, 3, 75]);
    let alone: Vec<_> =
        (0..40).map(|row| bits(&head_linear(&x.narrow(0, row, 1).unwrap(), &weights).unwrap())).collect();
    for num_tokens in 1..=40 {
        let batch = bits(&head_linear(&x.narrow(0, 0, num_tokens).unwrap(), &weights).unwrap());
        assert_eq!(batch, alone[..num_tokens].concat());
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let mut numbers = Numbers::new(3);
    let two = weights(&mut numbers, WeightFormat::F32, [2, 4, 6]);
    assert!(head_linear(&numbers.tensor(&[1, 3, 6]), &two).is_err());
    assert!(head_linear(&numbers.tensor(&[1, 2, 5]), &two).is_err());
    let mixed = [two[0].clone(), weights(&mut numbers, WeightFormat::F32, [1, 5, 6]).remove(0)];
    assert!(head_linear(&numbers.tensor(&[1, 2, 6]), &mixed).is_err());
}
