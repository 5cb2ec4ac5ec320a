//! Router: from logits to the experts of each token and their weights.

mod choices;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod device_router;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{Storage, Tensor};

#[cfg(feature = "cuda")]
pub use choices::DeviceChoices;
pub use choices::{Choices, Chosen};

use crate::check::{self, Input, f32_slice};
use crate::error::{KernelError, Result};

const OP: &str = "route";

/// How logits become scores.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Scoring {
    /// Softmax over all experts (Qwen-MoE, DeepSeek-V2).
    Softmax,
    /// The choice is made on logits; the weights are a softmax over the chosen ones (Mixtral, Granite).
    SoftmaxTopK,
    /// Each logit by itself (DeepSeek-V3, Kimi K2).
    Sigmoid,
    /// SparseMixer (arXiv 2310.00811, as Phi-3.5-MoE evaluates it): each slot takes the best logit left; its weight is its
    /// softmax among those not yet taken that lie within `2 * jitter` of it, relative to the larger magnitude.
    SparseMixer { jitter: f32 },
}

/// The score of a group of experts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GroupScore {
    /// Its best expert (DeepSeek-V2).
    Max,
    /// The sum of its two best experts (DeepSeek-V3).
    TopTwoSum,
}

/// Restriction of the choice to the best groups of neighbouring experts.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Groups {
    /// Groups of equal size.
    pub num: usize,
    /// Groups that stay in the choice.
    pub top: usize,
    pub score: GroupScore,
    /// Choice score of the experts of the other groups: 0 or -inf.
    pub masked: f32,
}

/// A published router, as data.
#[derive(Debug, Clone, PartialEq)]
pub struct RouterSpec {
    /// Experts per token.
    pub top_k: usize,
    pub scoring: Scoring,
    /// Added to the scores for the choice only; `[num_experts]`.
    pub bias: Option<Vec<f32>>,
    pub groups: Option<Groups>,
    /// Divide the weights by their sum plus this.
    pub renormalize: Option<f32>,
    /// Weights are divided by no less than this; 0 is no limit.
    pub min_sum: f32,
    /// Multiplies the weights at the end.
    pub scale: f32,
}

/// The experts of each token, by descending choice score; ties go to the lower index. A slot may be empty.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TopK {
    /// `[num_tokens * k]`
    pub experts: Vec<u32>,
    /// `[num_tokens * k]`
    pub weights: Vec<f32>,
    pub k: usize,
}

impl TopK {
    /// In place of an expert, in a slot that gives nothing and costs nothing, whatever its weight. [`route`] leaves none.
    pub const NO_EXPERT: u32 = u32::MAX;
}

/// Chooses `top_k` experts per token, see [`choose`], and waits for what they are.
pub fn route(logits: &Tensor /* [num_tokens, num_experts] */, spec: &RouterSpec) -> Result<TopK> {
    choose(logits, spec)?.into_host()
}

/// Chooses `top_k` experts per token, where the logits lie. A NaN is never chosen over a number, and makes NaN weights. Fails if
/// the spec does not fit the number of experts.
pub fn choose(logits: &Tensor /* [num_tokens, num_experts] */, spec: &RouterSpec) -> Result<Choices> {
    let input = Input { op: OP, what: "logits", tensor: logits };
    let [num_tokens, num_experts] = input.dims("[num_tokens, num_experts]")?;
    spec.check(num_experts)?;
    let (storage, layout) = logits.storage_and_layout();
    let storage = match &*storage {
        Storage::Cpu(storage) => storage,
        #[cfg(feature = "cuda")]
        Storage::Cuda(storage) => return Ok(Choices::Device(cuda::choose((storage, layout), spec)?)),
        _ => return Err(KernelError::Device { op: OP, what: "logits" }),
    };
    let logits = f32_slice(storage, layout)?;
    let (mut experts, mut weights) = (vec![0; num_tokens * spec.top_k], vec![0.0; num_tokens * spec.top_k]);
    cpu::route(logits, num_experts, spec, (&mut experts, &mut weights));
    Ok(Choices::Host(TopK { experts, weights, k: spec.top_k }))
}

impl RouterSpec {
    /// The scores of the `top_k` best experts as they are: no bias, groups, renormalisation or scale.
    pub fn new(scoring: Scoring, top_k: usize) -> Self {
        Self { top_k, scoring, bias: None, groups: None, renormalize: None, min_sum: 0.0, scale: 1.0 }
    }

    /// Refuses a spec that cannot choose among `num_experts`; [`route`] does so too.
    pub fn check(&self, num_experts: usize) -> Result<()> {
        let invalid = |reason| Err(KernelError::Invalid { op: OP, reason });
        if self.top_k == 0 || self.top_k > num_experts {
            return invalid(format!("cannot choose {} of {num_experts} experts", self.top_k));
        }
        if let Some(bias) = &self.bias {
            check::length(OP, "length of the bias", bias.len(), num_experts)?;
        }
        let Some(groups) = self.groups else { return Ok(()) };
        if groups.num == 0 || !num_experts.is_multiple_of(groups.num) {
            return invalid(format!("{num_experts} experts do not form {} groups", groups.num));
        }
        if groups.top == 0 || groups.top > groups.num {
            return invalid(format!("cannot choose {} of {} groups", groups.top, groups.num));
        }
        if groups.top * (num_experts / groups.num) < self.top_k {
            return invalid(format!("{} groups have fewer than {} experts", groups.top, self.top_k));
        }
        Ok(())
    }
}
