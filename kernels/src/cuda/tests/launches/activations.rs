//! Functions of single numbers and of gates.

use super::{assert_same, on_both};
use crate::ops::glu::{GluActivation, glu};
use crate::ops::pointwise::{Pointwise, pointwise};
use crate::testing::Numbers;

#[test]
fn functions() {
    for (x, device_x, tolerance) in on_both(&Numbers::new(1).tensor(&[7, 90])) {
        for function in [Pointwise::Sigmoid, Pointwise::Gelu, Pointwise::Relu] {
            let found = pointwise(&device_x, function).unwrap();
            assert_same(&found, &pointwise(&x, function).unwrap(), (device_x.dtype(), tolerance));
        }
    }
}

#[test]
fn gates() {
    let clamped = GluActivation::ClampedSwish { alpha: 1.702, limit: 0.7 };
    for (x, device_x, tolerance) in on_both(&Numbers::new(2).tensor(&[7, 90])) {
        for activation in [GluActivation::Silu, GluActivation::Pointwise(Pointwise::Tanh), clamped] {
            let found = glu(&device_x, activation).unwrap();
            assert_same(&found, &glu(&x, activation).unwrap(), (device_x.dtype(), tolerance));
        }
    }
}
