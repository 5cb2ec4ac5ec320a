//! The expert layer: each token through its experts, grouped so that an expert's tokens are one matrix product.

mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod device_activation;
mod experts;
mod pass;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Device, Layout, Shape, Tensor};

use cpu::Sizes;
pub use experts::Experts;
pub use pass::{ExpertPass, ExpertSlots, grouped_experts};

use super::glu::GluActivation;
use super::pointwise::Pointwise;
use super::route::{Chosen, TopK};
use crate::check::{self, Input, f32_output, f32_slice};
use crate::error::{KernelError, Result};
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

    /// The same expert on a device. Biases stay on the host; [`Experts`] there has them too.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let (gate_up, down) = (self.gate_up.to_device(device)?, self.down.to_device(device)?);
        Ok(Self { gate_up, down, biases: self.biases.clone(), activation: self.activation })
    }

    fn sizes(&self) -> Sizes {
        Sizes { hidden: self.gate_up.cols(), intermediate: self.down.cols() }
    }

    /// Refuses one that has other sizes or lies elsewhere.
    fn check(&self, sizes: Sizes, device: &Device) -> Result<()> {
        check::lies_on(OP, "gate_up", &self.gate_up, device)?;
        check::lies_on(OP, "down", &self.down, device)?;
        check::length(OP, "width of gate_up", self.gate_up.cols(), sizes.hidden)?;
        let gate_up_rows = self.activation.num_parts() * sizes.intermediate;
        check::length(OP, "rows of gate_up", self.gate_up.rows(), gate_up_rows)?;
        check::length(OP, "width of down", self.down.cols(), sizes.intermediate)?;
        check::length(OP, "rows of down", self.down.rows(), sizes.hidden)?;
        if let Some(biases) = &self.biases {
            check::length(OP, "bias of gate_up", biases.gate_up.len(), gate_up_rows)?;
            check::length(OP, "bias of down", biases.down.len(), sizes.hidden)?;
        }
        Ok(())
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

/// `Σ weight * expert(x)` over the slots of each token, summed in slot order. Experts without a token are not read, and
/// slots with [`TopK::NO_EXPERT`] are no part of the sum. Fails if `x` is of another width or elsewhere than the experts, or `topk` names
/// an expert that does not exist.
pub fn grouped_swiglu<'a>(
    x: &Tensor, /* [num_tokens, hidden_size] */
    experts: &Experts,
    chosen: impl Into<Chosen<'a>>,
) -> Result<Tensor /* [num_tokens, hidden_size] */> {
    let [num_tokens, hidden_size] = Input { op: OP, what: "x", tensor: x }.dims("[num_tokens, hidden_size]")?;
    let sizes = experts.sizes(hidden_size)?;
    if !experts.device().same_device(x.device()) {
        return Err(KernelError::OtherDevice { op: OP, what: "an expert" });
    }
    let chosen = chosen.into();
    match chosen {
        Chosen::Host(topk) => check_choices(topk, num_tokens, experts.len())?,
        // A router of so many experts chose, which knows no others.
        #[cfg(feature = "cuda")]
        Chosen::Device(choices) if choices.is_of(x.device(), num_tokens, experts.len()) => {}
        #[cfg(feature = "cuda")]
        Chosen::Device(_) => {
            let reason = "choices are of another device, of other tokens or of other experts".to_owned();
            return Err(KernelError::Invalid { op: OP, reason });
        }
    }
    Ok(x.apply_op1_no_bwd(&GroupedSwiglu { num_tokens, sizes, experts, chosen })?)
}

/// One expert or none, and one weight for each slot of each token, of experts that exist.
fn check_choices(topk: &TopK, num_tokens: usize, num_experts: usize) -> Result<()> {
    check::length(OP, "number of chosen experts", topk.experts.len(), num_tokens * topk.k)?;
    check::length(OP, "number of expert weights", topk.weights.len(), num_tokens * topk.k)?;
    let mut chosen = topk.experts.iter().filter(|&&expert| expert != TopK::NO_EXPERT);
    chosen.try_for_each(|&expert| check::below(OP, "expert", expert as usize, num_experts))
}

impl Expert {
    /// The same expert on a device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        match self {
            Self::Glu(expert) => Ok(Self::Glu(expert.to_device(device)?)),
            Self::Identity => Ok(Self::Identity),
        }
    }

    fn glu(&self) -> Option<&ExpertWeights> {
        match self {
            Self::Glu(expert) => Some(expert),
            Self::Identity => None,
        }
    }
}

struct GroupedSwiglu<'a> {
    num_tokens: usize,
    sizes: Sizes,
    experts: &'a Experts,
    chosen: Chosen<'a>,
}

impl CustomOp1 for GroupedSwiglu<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let topk = self.chosen.host().expect("what is on the CPU was checked to be chosen there");
        let out = cpu::grouped_swiglu(self, topk, f32_slice(x, x_layout)?);
        Ok(f32_output(out, (self.num_tokens, self.sizes.hidden)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, x: &CudaStorage, x_layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        cuda::grouped_swiglu(self, (x, x_layout))
    }
}
