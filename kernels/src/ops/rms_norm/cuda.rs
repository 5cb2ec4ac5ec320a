//! A block for each row.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Shape};

use super::RmsNorm;
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Launch, launch};
use crate::cuda::memory::{Operand, activations, floats, name_of, output};

pub(super) fn rms_norm(op: &RmsNorm, x: Operand<'_>, weight: Operand<'_>) -> candle_core::Result<(CudaStorage, Shape)> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let (len, width) = (x.1.shape().elem_count(), weight.1.shape().elem_count());
    let (out, target) = output(device, dtype, len)?;
    let (x_start, weight) = (activations(x)?, floats(weight)?);
    let shape = Launch::rows(len / width.max(1), ROW_THREADS);
    let kernel = format!("rms_norm_{}", name_of(dtype)?);
    // SAFETY: the arguments of the kernel, with rows of `width`.
    unsafe { launch(device, &kernel, shape, &[&x_start, &weight, &target, &(width as i32), &op.eps]) }?;
    Ok((out, x.1.shape().clone()))
}

/// The norm, then the sum.
pub(super) fn rms_norm_residual(
    op: &RmsNorm,
    [x, residual, weight]: [Operand<'_>; 3],
) -> candle_core::Result<(CudaStorage, Shape)> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let (len, width) = (x.1.shape().elem_count(), weight.1.shape().elem_count());
    let (out, norm) = output(device, dtype, 2 * len)?;
    let sum = norm.plus(len * dtype.size_in_bytes());
    let (x_start, residual) = (activations(x)?, activations(residual)?);
    let weight = floats(weight)?;
    let shape = Launch::rows(len / width.max(1), ROW_THREADS);
    let kernel = format!("rms_norm_residual_{}", name_of(dtype)?);
    // SAFETY: the arguments of the kernel, with rows of `width`; x and residual were checked to be alike.
    unsafe { launch(device, &kernel, shape, &[&x_start, &residual, &weight, &norm, &sum, &(width as i32), &op.eps]) }?;
    Ok((out, Shape::from([&[2], x.1.dims()].concat())))
}
