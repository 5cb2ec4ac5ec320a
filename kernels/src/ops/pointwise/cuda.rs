//! A thread for each number.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Shape};

use super::Map;
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Launch, launch};
use crate::cuda::memory::{Operand, activations, name_of, output};

pub(super) fn pointwise(op: &Map, x: Operand<'_>) -> candle_core::Result<(CudaStorage, Shape)> {
    let (device, dtype, len) = (x.0.device(), x.0.dtype(), x.1.shape().elem_count());
    let (out, target) = output(device, dtype, len)?;
    let shape = Launch::rows(len.div_ceil(ROW_THREADS), ROW_THREADS);
    let (kernel, start) = (format!("pointwise_{}", name_of(dtype)?), activations(x)?);
    // SAFETY: the arguments of the kernel, a thread for each number.
    unsafe { launch(device, &kernel, shape, &[&start, &target, &(len as u64), &(op.function as u32)]) }?;
    Ok((out, x.1.shape().clone()))
}
