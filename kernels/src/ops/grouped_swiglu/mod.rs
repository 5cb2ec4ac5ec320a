//! The expert layer: each token through its experts, grouped so that an expert's tokens are one matrix product.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

use super::glu::GluActivation;
use super::pointwise::Pointwise;
use super::route::TopK;
use crate::check::{self, Input, f32_output, f32_slice};
use crate::error::Result;
use crate::weight::PackedWeight;

const OP: &str = "grouped_swiglu";

/// What the router can choose.
#[derive(Debug, Clone)]
pub enum Expert {
    Glu(ExpertWeights),
    /// Gives back its input and costs nothing (zero-computation experts of LongCat-Flash).
    Identity,
}

/// A gated linear unit, `down(act(gate x, up x))`, or a plain one, `down(act(up x))`.
#[derive(Debug, Clone)]
pub struct ExpertWeights {
    /// Gate rows first, `[2 * intermediate, hidden_size]`; of a plain unit only `up`, `[intermediate, hidden_size]`.
    pub gate_up: PackedWeight,
    /// `[hidden_size, intermediate]`
    pub down: PackedWeight,
    pub biases: Option<ExpertBiases>,
    pub activation: ExpertActivation,
}

impl ExpertWeights {
    /// SwiGLU without biases, what most families have.
    pub fn swiglu(gate_up: PackedWeight, down: PackedWeight) -> Self {
        Self { gate_up, down, biases: None, activation: ExpertActivation::Gated(GluActivation::Silu) }
    }
}

/// Added to the outputs of the two matrices.
#[derive(Debug, Clone)]
pub struct ExpertBiases {
    /// As long as `gate_up` has rows, the gate's first.
    pub gate_up: Vec<f32>,
    /// `[hidden_size]`
    pub down: Vec<f32>,
}

/// What is done between the two matrices.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum ExpertActivation {
    Gated(GluActivation),
    /// No gate (Switch Transformer).
    Plain(Pointwise),
}

impl ExpertActivation {
    /// Rows of `gate_up` for each of `intermediate`.
    fn num_parts(self) -> usize {
        match self {
            Self::Gated(_) => 2,
            Self::Plain(_) => 1,
        }
    }
}

/// `Σ weight * expert(x)` over the slots of each token, summed in slot order. Experts without a token are not read.
/// Fails if the experts' shapes do not fit `x`, or `topk` names an expert that does not exist.
pub fn grouped_swiglu(
    x: &Tensor, /* [num_tokens, hidden_size] */
    experts: &[Expert],
    topk: &TopK,
) -> Result<Tensor /* [num_tokens, hidden_size] */> {
    let [num_tokens, hidden_size] = Input { op: OP, what: "x", tensor: x }.dims("[num_tokens, hidden_size]")?;
    check::length(OP, "number of chosen experts", topk.experts.len(), num_tokens * topk.k)?;
    check::length(OP, "number of expert weights", topk.weights.len(), num_tokens * topk.k)?;
    let intermediate = experts.iter().find_map(Expert::glu).map_or(0, |expert| expert.down.cols());
    for expert in experts.iter().filter_map(Expert::glu) {
        check::length(OP, "width of gate_up", expert.gate_up.cols(), hidden_size)?;
        let gate_up_rows = expert.activation.num_parts() * intermediate;
        check::length(OP, "rows of gate_up", expert.gate_up.rows(), gate_up_rows)?;
        check::length(OP, "width of down", expert.down.cols(), intermediate)?;
        check::length(OP, "rows of down", expert.down.rows(), hidden_size)?;
        if let Some(biases) = &expert.biases {
            check::length(OP, "bias of gate_up", biases.gate_up.len(), gate_up_rows)?;
            check::length(OP, "bias of down", biases.down.len(), hidden_size)?;
        }
    }
    for &expert in &topk.experts {
        check::below(OP, "expert", expert as usize, experts.len())?;
    }
    Ok(x.apply_op1_no_bwd(&GroupedSwiglu { num_tokens, hidden_size, intermediate, experts, topk })?)
}

impl Expert {
    fn glu(&self) -> Option<&ExpertWeights> {
        match self {
            Self::Glu(expert) => Some(expert),
            Self::Identity => None,
        }
    }
}

struct GroupedSwiglu<'a> {
    num_tokens: usize,
    hidden_size: usize,
    intermediate: usize,
    experts: &'a [Expert],
    topk: &'a TopK,
}

impl CustomOp1 for GroupedSwiglu<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let out = cpu::grouped_swiglu(self, f32_slice(x, x_layout)?);
        Ok(f32_output(out, (self.num_tokens, self.hidden_size)))
    }
}
