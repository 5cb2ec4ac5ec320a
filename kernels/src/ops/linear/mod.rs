//! `y = x · Wᵀ + b`: one matrix product with a packed weight.

mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

#[cfg(test)]
pub(crate) use reference::linear as reference;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, DType, Layout, Shape, Tensor};

use crate::check::{Input, f32_output, f32_slice, lies_on};
use crate::error::Result;
use crate::weight::PackedWeight;

const OP: &str = "linear";

/// Multiplies each row of `x` by the weight and adds the bias. Accumulates in f32, in an order that depends on
/// `in_features` alone; the result has the type of `x`. Fails unless `x` is contiguous and `weight.cols()` wide, the bias f32 and
/// `weight.rows()` long, and all lie on one device.
pub fn linear(
    x: &Tensor,            /* [num_tokens, in_features] */
    weight: &PackedWeight, /* [out_features, in_features] */
    bias: Option<&Tensor>, /* [out_features] */
) -> Result<Tensor /* [num_tokens, out_features] */> {
    apply(x, (weight, x.dtype()), bias)
}

/// The same with a result in f32 whatever `x` is: of routers and logits.
pub fn linear_f32(
    x: &Tensor,            /* [num_tokens, in_features] */
    weight: &PackedWeight, /* [out_features, in_features] */
    bias: Option<&Tensor>, /* [out_features] */
) -> Result<Tensor /* [num_tokens, out_features] */> {
    apply(x, (weight, DType::F32), bias)
}

fn apply(x: &Tensor, (weight, out): (&PackedWeight, DType), bias: Option<&Tensor>) -> Result<Tensor> {
    let input = Input { op: OP, what: "x", tensor: x };
    let [num_tokens, _] = input.dims("[num_tokens, in_features]")?;
    input.has_dims(&[num_tokens, weight.cols()])?;
    lies_on(OP, "weight", weight, x.device())?;
    let op = Linear { num_tokens, weight, out };
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
    /// The type of the result.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "on the CPU all is f32"))]
    out: DType,
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, x_layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::linear(self, (x, x_layout), None)
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

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        bias: &CudaStorage,
        bias_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::linear(self, (x, x_layout), Some((bias, bias_layout)))
    }
}
