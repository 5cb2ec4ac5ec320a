//! Root-mean-square normalisation.

use candle_core::Tensor;

use crate::error::EngineError;
use crate::weights::loader::Loader;

#[derive(Debug)]
pub struct RmsNorm {
    weight: Tensor,
    eps: f32,
}

impl RmsNorm {
    /// `{name}.weight [len]`.
    pub fn load(loader: &Loader, name: &str, len: usize, eps: f64) -> Result<Self, EngineError> {
        Ok(Self { weight: loader.vector(&format!("{name}.weight"), len)?, eps: eps as f32 })
    }

    /// The norm with its output multiplied by `factor`.
    pub fn scaled(self, factor: f64) -> Result<Self, EngineError> {
        Ok(Self { weight: (self.weight * factor)?, ..self })
    }

    /// Over the last dimension.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        Ok(kernels::rms_norm(x, &self.weight, self.eps)?)
    }

    /// `(norm(x + residual), x + residual)`.
    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor), EngineError> {
        Ok(kernels::rms_norm_residual(x, residual, &self.weight, self.eps)?)
    }
}
