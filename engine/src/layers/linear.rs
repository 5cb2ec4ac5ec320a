//! A linear map with an optional bias.

use candle_core::Tensor;
use kernels::PackedWeight;

use crate::error::EngineError;
use crate::weights::Role;
use crate::weights::loader::Loader;

#[derive(Clone, Debug)]
pub struct Linear {
    weight: PackedWeight,
    bias: Option<Tensor>,
    /// Whether its output is f32 whatever layers compute in.
    gives_f32: bool,
}

impl Linear {
    /// `{name}.weight [rows, cols]` and, if `bias`, `{name}.bias [rows]`.
    pub fn load(loader: &Loader, name: &str, rows: usize, cols: usize, bias: Bias) -> Result<Self, EngineError> {
        Self::load_fused(loader, &[(name.to_owned(), rows)], cols, bias)
    }

    /// Several maps of the same input as one: their outputs side by side.
    pub fn load_fused(
        loader: &Loader,
        parts: &[(String, usize)],
        cols: usize,
        bias: Bias,
    ) -> Result<Self, EngineError> {
        Self::load_as(loader, Role::Layer, (parts, cols), bias)
    }

    /// What chooses or gates, is never quantized and gives f32: `{name}.weight [rows, cols]` and, if `bias`, `{name}.bias [rows]`.
    pub fn load_router(loader: &Loader, name: &str, [rows, cols]: [usize; 2], bias: Bias) -> Result<Self, EngineError> {
        Self::load_as(loader, Role::Router, (&[(name.to_owned(), rows)], cols), bias)
    }

    fn load_as(
        loader: &Loader,
        role: Role,
        (parts, cols): (&[(String, usize)], usize),
        bias: Bias,
    ) -> Result<Self, EngineError> {
        let weights: Vec<_> = parts.iter().map(|(name, rows)| (format!("{name}.weight"), *rows)).collect();
        let weight = loader.fused_weight(&weights, cols, role)?;
        let bias = match bias {
            Bias::No => None,
            Bias::Yes => {
                let biases: Result<Vec<_>, _> =
                    parts.iter().map(|(name, rows)| loader.vector(&format!("{name}.bias"), *rows)).collect();
                Some(Tensor::cat(&biases?, 0)?)
            }
        };
        Ok(Self { weight, bias, gives_f32: role == Role::Router })
    }

    /// Maps made of the rows of `{name}.weight`, of this shape, each in an order of its own.
    pub fn load_picked(
        loader: &Loader,
        (name, role): (&str, Role),
        shape: [usize; 2],
        picks: &[Vec<usize>],
    ) -> Result<Vec<Self>, EngineError> {
        let weights = loader.picked_weights((&format!("{name}.weight"), role), shape, picks)?;
        Ok(weights.into_iter().map(|weight| Self { weight, bias: None, gives_f32: false }).collect())
    }

    /// `[num_tokens, cols]` to `[num_tokens, rows]`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        let linear = if self.gives_f32 { kernels::linear_f32 } else { kernels::linear };
        Ok(linear(x, &self.weight, self.bias.as_ref())?)
    }
}

/// Whether a linear map has a bias vector in the checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    Yes,
    No,
}

impl From<bool> for Bias {
    fn from(present: bool) -> Self {
        if present { Self::Yes } else { Self::No }
    }
}
