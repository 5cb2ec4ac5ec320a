//! A block for each token.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, Shape};

use super::{Rope, RopeStyle};
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Launch, launch};
use crate::cuda::kept::upload_recent;
use crate::cuda::memory::{Operand, activations, name_of, output};

pub(super) fn rope(op: &Rope<'_>, x: Operand<'_>) -> candle_core::Result<(CudaStorage, Shape)> {
    let (device, dtype) = (x.0.device(), x.0.dtype());
    let (out, target) = output(device, dtype, x.1.shape().elem_count())?;
    let (kernel, start) = (format!("rope_{}", name_of(dtype)?), activations(x)?);
    let cos = op.table.device_cos.get(device, &op.table.cos)?;
    let sin = op.table.device_sin.get(device, &op.table.sin)?;
    let positions = upload_recent(device, op.positions)?;
    let [num_heads, head_dim, rotary_dim] = [op.num_heads, op.head_dim, op.table.rotary_dim].map(|size| size as i32);
    let in_pairs = i32::from(op.style == RopeStyle::Pairs);
    let shape = Launch::rows(op.positions.len(), ROW_THREADS);
    // SAFETY: the arguments of the kernel; all positions are in the table.
    unsafe {
        launch(
            device,
            &kernel,
            shape,
            &[&start, &cos, &sin, &positions.start(), &target, &num_heads, &head_dim, &rotary_dim, &in_pairs],
        )
    }?;
    Ok((out, x.1.shape().clone()))
}
