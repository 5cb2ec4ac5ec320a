//! The dense SwiGLU feed-forward network, also the form of shared experts.

use candle_core::Tensor;

use super::linear::{Bias, Linear};
use crate::error::EngineError;
use crate::weights::loader::Loader;

#[derive(Debug)]
pub struct Mlp {
    gate_up: Linear,
    down: Linear,
}

impl Mlp {
    /// `{prefix}.{gate,up,down}_proj`, `width` wide.
    pub fn load(loader: &Loader, prefix: &str, hidden_size: usize, width: usize) -> Result<Self, EngineError> {
        let parts = ["gate", "up"].map(|name| (format!("{prefix}.{name}_proj"), width));
        Ok(Self {
            gate_up: Linear::load_fused(loader, &parts, hidden_size, Bias::No)?,
            down: Linear::load(loader, &format!("{prefix}.down_proj"), hidden_size, width, Bias::No)?,
        })
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        self.down.forward(&kernels::swiglu(&self.gate_up.forward(x)?)?)
    }
}
