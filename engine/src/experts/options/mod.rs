//! Routing options: what an operator or a request may change about what a router chooses. All are off by default.
//!
//! | room | what is in it | couples requests |
//! |---|---|---|
//! | `noise` | Gaussian noise on the router's logits | no |
//! | `overload` | a malus on the choice of experts that had more than their share | yes |
//! | `keep` | fewer experts where the router is sure (top-p), or where a request says so | no |
//! | `capacity` | a limit on the tokens of an expert in a step | yes |
//!
//! They act in this order. What couples requests gives a row other bytes beside other rows; the rest is a function of the row, of
//! its own request's options and of its position.

mod capacity;
mod keep;
mod noise;
mod overload;

use candle_core::Tensor;
use kernels::{Choices, RouterSpec, Scoring, TopK};

pub use capacity::{Capacity, Overflow};

use crate::error::EngineError;
use crate::forward_input::ForwardInput;
use overload::RunningLoad;

/// What acts on the rows of every request.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct RoutingOptions {
    /// Limit on the tokens that an expert takes in a step.
    pub capacity: Option<Capacity>,
    /// Standard deviation of the noise on router logits; 0 is none.
    pub noise: f32,
    /// How much is taken from the score by which an expert is chosen, for each time that it had its fair share too much; 0 is
    /// nothing.
    pub overload_decay: f32,
}

impl RoutingOptions {
    /// False if every router chooses as it was trained to.
    pub fn is_on(&self) -> bool {
        *self != Self::default()
    }

    /// True if what a row gives depends on the rows beside it, of other requests too. Then no block can be kept for
    /// others: what is in it would go on depending on who happened to be there when it was computed.
    pub fn couples_requests(&self) -> bool {
        self.capacity.is_some() || self.overload_decay != 0.0
    }
}

/// What acts on the rows of one request, and on no others.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ExpertOptions {
    /// Of the experts that a router chose, keep the first whose weights reach this share of all their weights; 1 keeps all.
    /// Above 0.
    pub top_p: f32,
    /// And of those at most so many, at least 1.
    pub max_experts: Option<u32>,
    /// Of the noise on router logits, where [`RoutingOptions::noise`] is on.
    pub noise_seed: u64,
}

impl Default for ExpertOptions {
    fn default() -> Self {
        Self { top_p: 1.0, max_experts: None, noise_seed: 0 }
    }
}

impl ExpertOptions {
    /// True if experts may be left out.
    pub fn leaves_out(&self) -> bool {
        self.top_p < 1.0 || self.max_experts.is_some()
    }

    /// The salt of block names for rows that these options act on: of no other options, and `salt` itself without any.
    pub fn salt(&self, salt: [u8; 32]) -> [u8; 32] {
        if *self == Self::default() {
            return salt;
        }
        let Self { top_p, max_experts, noise_seed } = self;
        let mut hasher = blake3::Hasher::new_derive_key("moesaic 2026 salt of prompts under expert options");
        hasher.update(&salt).update(&top_p.to_le_bytes());
        hasher.update(&u64::from(max_experts.unwrap_or(0)).to_le_bytes()).update(&noise_seed.to_le_bytes());
        hasher.finalize().into()
    }
}

/// A router of the model.
#[derive(Clone, Copy, Debug)]
pub struct Router<'a> {
    pub spec: &'a RouterSpec,
    /// Of each expert whether it computes nothing.
    pub is_free: &'a [bool],
    /// Among the model's MoE layers.
    pub moe_idx: usize,
}

/// Choices that the capacity of experts cut in a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CutChoices {
    pub num_dropped: u64,
    pub num_scaled: u64,
}

impl CutChoices {
    pub fn add(&mut self, other: Self) {
        self.num_dropped += other.num_dropped;
        self.num_scaled += other.num_scaled;
    }
}

/// Routers under the options in effect.
#[derive(Debug)]
pub struct RoutingControl {
    options: RoutingOptions,
    /// Of each MoE layer.
    loads: Vec<RunningLoad>,
    /// Of each sequence of the present step; empty where capacity cut nothing.
    cut: Vec<CutChoices>,
}

