//! Gated activations, above all `silu(gate) * up` (Shazeer, 2020), over fused gate and up activations.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use cpu::activate;
#[cfg(test)]
pub(crate) use reference::glu as reference;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::pointwise::Pointwise;
use crate::check::{Input, f32_output, f32_slice};
use crate::error::Result;

const OP: &str = "glu";

/// How gate and up become one.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub enum GluActivation {
    /// `silu(gate) * up` (Shazeer, 2020)
    #[default]
    Silu,
    /// Another function of the gate, times up.
    Pointwise(Pointwise),
    /// `g * sigmoid(alpha * g) * (u + 1)` with `g = min(gate, limit)` and `u` clamped to `±limit` (gpt-oss).
    ClampedSwish { alpha: f32, limit: f32 },
}

#[cfg(any(test, feature = "cuda"))]
impl GluActivation {
    /// What device code calls it (`glu.cuh`), with its two numbers.
    pub(crate) fn device_code(self) -> (u32, f32, f32) {
        match self {
            Self::Silu => (Pointwise::Silu as u32, 0.0, 0.0),
            Self::Pointwise(function) => (function as u32, 0.0, 0.0),
            Self::ClampedSwish { alpha, limit } => (u32::MAX, alpha, limit),
        }
    }
}

/// `act(gate, up)`, where the first half of each row is the gate. Fails unless `x` is f32, contiguous and of even width.
pub fn glu(
    gate_up: &Tensor, /* [num_tokens, 2 * intermediate] */
    activation: GluActivation,
) -> Result<Tensor /* [num_tokens, intermediate] */> {
    let input = Input { op: OP, what: "gate_up", tensor: gate_up };
    let [num_tokens, width] = input.dims("[num_tokens, 2 * intermediate]")?;
    if !width.is_multiple_of(2) {
        return Err(input.shape_error("an even width".to_owned()));
    }
    Ok(gate_up.apply_op1_no_bwd(&Glu { num_tokens, intermediate: width / 2, activation })?)
}

struct Glu {
    num_tokens: usize,
    intermediate: usize,
    activation: GluActivation,
}

impl CustomOp1 for Glu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = cpu::glu(f32_slice(gate_up, layout)?, self.intermediate, self.activation);
        Ok(f32_output(out, (self.num_tokens, self.intermediate)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, gate_up: &CudaStorage, layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::glu(self, (gate_up, layout))
    }
}
