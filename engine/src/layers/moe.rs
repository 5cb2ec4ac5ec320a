//! The mixture-of-experts layer: router, routed experts, shared expert.

use candle_core::Tensor;
use kernels::{
    Choices, Expert, ExpertActivation, ExpertWeights, Experts, GluActivation, PackedWeight, Pointwise, RouterSpec, TopK,
};

use super::ends::scaled_by;
use super::linear::{Bias, Linear};
use super::mlp::Mlp;
use crate::error::EngineError;
use crate::experts::{ExpertCost, ExpertTraffic, MoeShape, Router, RouterParts};
use crate::models::ForwardContext;
use crate::weights::Role;
use crate::weights::loader::Loader;

/// Most checkpoints' names of an expert's gate, up and down matrices.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

/// The same where they are named as in Mixtral.
pub const NUMBERED: [&str; 3] = ["w1", "w3", "w2"];

/// Sizes of the routed experts of one layer.
#[derive(Clone, Copy, Debug)]
pub struct ExpertShape {
    pub num_experts: usize,
    pub hidden_size: usize,
    /// Inner width of one expert.
    pub width: usize,
}

#[derive(Debug)]
pub struct Moe {
    gate: Linear,
    spec: RouterSpec,
    num_experts: usize,
    /// None where the store has them.
    experts: Experts,
    shared: Option<SharedExpert>,
    weighting: Weighting,
    /// Tokens of a sequence that an expert takes; the others get nothing from the layer.
    capacity: Option<usize>,
    /// Among the model's MoE layers, for the routing statistics.
    moe_idx: usize,
    cost: ExpertCost,
}

/// Where a router's weights act.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Weighting {
    /// On what the experts give.
    #[default]
    Output,
    /// On what the experts get (Llama 4).
    Input,
}

/// Runs for every token beside the routed experts.
#[derive(Debug)]
pub struct SharedExpert {
    pub mlp: Mlp,
    /// A sigmoid gate on its output (Qwen2-MoE), `[1, hidden_size]`.
    pub gate: Option<Linear>,
}

/// The parts of a layer, as a family loads them.
#[derive(Debug)]
pub struct MoeParts {
    /// Router weights `[num_experts, hidden_size]`.
    pub gate: Linear,
    pub spec: RouterSpec,
    pub experts: Vec<Expert>,
    pub shared: Option<SharedExpert>,
    pub weighting: Weighting,
}

impl MoeParts {
    /// The layer that most families have: `{block}.gate.weight`, and under `{block}.experts` matrices of these `names`;
    /// what a family has beside them it adds.
    pub fn load(
        loader: &Loader,
        block: &str,
        names: [&str; 3],
        shape: ExpertShape,
        spec: RouterSpec,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            gate: load_gate(loader, &format!("{block}.gate"), shape)?,
            spec,
            experts: load_experts(loader, &format!("{block}.experts"), names, shape)?,
            shared: None,
            weighting: Weighting::default(),
        })
    }

    /// The same layer with another activation, where an expert has no special one of its own.
    pub fn activated(mut self, activation: GluActivation) -> Self {
        for expert in &mut self.experts {
            if let Expert::Glu(weights) = expert
                && weights.activation == ExpertActivation::Gated(GluActivation::Silu)
            {
                weights.activation = ExpertActivation::Gated(activation);
            }
        }
        self.shared =
            self.shared.map(|shared| SharedExpert { mlp: shared.mlp.activated(activation), gate: shared.gate });
        self
    }
}

impl Moe {
    /// Refuses a router that cannot choose among the experts: at load, not in the first step.
    pub fn new(parts: MoeParts, moe_idx: usize, loader: &Loader) -> Result<Self, EngineError> {
        let MoeParts { gate, spec, experts, shared, weighting } = parts;
        let num_experts = experts.len();
        spec.check(num_experts).map_err(EngineError::Router)?;
        let cost = ExpertCost::of(&experts);
        let router = || RouterParts { gate: gate.clone(), spec: spec.clone() };
        let experts = Experts::new(loader.keep_experts(moe_idx, router, experts)?)?;
        Ok(Self { gate, spec, num_experts, experts, shared, weighting, capacity: None, moe_idx, cost })
    }

