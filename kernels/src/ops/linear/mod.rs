//! `y = x · Wᵀ + b`: one matrix product with a packed weight.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use reference::linear as reference;

use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Shape, Tensor};

use crate::check::{Input, f32_output, f32_slice};
use crate::error::Result;
use crate::weight::PackedWeight;

const OP: &str = "linear";

/// Multiplies each row of `x` by the weight and adds the bias. Accumulates in f32, in an order that depends on
/// `in_features` alone. Fails unless `x` is f32, contiguous and `weight.cols()` wide, and the bias `weight.rows()` long.
pub fn linear(
    x: &Tensor,            /* [num_tokens, in_features] */
    weight: &PackedWeight, /* [out_features, in_features] */
    bias: Option<&Tensor>, /* [out_features] */
) -> Result<Tensor /* [num_tokens, out_features] */> {
    let input = Input { op: OP, what: "x", tensor: x };
    let [num_tokens, _] = input.dims("[num_tokens, in_features]")?;
    input.has_dims(&[num_tokens, weight.cols()])?;
    let op = Linear { num_tokens, weight };
    match bias {
        Some(bias) => {
            Input { op: OP, what: "bias", tensor: bias }.has_dims(&[weight.rows()])?;
            Ok(x.apply_op2_no_bwd(bias, &op)?)
        }
        None => Ok(x.apply_op1_no_bwd(&op)?),
    }
}

struct Linear<'a> {
    num_tokens: usize,
    weight: &'a PackedWeight,
}

impl Linear<'_> {
    fn forward(&self, x: &[f32], bias: Option<&[f32]>) -> (CpuStorage, Shape) {
        let out = cpu::linear(self, x, bias);
        f32_output(out, (self.num_tokens, self.weight.rows()))
    }
}

impl CustomOp1 for Linear<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.forward(f32_slice(x, x_layout)?, None))
    }
}

impl CustomOp2 for Linear<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        bias: &CpuStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        Ok(self.forward(f32_slice(x, x_layout)?, Some(f32_slice(bias, bias_layout)?)))
    }
}
