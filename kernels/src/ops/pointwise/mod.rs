//! Activations of one number.

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

use candle_core::cpu::erf::erf_f64;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::check::{Input, f32_output, f32_slice};
use crate::error::Result;
use crate::memory::Disjoint;
use crate::pool;

const OP: &str = "pointwise";

/// Numbers of a task.
const TASK_LEN: usize = 1 << 12;
/// An activation costs about as much as this many additions.
const ELEMENT_WORK: usize = 8;

/// A function of one number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pointwise {
    /// `max(x, 0)`
    Relu,
    /// `x * Φ(x)` (Hendrycks and Gimpel, 2016)
    Gelu,
    /// The same with the published approximation by tanh.
    GeluTanh,
    /// `x / (1 + e^-x)`
    Silu,
    /// `1 / (1 + e^-x)`
    Sigmoid,
}

impl Pointwise {
    /// The function's value.
    pub fn apply(self, x: f32) -> f32 {
        match self {
            // Keeps a NaN, which `f32::max` would hide.
            Self::Relu => {
                if x < 0.0 {
                    0.0
                } else {
                    x
                }
            }
            // In f64: the difference to 1 of either function would lose half of its digits.
            Self::Gelu => {
                let x = f64::from(x);
                (0.5 * x * (1.0 + erf_f64(x * FRAC_1_SQRT_2))) as f32
            }
            Self::GeluTanh => {
                let x = f64::from(x);
                let inner = FRAC_2_SQRT_PI * FRAC_1_SQRT_2 * (x + 0.044_715 * x * x * x);
                (0.5 * x * (1.0 + inner.tanh())) as f32
            }
            Self::Silu => x / (1.0 + (-x).exp()),
            Self::Sigmoid => 1.0 / (1.0 + (-x).exp()),
        }
    }
}

/// The function of every number of `x`.
pub fn pointwise(x: &Tensor, function: Pointwise) -> Result<Tensor> {
    Input { op: OP, what: "x", tensor: x }.check()?;
    Ok(x.apply_op1_no_bwd(&Map { function })?)
}

struct Map {
    function: Pointwise,
}

impl CustomOp1 for Map {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let x = f32_slice(x, x_layout)?;
        let mut out = vec![0.0; x.len()];
        let target = Disjoint::new(&mut out);
        pool::parallel_if(ELEMENT_WORK * x.len(), x.len().div_ceil(TASK_LEN), |task_idx| {
            let start = task_idx * TASK_LEN;
            let x = &x[start..x.len().min(start + TASK_LEN)];
            // SAFETY: each stretch is a task.
            let out = unsafe { target.part(start, x.len()) };
            out.iter_mut().zip(x).for_each(|(out, &x)| *out = self.function.apply(x));
        });
        Ok(f32_output(out, x_layout.shape().clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{tensor, values};

    #[test]
    fn values_are_those_of_the_definitions() {
        // Of torch 2.15: `F.gelu`, `F.gelu(approximate="tanh")`, `F.silu`.
        for (x, gelu, gelu_tanh, silu) in [
            (-2.0, -0.045_500_28, -0.045_402_3, -0.238_405_84),
            (-0.5, -0.154_268_77, -0.154_286, -0.188_770_33),
            (0.0, 0.0, 0.0, 0.0),
            (1.0, 0.841_344_7, 0.841_192, 0.731_058_6),
            (3.0, 2.995_950_2, 2.996_362_7, 2.857_722_3),
        ] {
            for (function, expected) in
                [(Pointwise::Gelu, gelu), (Pointwise::GeluTanh, gelu_tanh), (Pointwise::Silu, silu)]
            {
                let found = function.apply(x);
                assert!((found - expected).abs() < 1e-6, "{function:?} of {x}: {found}, expected {expected}");
            }
            assert_eq!(Pointwise::Relu.apply(x), x.max(0.0));
            assert!((x * Pointwise::Sigmoid.apply(x) - silu).abs() < 1e-6);
        }
        assert!(Pointwise::Relu.apply(f32::NAN).is_nan());
    }

    #[test]
    fn a_tensor_is_mapped_number_by_number() {
        let x: Vec<f32> = (0..3 * TASK_LEN + 5).map(|idx| idx as f32 * 1e-3 - 6.0).collect();
        let y = pointwise(&tensor(&x, &[x.len()]), Pointwise::Gelu).unwrap();
        assert_eq!(values(&y), x.iter().map(|&x| Pointwise::Gelu.apply(x)).collect::<Vec<_>>());
    }
}
