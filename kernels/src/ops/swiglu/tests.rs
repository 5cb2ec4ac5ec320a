//! Parity with the oracle, row invariance to the bit, and refused inputs.

use super::{reference, swiglu};
use crate::testing::{Numbers, assert_close, bits, tensor, values};

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for (num_tokens, intermediate) in [(0, 4), (1, 1), (3, 17), (40, 1536), (2, 0)] {
        let x = numbers.with_outliers(num_tokens * 2 * intermediate);
        let y = swiglu(&tensor(&x, &[num_tokens, 2 * intermediate])).unwrap();
        assert_eq!(y.dims(), [num_tokens, intermediate]);
        assert_close(&values(&y), &reference(&x, intermediate), 1e-6);
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let x = Numbers::new(2).tensor(&[100, 2 * 515]);
    let whole = bits(&swiglu(&x).unwrap());
    for row in 0..100 {
        assert_eq!(bits(&swiglu(&x.narrow(0, row, 1).unwrap()).unwrap()), whole[row * 515..(row + 1) * 515]);
    }
}

#[test]
fn refuses_an_odd_width() {
    assert!(swiglu(&Numbers::new(3).tensor(&[2, 5])).is_err());
}
