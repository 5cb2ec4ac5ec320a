//! Normalisation: root-mean-square, or layer norm with a bias in the one family that has it.

use candle_core::Tensor;

use crate::error::EngineError;
use crate::weights::loader::Loader;

#[derive(Debug)]
pub struct Norm {
    weight: Tensor,
    /// Of a layer norm; an RMS norm has none.
    bias: Option<Tensor>,
    eps: f32,
}

/// Which of them a family takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NormKind {
    Rms,
    /// Stored as what is added to 1 (Qwen3-Next).
    RmsPlusOne,
    /// `{name}.bias` beside the weight.
    Layer,
}

impl Norm {
    /// An RMS norm: `{name}.weight [len]`.
    pub fn load(loader: &Loader, name: &str, len: usize, eps: f64) -> Result<Self, EngineError> {
        Self::load_kind(loader, name, len, (NormKind::Rms, eps))
    }

    /// An RMS norm without weights.
    pub fn unit(loader: &Loader, len: usize, eps: f64) -> Result<Self, EngineError> {
        Ok(Self { weight: loader.on_device(vec![1.0; len])?, bias: None, eps: eps as f32 })
    }

    /// Either kind.
    pub fn load_kind(
        loader: &Loader,
        name: &str,
        len: usize,
        (kind, eps): (NormKind, f64),
    ) -> Result<Self, EngineError> {
        let bias = match kind {
            NormKind::Rms | NormKind::RmsPlusOne => None,
            NormKind::Layer => Some(loader.vector(&format!("{name}.bias"), len)?),
        };
        let stored = loader.vector(&format!("{name}.weight"), len)?;
        let weight = if kind == NormKind::RmsPlusOne { (stored + 1.0)? } else { stored };
        Ok(Self { weight, bias, eps: eps as f32 })
    }

    /// The norm with its output multiplied by `factor`.
    pub fn scaled(self, factor: f64) -> Result<Self, EngineError> {
        let bias = self.bias.map(|bias| bias * factor).transpose()?;
        Ok(Self { weight: (self.weight * factor)?, bias, ..self })
    }

    /// Over the last dimension.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        match &self.bias {
            None => Ok(kernels::rms_norm(x, &self.weight, self.eps)?),
            Some(bias) => Ok(kernels::layer_norm(x, &self.weight, bias, self.eps)?),
        }
    }

    /// `(norm(x + residual), x + residual)`.
    pub fn forward_residual(&self, x: &Tensor, residual: &Tensor) -> Result<(Tensor, Tensor), EngineError> {
        match &self.bias {
            None => Ok(kernels::rms_norm_residual(x, residual, &self.weight, self.eps)?),
            Some(_) => {
                let sum = (x + residual)?;
                Ok((self.forward(&sum)?, sum))
            }
        }
    }
}
