//! `silu(gate) * up` (Shazeer, 2020) over fused gate and up activations.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

pub(crate) use cpu::SiluMul;
#[cfg(test)]
pub(crate) use reference::swiglu as reference;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use crate::check::{Input, f32_output, f32_slice};
use crate::error::Result;

const OP: &str = "swiglu";

/// `silu(gate) * up`, where the first half of each row is the gate. Fails unless `x` is f32, contiguous and of even
/// width.
pub fn swiglu(
    gate_up: &Tensor, /* [num_tokens, 2 * intermediate] */
) -> Result<Tensor /* [num_tokens, intermediate] */> {
    let input = Input { op: OP, what: "gate_up", tensor: gate_up };
    let [num_tokens, width] = input.dims("[num_tokens, 2 * intermediate]")?;
    if !width.is_multiple_of(2) {
        return Err(input.shape_error("an even width".to_owned()));
    }
    Ok(gate_up.apply_op1_no_bwd(&Swiglu { num_tokens, intermediate: width / 2 })?)
}

struct Swiglu {
    num_tokens: usize,
    intermediate: usize,
}

impl CustomOp1 for Swiglu {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, gate_up: &CpuStorage, layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = cpu::swiglu(f32_slice(gate_up, layout)?, self.intermediate);
        Ok(f32_output(out, (self.num_tokens, self.intermediate)))
    }
}
