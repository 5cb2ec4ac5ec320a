//! Checks of op inputs before compute, and the way from candle storage to slices.

use candle_core::{CpuStorage, DType, Device, Layout, Shape, Tensor};

use crate::error::{KernelError, Result};
use crate::weight::PackedWeight;

/// A tensor under check: the op it goes to, its name in the contract, and itself.
#[derive(Clone, Copy)]
pub(crate) struct Input<'a> {
    pub(crate) op: &'static str,
    pub(crate) what: &'static str,
    pub(crate) tensor: &'a Tensor,
}

impl Input<'_> {
    /// Contiguous, and f32 on the CPU, f32 or bf16 on a CUDA device.
    pub(crate) fn check(&self) -> Result<()> {
        let Self { op, what, tensor } = *self;
        let device = tensor.device();
        let is_known = tensor.dtype() == DType::F32 || device.is_cuda() && tensor.dtype() == DType::BF16;
        if !is_known {
            return Err(KernelError::DType { op, what, got: tensor.dtype(), expected: DType::F32 });
        }
        if !device.is_cpu() && !device.is_cuda() {
            return Err(KernelError::Device { op, what });
        }
        if !tensor.is_contiguous() {
            return Err(KernelError::NotContiguous { op, what });
        }
        Ok(())
    }

    /// The dimensions of a checked tensor of rank `R`.
    pub(crate) fn dims<const R: usize>(&self, expected: &str) -> Result<[usize; R]> {
        self.check()?;
        self.tensor.dims().try_into().map_err(|_| self.shape_error(expected.to_owned()))
    }

    /// Refuses a checked tensor that does not have exactly these dimensions.
    pub(crate) fn has_dims(&self, dims: &[usize]) -> Result<()> {
        self.check()?;
        if self.tensor.dims() == dims { Ok(()) } else { Err(self.shape_error(format!("{dims:?}"))) }
    }

    pub(crate) fn shape_error(&self, expected: String) -> KernelError {
        KernelError::Shape { op: self.op, what: self.what, got: self.tensor.dims().to_vec(), expected }
    }
}

/// The elements of a contiguous f32 tensor.
pub(crate) fn f32_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> candle_core::Result<&'a [f32]> {
    let data = storage.as_slice::<f32>()?;
    match layout.contiguous_offsets() {
        Some((start, end)) => Ok(&data[start..end]),
        None => candle_core::bail!("input is not contiguous"),
    }
}

/// What a custom op hands back to candle.
pub(crate) fn f32_output(data: Vec<f32>, shape: impl Into<Shape>) -> (CpuStorage, Shape) {
    (CpuStorage::F32(data), shape.into())
}

/// Refuses a length that differs from the expected one.
pub(crate) fn length(op: &'static str, what: &'static str, got: usize, expected: usize) -> Result<()> {
    if got == expected { Ok(()) } else { Err(KernelError::Length { op, what, got, expected }) }
}

/// Refuses an index at or past the limit.
pub(crate) fn below(op: &'static str, what: &'static str, got: usize, limit: usize) -> Result<()> {
    if got < limit { Ok(()) } else { Err(KernelError::OutOfRange { op, what, got, limit }) }
}

/// Refuses a weight that does not lie on this device.
pub(crate) fn lies_on(op: &'static str, what: &'static str, weight: &PackedWeight, device: &Device) -> Result<()> {
    if weight.device().same_device(device) { Ok(()) } else { Err(KernelError::OtherDevice { op, what }) }
}
