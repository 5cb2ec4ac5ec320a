//! A thread for each number.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Shape};

use super::Glu;
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Launch, launch};
use crate::cuda::memory::{Operand, activations, name_of, output};

pub(super) fn glu(op: &Glu, gate_up: Operand<'_>) -> candle_core::Result<(CudaStorage, Shape)> {
    let (device, dtype) = (gate_up.0.device(), gate_up.0.dtype());
    let len = op.num_tokens * op.intermediate;
    let (out, target) = output(device, dtype, len)?;
    let (kernel, start) = (format!("glu_{}", name_of(dtype)?), activations(gate_up)?);
    let (function, alpha, limit) = op.activation.device_code();
    let (num_tokens, width) = (op.num_tokens as i32, op.intermediate as i32);
    let shape = Launch::rows(len.div_ceil(ROW_THREADS), ROW_THREADS);
    // SAFETY: the arguments of the kernel, a thread for each number.
    unsafe { launch(device, &kernel, shape, &[&start, &target, &num_tokens, &width, &function, &alpha, &limit]) }?;
    Ok((out, Shape::from((op.num_tokens, op.intermediate))))
}