    /// Lets each expert take so many tokens of every sequence in a step, first come, first served (Switch Transformer).
    pub fn with_capacity(self, capacity: usize) -> Self {
        Self { capacity: Some(capacity), ..self }
    }

    pub fn shape(&self) -> MoeShape {
        MoeShape { num_experts: self.num_experts, top_k: self.spec.top_k }
    }

    pub fn cost(&self) -> &ExpertCost {
        &self.cost
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let router = Router { spec: &self.spec, is_free: &self.cost.is_free, moe_idx: self.moe_idx };
        let mut choices = context.route(&self.gate.forward(x)?, router)?;
        if let Some(capacity) = self.capacity {
            let mut topk = choices.into_host()?;
            let num_dropped =
                drop_overflow(&mut topk, &context.input.paged.batch.cu_seqlens, (capacity, self.num_experts));
            let num_places = capacity * self.num_experts * (context.input.paged.batch.cu_seqlens.len() - 1);
            context.routing.record_capacity(self.moe_idx, (num_places, num_dropped));
            choices = Choices::Host(topk);
        }
        let routed = match self.weighting {
            Weighting::Output => self.compute(x, choices, context)?,
            Weighting::Input => {
                weigh_inputs(x, &choices.into_host()?, |x, topk| self.compute(x, Choices::Host(topk), context))?
            }
        };
        match &self.shared {
            None => Ok(routed),
            Some(shared) => Ok((routed + shared.forward(x)?)?),
        }
    }

    /// The chosen experts on every row, wherever they are.
    fn compute(&self, x: &Tensor, choices: Choices, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        match context.experts.as_deref_mut() {
            None => Ok(kernels::grouped_swiglu(x, &self.experts, &choices)?),
            Some(store) => {
                let topk = choices.into_host()?;
                let out = store.forward(self.moe_idx, x, &topk)?;
                let found = (store.missed(), &*self.cost.is_free);
                ExpertTraffic::count(context.traffic, &context.input.paged.batch.cu_seqlens, &topk, found);
                Ok(out)
            }
        }
    }
}

/// Takes the weight of every choice that runs and comes after `capacity` others of its expert in its sequence; returns how many
/// there were. `limits` are the capacity and the number of experts.
fn drop_overflow(topk: &mut TopK, cu_seqlens: &[u32], (capacity, num_experts): (usize, usize)) -> usize {
    let mut num_dropped = 0;
    for rows in cu_seqlens.windows(2) {
        let mut taken = vec![0; num_experts];
        for pair in rows[0] as usize * topk.k..rows[1] as usize * topk.k {
            let Some(taken) = taken.get_mut(topk.experts[pair] as usize) else { continue };
            *taken += 1;
            if *taken > capacity {
                topk.weights[pair] = 0.0;
                num_dropped += 1;
            }
        }
    }
    num_dropped
}

/// `Σ expert(weight * x)` over the slots of each token, in slot order.
fn weigh_inputs(
    x: &Tensor,
    topk: &TopK,
    mut compute: impl FnMut(&Tensor, TopK) -> Result<Tensor, EngineError>,
) -> Result<Tensor, EngineError> {
    let num_tokens = x.dim(0)?;
    let mut sum: Option<Tensor> = None;
    for slot in 0..topk.k {
        let of_slot = |pair: usize| pair * topk.k + slot;
        let weights: Vec<f32> = (0..num_tokens).map(|token| topk.weights[of_slot(token)]).collect();
        let choice = TopK {
            experts: (0..num_tokens).map(|token| topk.experts[of_slot(token)]).collect(),
            weights: vec![1.0; num_tokens],
            k: 1,
        };
        let weights = Tensor::from_vec(weights, (num_tokens, 1), x.device())?;
        let out = compute(&scaled_by(x, &weights)?, choice)?;
        sum = Some(match sum {
            Some(sum) => (sum + out)?,
            None => out,
        });
    }
    Ok(sum.expect("a router chooses at least one expert"))
}

