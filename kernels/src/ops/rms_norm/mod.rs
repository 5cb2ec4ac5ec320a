//! Root-mean-square norm (Zhang and Sennrich, 2019), alone or with the residual addition before it.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Shape, Tensor};

use crate::check::{Input, f32_output, f32_slice};
use crate::error::{KernelError, Result};

const OP: &str = "rms_norm";

/// `x / sqrt(mean(x²) + eps) * weight` over the last dimension. Fails unless both are contiguous, the weight f32 and as long
/// as the last dimension, and `x` f32, or bf16 on a CUDA device.
pub fn rms_norm(x: &Tensor /* [.., D] */, weight: &Tensor /* [D] */, eps: f32) -> Result<Tensor> {
    check(x, weight)?;
    Ok(x.apply_op2_no_bwd(weight, &RmsNorm { eps })?)
}

/// The norm of `x + residual`, and `x + residual`, which is the residual of the next layer. Fails as [`rms_norm`], or
/// if the residual is not of the shape and type of `x`.
pub fn rms_norm_residual(
    x: &Tensor,        /* [.., D] */
    residual: &Tensor, /* [.., D] */
    weight: &Tensor,   /* [D] */
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    check(x, weight)?;
    Input { op: OP, what: "residual", tensor: residual }.has_dims(x.dims())?;
    if residual.dtype() != x.dtype() {
        return Err(KernelError::DType { op: OP, what: "residual", got: residual.dtype(), expected: x.dtype() });
    }
    let both = x.apply_op3_no_bwd(residual, weight, &RmsNorm { eps })?;
    Ok((both.get(0)?, both.get(1)?))
}

fn check(x: &Tensor, weight: &Tensor) -> Result<()> {
    let input = Input { op: OP, what: "x", tensor: x };
    input.check()?;
    let Some(&dim) = x.dims().last() else {
        return Err(input.shape_error("[.., D]".to_owned()));
    };
    Input { op: OP, what: "weight", tensor: weight }.has_dims(&[dim])
}

struct RmsNorm {
    eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, weight) = (f32_slice(x, x_layout)?, f32_slice(weight, weight_layout)?);
        let mut out = vec![0.0; x.len()];
        cpu::rms_norm(x, weight, self.eps, &mut out);
        Ok(f32_output(out, x_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::rms_norm(self, (x, x_layout), (weight, weight_layout))
    }
}

/// The two results one after the other, `[2, .., D]`: a custom op has one output.
impl CustomOp3 for RmsNorm {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_layout: &Layout,
        residual: &CpuStorage,
        residual_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let (x, residual) = (f32_slice(x, x_layout)?, f32_slice(residual, residual_layout)?);
        let weight = f32_slice(weight, weight_layout)?;
        let mut out = vec![0.0; 2 * x.len()];
        let (norm, sum) = out.split_at_mut(x.len());
        for (sum, (x, residual)) in sum.iter_mut().zip(x.iter().zip(residual)) {
            *sum = x + residual;
        }
        cpu::rms_norm(sum, weight, self.eps, norm);
        let mut dims = vec![2];
        dims.extend_from_slice(x_layout.dims());
        Ok(f32_output(out, dims))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &CudaStorage,
        x_layout: &Layout,
        residual: &CudaStorage,
        residual_layout: &Layout,
        weight: &CudaStorage,
        weight_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::rms_norm_residual(self, [(x, x_layout), (residual, residual_layout), (weight, weight_layout)])
    }
}