impl RoutingControl {
    /// `num_experts` of each MoE layer.
    pub fn new(options: RoutingOptions, num_experts: impl Iterator<Item = usize>) -> Self {
        Self { options, loads: num_experts.map(RunningLoad::new).collect(), cut: Vec::new() }
    }

    pub fn options(&self) -> &RoutingOptions {
        &self.options
    }

    /// What was cut in the step, by sequence; empty for nothing.
    pub fn take_cut(&mut self) -> Vec<CutChoices> {
        std::mem::take(&mut self.cut)
    }

    /// What the router chooses for the rows of a step: on the host where an option is in effect.
    pub fn route(
        &mut self,
        input: &ForwardInput,
        logits: &Tensor, /* [num_tokens, num_experts] */
        router: Router<'_>,
    ) -> Result<Choices, EngineError> {
        if !self.options.is_on() && !input.leaves_experts_out {
            return Ok(kernels::choose(logits, router.spec)?);
        }
        let noisy = match self.options.noise {
            0.0 => None,
            sigma => Some(noise::noisy(logits, input, (router.moe_idx, sigma))?),
        };
        let mut topk = self.choose(noisy.as_ref().unwrap_or(logits), router)?;
        if input.leaves_experts_out {
            keep_first(&mut topk, input, router.spec);
        }
        if let Some(capacity) = self.options.capacity {
            self.limit(&mut topk, input, (capacity, router.is_free));
        }
        Ok(Choices::Host(topk))
    }

    fn choose(&mut self, logits: &Tensor, router: Router<'_>) -> Result<TopK, EngineError> {
        let decay = self.options.overload_decay;
        if decay == 0.0 {
            return Ok(kernels::route(logits, router.spec)?);
        }
        let load = &mut self.loads[router.moe_idx];
        let topk = kernels::route(logits, &load.biased(router.spec, decay))?;
        load.observe(&topk);
        Ok(topk)
    }

    fn limit(&mut self, topk: &mut TopK, input: &ForwardInput, (capacity, is_free): (Capacity, &[bool])) {
        let cut = capacity.apply(topk, is_free);
        if cut.is_empty() {
            return;
        }
        let sequences = &input.paged.batch.cu_seqlens;
        self.cut.resize(sequences.len() - 1, CutChoices::default());
        for &pair in &cut {
            let sequence = sequences.partition_point(|&end| end as usize <= pair / topk.k) - 1;
            match capacity.overflow {
                Overflow::Drop => self.cut[sequence].num_dropped += 1,
                Overflow::Scale => self.cut[sequence].num_scaled += 1,
            }
        }
        let name = match capacity.overflow {
            Overflow::Drop => "moesaic_expert_dropped_tokens_total",
            Overflow::Scale => "moesaic_expert_scaled_tokens_total",
        };
        metrics::counter!(name).increment(cut.len() as u64);
    }
}

/// Leaves out what the requests of the rows want to do without.
fn keep_first(topk: &mut TopK, input: &ForwardInput, spec: &RouterSpec) {
    let renormalizes = spec.renormalize.is_some() || spec.scoring == Scoring::SoftmaxTopK;
    let k = topk.k;
    let mut num_left_out = 0;
    for (rows, options) in input.paged.batch.cu_seqlens.windows(2).zip(&input.experts) {
        if !options.leaves_out() {
            continue;
        }
        for token in rows[0] as usize..rows[1] as usize {
            let slots = token * k..(token + 1) * k;
            let weights = &mut topk.weights[slots.clone()];
            let num_kept = keep::num_kept(weights, options);
            keep::keep(weights, num_kept, renormalizes);
            topk.experts[slots][num_kept..].fill(TopK::NO_EXPERT);
            num_left_out += k - num_kept;
        }
    }
    metrics::counter!("moesaic_expert_left_out_choices_total").increment(num_left_out as u64);
}

#[cfg(test)]
mod tests;