impl SharedExpert {
    fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        let out = self.mlp.forward(x)?;
        match &self.gate {
            None => Ok(out),
            Some(gate) => {
                let openness = kernels::pointwise(&gate.forward(x)?, Pointwise::Sigmoid)?;
                Ok(out.broadcast_mul(&openness.to_dtype(out.dtype())?)?)
            }
        }
    }
}

/// Router weights `{name}.weight`.
pub fn load_gate(loader: &Loader, name: &str, shape: ExpertShape) -> Result<Linear, EngineError> {
    Linear::load_router(loader, name, [shape.num_experts, shape.hidden_size], Bias::No)
}

/// Experts stored apart, as `{prefix}.{idx}.{names}.weight` in the order gate, up, down. Checkpoints that were saved with
/// fused experts (`{prefix}.gate_up_proj [E, 2I, H]`, `{prefix}.down_proj [E, H, I]`) load too.
pub fn load_experts(
    loader: &Loader,
    prefix: &str,
    names: [&str; 3],
    shape: ExpertShape,
) -> Result<Vec<Expert>, EngineError> {
    let fused = format!("{prefix}.gate_up_proj");
    if loader.has(&fused) {
        return load_stacked_experts(loader, [&fused, &format!("{prefix}.down_proj")], shape);
    }
    let [gate, up, down] = names;
    (0..shape.num_experts)
        .map(|idx| {
            let name = |part: &str| format!("{prefix}.{idx}.{part}.weight");
            let parts = [(name(gate), shape.width), (name(up), shape.width)];
            let gate_up = loader.fused_weight(&parts, shape.hidden_size, Role::Expert)?;
            let down = loader.expert_weight(&name(down), shape.hidden_size, shape.width)?;
            Ok(Expert::Glu(ExpertWeights::swiglu(gate_up, down)))
        })
        .collect()
}

/// Experts stacked in two tensors: `[E, 2I, H]` with the gate's rows first, and `[E, H, I]`.
pub fn load_stacked_experts(loader: &Loader, names: [&str; 2], shape: ExpertShape) -> Result<Vec<Expert>, EngineError> {
    let ExpertShape { num_experts, hidden_size, width } = shape;
    let gate_up = loader.stacked_weights((names[0], Role::Expert), [num_experts, 2 * width, hidden_size])?;
    let down = loader.stacked_weights((names[1], Role::Expert), [num_experts, hidden_size, width])?;
    let expert = |(gate_up, down)| Expert::Glu(ExpertWeights::swiglu(gate_up, down));
    Ok(gate_up.into_iter().zip(down).map(expert).collect())
}

/// Matrices of experts stored as `[experts, in, out]`, each as `[out, in]`; `shape` is `[experts, out, in]`.
pub fn load_transposed(loader: &Loader, name: &str, shape: [usize; 3]) -> Result<Vec<PackedWeight>, EngineError> {
    let [num_experts, rows, cols] = shape;
    let open = || loader.borrow_stacked(name, [num_experts, cols, rows]);
    loader.made((name, Role::Expert), std::iter::repeat_n([rows, cols], num_experts), open, |stored, idx| {
        let values = transposed(&stored[idx].to_f32(), rows);
        Ok(PackedWeight::from_f32(stored[idx].format(), rows, cols, &values)?)
    })
}

/// `[rows, cols]` to `[cols, rows]`.
pub fn transposed(values: &[f32], cols: usize) -> Vec<f32> {
    (0..cols).flat_map(|col| values.iter().skip(col).step_by(cols).copied()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capacity_counts_within_each_sequence() {
        let experts = vec![0, 1, 0, 0, 0, 1, 1];
        let mut topk = TopK { weights: vec![0.5; experts.len()], experts, k: 1 };
        assert_eq!(drop_overflow(&mut topk, &[0, 4, 7], (1, 2)), 3);
        assert_eq!(topk.weights, [0.5, 0.5, 0.0, 0.0, 0.5, 0.5, 0.0]);
    }
}
