//! Parity with the oracle, row invariance to the bit, and refused inputs.

use super::{GluActivation, Pointwise, glu, reference};
use crate::testing::{Numbers, assert_close, bits, tensor, values};

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for (num_tokens, intermediate) in [(0, 4), (1, 1), (3, 17), (40, 1536), (2, 0)] {
        let x = numbers.with_outliers(num_tokens * 2 * intermediate);
        let y = glu(&tensor(&x, &[num_tokens, 2 * intermediate]), GluActivation::Silu).unwrap();
        assert_eq!(y.dims(), [num_tokens, intermediate]);
        assert_close(&values(&y), &reference(&x, intermediate, GluActivation::Silu), 1e-6);
    }
}

const RARER: [GluActivation; 4] = [
    GluActivation::Pointwise(Pointwise::Gelu),
    GluActivation::Pointwise(Pointwise::GeluTanh),
    GluActivation::Pointwise(Pointwise::Relu),
    GluActivation::ClampedSwish { alpha: 1.702, limit: 1.5 },
];

#[test]
fn rarer_activations_agree_with_the_reference() {
    let mut numbers = Numbers::new(4);
    for activation in RARER {
        for (num_tokens, intermediate) in [(0, 4), (1, 1), (3, 17), (40, 150)] {
            let x = numbers.with_outliers(num_tokens * 2 * intermediate);
            let y = glu(&tensor(&x, &[num_tokens, 2 * intermediate]), activation).unwrap();
            assert_close(&values(&y), &reference(&x, intermediate, activation), 1e-6);
        }
        // What transformers' functions give for a gate of 1.
        let expected = match activation {
            GluActivation::Pointwise(Pointwise::Gelu) => 0.841_344_7,
            GluActivation::Pointwise(Pointwise::GeluTanh) => 0.841_192,
            GluActivation::Pointwise(Pointwise::Relu) => 1.0,
            _ => continue,
        };
        let y = values(&glu(&tensor(&[1.0, 1.0], &[1, 2]), activation).unwrap());
        assert!((y[0] - expected).abs() < 1e-6, "{activation:?}: {y:?}");
    }
}

#[test]
fn a_nan_gate_stays_one() {
    for activation in [
        GluActivation::Silu,
        GluActivation::Pointwise(Pointwise::Gelu),
        GluActivation::Pointwise(Pointwise::GeluTanh),
        GluActivation::Pointwise(Pointwise::Relu),
        GluActivation::ClampedSwish { alpha: 1.702, limit: 7.0 },
    ] {
        let y = values(&glu(&tensor(&[f32::NAN, 1.0, 1.0, 1.0], &[1, 4]), activation).unwrap());
        assert!(y[0].is_nan() && !y[1].is_nan(), "{activation:?}");
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let x = Numbers::new(2).tensor(&[100, 2 * 515]);
    let whole = bits(&glu(&x, GluActivation::Silu).unwrap());
    for row in 0..100 {
        assert_eq!(
            bits(&glu(&x.narrow(0, row, 1).unwrap(), GluActivation::Silu).unwrap()),
            whole[row * 515..(row + 1) * 515]
        );
    }
}

#[test]
fn refuses_an_odd_width() {
    assert!(glu(&Numbers::new(3).tensor(&[2, 5]), GluActivation::Silu).is_err());
}
