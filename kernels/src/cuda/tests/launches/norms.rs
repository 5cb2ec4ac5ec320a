//! Norms.

use super::{assert_same, moved, on_both};
use crate::ops::rms_norm::{rms_norm, rms_norm_residual};
use crate::testing::Numbers;

#[test]
fn norms() {
    let mut numbers = Numbers::new(1);
    let (x, residual) = (numbers.tensor(&[5, 3, 40]), numbers.tensor(&[5, 3, 40]));
    let weight = numbers.tensor(&[40]);
    for ((x, device_x, tolerance), (residual, device_residual, _)) in on_both(&x).into_iter().zip(on_both(&residual)) {
        let found = rms_norm(&device_x, &moved(&weight), 1e-5).unwrap();
        assert_eq!(found.dtype(), device_x.dtype());
        assert_same(&found, &rms_norm(&x, &weight, 1e-5).unwrap(), tolerance);
        let found = rms_norm_residual(&device_x, &device_residual, &moved(&weight), 1e-5).unwrap();
        let expected = rms_norm_residual(&x, &residual, &weight, 1e-5).unwrap();
        assert_same(&found.0, &expected.0, tolerance);
        assert_same(&found.1, &expected.1, tolerance);
    }
}
