//! Activations of one number.

#[cfg(feature = "cuda")]
mod cuda;

use std::f64::consts::{FRAC_1_SQRT_2, FRAC_2_SQRT_PI};

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
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
    /// `max(x, 0)²`
    SquaredRelu,
    /// `max(x, 0)`, at most 6
    Relu6,
    /// `x`, a hundredth of it below 0
    LeakyRelu,
    /// [`Gelu`](Self::Gelu), at most 10
    ClippedGelu,
    /// `x / (1 + e^(-1.702 x))`
    QuickGelu,
    /// `x * min(max(x + 3, 0), 6) / 6`
    HardSwish,
    /// `x * tanh(ln(1 + e^x))`
    Mish,
    Tanh,
    /// `x`
    Identity,
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
            Self::SquaredRelu => Self::Relu.apply(x).powi(2),
            Self::Relu6 => x.clamp(0.0, 6.0),
            Self::LeakyRelu => {
                if x < 0.0 {
                    0.01 * x
                } else {
                    x
                }
            }
            Self::ClippedGelu => Self::Gelu.apply(x).clamp(-10.0, 10.0),
            Self::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
            Self::HardSwish => x * (x + 3.0).clamp(0.0, 6.0) / 6.0,
            Self::Mish => {
                let x = f64::from(x);
                (x * x.exp().ln_1p().tanh()) as f32
            }
            Self::Tanh => x.tanh(),
            Self::Identity => x,
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::pointwise(self, (x, layout))
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
    fn rarer_functions_are_those_of_transformers() {
        // Of -4, -0.5, 1 and 12 in transformers 5.23.
        for (function, expected) in [
            (Pointwise::SquaredRelu, [0.0, 0.0, 1.0, 144.0]),
            (Pointwise::Relu6, [0.0, 0.0, 1.0, 6.0]),
            (Pointwise::LeakyRelu, [-0.04, -0.005, 1.0, 12.0]),
            (Pointwise::ClippedGelu, [-0.000_126_684, -0.154_268_77, 0.841_344_7, 10.0]),
            (Pointwise::QuickGelu, [-0.004_414_724, -0.149_611_56, 0.845_795_75, 12.0]),
            (Pointwise::HardSwish, [0.0, -0.208_333_33, 0.666_666_7, 12.0]),
            (Pointwise::Mish, [-0.072_591_75, -0.220_743_76, 0.865_098_36, 12.0]),
            (Pointwise::Tanh, [-0.999_329_3, -0.462_117_16, 0.761_594_2, 1.0]),
            (Pointwise::Identity, [-4.0, -0.5, 1.0, 12.0]),
        ] {
            let found = [-4.0, -0.5, 1.0, 12.0].map(|x| function.apply(x));
            let is_close = found.iter().zip(&expected).all(|(a, b): (&f32, &f32)| (a - b).abs() < 1e-6);
            assert!(is_close, "{function:?}: {found:?}, expected {expected:?}");
            assert!(function.apply(f32::NAN).is_nan());
        }
    }

    #[test]
    fn a_tensor_is_mapped_number_by_number() {
        let x: Vec<f32> = (0..3 * TASK_LEN + 5).map(|idx| idx as f32 * 1e-3 - 6.0).collect();
        let y = pointwise(&tensor(&x, &[x.len()]), Pointwise::Gelu).unwrap();
        assert_eq!(values(&y), x.iter().map(|&x| Pointwise::Gelu.apply(x)).collect::<Vec<_>>());
    }
}
