//! A block for each row.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Shape};

use super::LayerNorm;
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Launch, launch};
use crate::cuda::memory::{Operand, activations, floats, name_of, output};

pub(super) fn layer_norm(
    op: &LayerNorm,
    [x, weight, bias]: [Operand<'_>; 3],
) -> candle_core::Result<(CudaStorage, Shape)> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let (len, width) = (x.1.shape().elem_count(), weight.1.shape().elem_count());
    let (out, target) = output(device, dtype, len)?;
    let (start, weight, bias) = (activations(x)?, floats(weight)?, floats(bias)?);
    let shape = Launch::rows(len / width.max(1), ROW_THREADS);
    let kernel = format!("layer_norm_{}", name_of(dtype)?);
    // SAFETY: the arguments of the kernel, with rows of `width`.
    unsafe { launch(device, &kernel, shape, &[&start, &weight, &bias, &target, &(width as i32), &op.eps]) }?;
    Ok((out, x.1.shape().clone()))
}
