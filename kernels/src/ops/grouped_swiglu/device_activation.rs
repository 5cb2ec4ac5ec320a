//! What an expert does between its matrices, as device code has it.

#[cfg(feature = "cuda")]
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

use super::ExpertActivation;
use crate::ops::glu::GluActivation;

/// `struct ExpertActivation` of `combine_experts.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(crate) struct DeviceActivation {
    is_gated: u32,
    function: u32,
    alpha: f32,
    limit: f32,
}

#[cfg(feature = "cuda")]
// SAFETY: numbers without padding.
unsafe impl DeviceRepr for DeviceActivation {}

impl DeviceActivation {
    /// Of an expert that nobody computes.
    pub(crate) const NONE: Self = Self { is_gated: 0, function: 0, alpha: 0.0, limit: 0.0 };

    pub(crate) fn new(activation: ExpertActivation) -> Self {
        let (is_gated, (function, alpha, limit)) = match activation {
            ExpertActivation::Plain(function) => (0, GluActivation::Pointwise(function).device_code()),
            ExpertActivation::Gated(activation) => (1, activation.device_code()),
        };
        Self { is_gated, function, alpha, limit }
    }
}
