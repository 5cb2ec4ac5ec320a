//! Matrices with a row for each token: the embedding and the output projection, of which one may serve as the other.

use candle_core::{DType, Tensor};
use kernels::PackedWeight;

use crate::error::EngineError;
use crate::weights::loader::Loader;

#[derive(Clone, Debug)]
pub struct Table {
    weight: PackedWeight, // [vocab_size, hidden_size]
    /// What layers compute in.
    activations: DType,
}

impl Table {
    /// `{name} [vocab_size, hidden_size]`.
    pub fn load(loader: &Loader, name: &str, [vocab_size, hidden_size]: [usize; 2]) -> Result<Self, EngineError> {
        Ok(Self::of(loader, loader.table(name, vocab_size, hidden_size)?))
    }

    /// A matrix that the loader made.
    pub fn of(loader: &Loader, weight: PackedWeight) -> Self {
        Self { weight, activations: loader.activations() }
    }

    /// The rows of these tokens: `[ids.len(), hidden_size]`.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor, EngineError> {
        Ok(kernels::embedding_as(ids, &self.weight, self.activations)?)
    }

    /// `[rows, hidden_size]` to `[rows, vocab_size]`, in f32.
    pub fn logits(&self, hidden: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, EngineError> {
        Ok(kernels::linear_f32(hidden, &self.weight, bias)?)
    }
}
