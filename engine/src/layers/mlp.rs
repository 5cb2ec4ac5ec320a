//! The dense gated feed-forward network, also the form of shared experts.

use candle_core::Tensor;
use kernels::GluActivation;

use super::linear::{Bias, Linear};
use crate::error::EngineError;
use crate::weights::loader::Loader;

#[derive(Debug)]
pub struct Mlp {
    gate_up: Linear,
    down: Linear,
    activation: GluActivation,
}

impl Mlp {
    /// `{prefix}.{gate,up,down}_proj`, `width` wide.
    pub fn load(loader: &Loader, prefix: &str, hidden_size: usize, width: usize) -> Result<Self, EngineError> {
        Self::load_with(loader, prefix, [hidden_size, width], Bias::No)
    }

    /// The same, `[hidden_size, width]`, with or without biases.
    pub fn load_with(
        loader: &Loader,
        prefix: &str,
        [hidden_size, width]: [usize; 2],
        bias: Bias,
    ) -> Result<Self, EngineError> {
        if width == 0 {
            let reason = "is missing or 0, but there are dense layers".into();
            return Err(EngineError::Config { key: "intermediate_size", reason });
        }
        let parts = ["gate", "up"].map(|name| (format!("{prefix}.{name}_proj"), width));
        Ok(Self {
            gate_up: Linear::load_fused(loader, &parts, hidden_size, bias)?,
            down: Linear::load(loader, &format!("{prefix}.down_proj"), hidden_size, width, bias)?,
            activation: GluActivation::Silu,
        })
    }

    /// Gate and up in one matrix, the gate's rows first.
    pub fn from_fused(gate_up: Linear, down: Linear) -> Self {
        Self { gate_up, down, activation: GluActivation::Silu }
    }

    /// The same network with another activation than SiLU.
    pub fn activated(self, activation: GluActivation) -> Self {
        Self { activation, ..self }
    }

    pub fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        self.down.forward(&kernels::glu(&self.gate_up.forward(x)?, self.activation)?)
    }
}
