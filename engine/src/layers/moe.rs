//! The mixture-of-experts layer: router, routed experts, shared expert.

use candle_core::Tensor;
use kernels::{ExpertWeights, RouterSpec};

use super::linear::{Bias, Linear};
use super::mlp::Mlp;
use crate::error::EngineError;
use crate::models::ForwardContext;
use crate::weights::loader::Loader;

/// Most checkpoints' names of an expert's gate, up and down matrices.
pub const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

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
    experts: Vec<ExpertWeights>,
    shared: Option<SharedExpert>,
    /// Among the model's MoE layers, for the routing statistics.
    moe_idx: usize,
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
    pub experts: Vec<ExpertWeights>,
    pub shared: Option<SharedExpert>,
}

impl Moe {
    /// Refuses a router that cannot choose among the experts: at load, not in the first step.
    pub fn new(parts: MoeParts, moe_idx: usize) -> Result<Self, EngineError> {
        let MoeParts { gate, spec, experts, shared } = parts;
        spec.check(experts.len())?;
        Ok(Self { gate, spec, experts, shared, moe_idx })
    }

    pub fn num_experts(&self) -> usize {
        self.experts.len()
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let topk = kernels::route(&self.gate.forward(x)?, &self.spec)?;
        context.routing.record(self.moe_idx, &topk);
        let routed = kernels::grouped_swiglu(x, &self.experts, &topk)?;
        match &self.shared {
            None => Ok(routed),
            Some(shared) => Ok((routed + shared.forward(x)?)?),
        }
    }
}

impl SharedExpert {
    fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        let out = self.mlp.forward(x)?;
        match &self.gate {
            None => Ok(out),
            Some(gate) => {
                // 1 / (1 + e^-g), in f32 like every gate.
                let openness = ((gate.forward(x)?.neg()?.exp()? + 1.0)?).recip()?;
                Ok(out.broadcast_mul(&openness)?)
            }
        }
    }
}

/// Router weights `{name}.weight`.
pub fn load_gate(loader: &Loader, name: &str, shape: ExpertShape) -> Result<Linear, EngineError> {
    Linear::load(loader, name, shape.num_experts, shape.hidden_size, Bias::No)
}

/// Experts stored apart, as `{prefix}.{idx}.{names}.weight` in the order gate, up, down. Checkpoints that were saved with
/// fused experts (`{prefix}.gate_up_proj [E, 2I, H]`, `{prefix}.down_proj [E, H, I]`) load too.
pub fn load_experts(
    loader: &Loader,
    prefix: &str,
    names: [&str; 3],
    shape: ExpertShape,
) -> Result<Vec<ExpertWeights>, EngineError> {
    let fused = format!("{prefix}.gate_up_proj");
    if loader.has(&fused) {
        return load_stacked_experts(loader, [&fused, &format!("{prefix}.down_proj")], shape);
    }
    let [gate, up, down] = names;
    (0..shape.num_experts)
        .map(|idx| {
            let name = |part: &str| format!("{prefix}.{idx}.{part}.weight");
            let gate_up =
                loader.fused_weight(&[(name(gate), shape.width), (name(up), shape.width)], shape.hidden_size)?;
            Ok(ExpertWeights { gate_up, down: loader.weight(&name(down), shape.hidden_size, shape.width)? })
        })
        .collect()
}

/// Experts stacked in two tensors: `[E, 2I, H]` with the gate's rows first, and `[E, H, I]`.
pub fn load_stacked_experts(
    loader: &Loader,
    names: [&str; 2],
    shape: ExpertShape,
) -> Result<Vec<ExpertWeights>, EngineError> {
    let ExpertShape { num_experts, hidden_size, width } = shape;
    let gate_up = loader.stacked_weights(names[0], [num_experts, 2 * width, hidden_size])?;
    let down = loader.stacked_weights(names[1], [num_experts, hidden_size, width])?;
    Ok(gate_up.into_iter().zip(down).map(|(gate_up, down)| ExpertWeights { gate_up, down }).collect())
}
