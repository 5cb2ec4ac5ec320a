//! DeepSeek's arrangement, which many families took over: dense first layers, then many narrow routed experts beside
//! shared ones.

use kernels::{GroupScore, Groups, RouterSpec, Scoring};

use super::ModelSource;
use crate::error::EngineError;
use crate::layers::decoder::FeedForwardParts;
use crate::layers::linear::Bias;
use crate::layers::mlp::Mlp;
use crate::layers::moe::{self, ExpertShape, MoeParts, SharedExpert};
use crate::weights::model_config::ModelConfig;

/// The feed-forward halves of all layers of a model.
pub(super) struct FineGrained {
    /// Layers before this one are dense.
    pub(super) first_moe: usize,
    /// Every so many layers hold experts, the others are dense.
    pub(super) frequency: usize,
    pub(super) dense_width: usize,
    pub(super) shape: ExpertShape,
    /// Shared experts, as wide together as so many routed ones.
    pub(super) num_shared: usize,
    /// Without the bias, which is loaded per layer.
    pub(super) spec: RouterSpec,
    /// Where a layer keeps its bias on the choice of experts, under `mlp.`, and its shape.
    pub(super) choice_bias: Option<ChoiceBias>,
    /// Of dense layers and shared experts; routed experts have none.
    pub(super) bias: Bias,
}

/// A learned bias on the choice of experts (DeepSeek-V3's auxiliary-loss-free balancing).
#[derive(Clone, Copy)]
pub(super) enum ChoiceBias {
    /// `[num_experts]`
    Vector(&'static str),
    /// `[1, num_experts]`
    Row(&'static str),
}

impl FineGrained {
    /// DeepSeek's keys; families that have others replace fields.
    pub(super) fn from_config(config: &ModelConfig, spec: RouterSpec) -> Result<Self, EngineError> {
        Ok(Self {
            first_moe: config.count_or("first_k_dense_replace", 0)?,
            frequency: config.count_or("moe_layer_freq", 1)?.max(1),
            dense_width: config.count_or("intermediate_size", 0)?,
            shape: ExpertShape {
                num_experts: config.size("n_routed_experts")?,
                hidden_size: config.size("hidden_size")?,
                width: config.size("moe_intermediate_size")?,
            },
            num_shared: config.count_or("n_shared_experts", 0)?,
            spec,
            choice_bias: None,
            bias: Bias::No,
        })
    }

    pub(super) fn load(&self, source: &ModelSource, prefix: &str, idx: usize) -> Result<FeedForwardParts, EngineError> {
        if idx < self.first_moe || !idx.is_multiple_of(self.frequency) {
            return self.load_dense(source, prefix);
        }
        self.load_moe(source, prefix)
    }

    pub(super) fn load_dense(&self, source: &ModelSource, prefix: &str) -> Result<FeedForwardParts, EngineError> {
        let sizes = [self.shape.hidden_size, self.dense_width];
        Ok(FeedForwardParts::Dense(Mlp::load_with(source.loader, &format!("{prefix}.mlp"), sizes, self.bias)?))
    }

    pub(super) fn load_moe(&self, source: &ModelSource, prefix: &str) -> Result<FeedForwardParts, EngineError> {
        let (loader, shape) = (source.loader, self.shape);
        let mlp = format!("{prefix}.mlp");
        let bias = match self.choice_bias {
            None => None,
            Some(ChoiceBias::Vector(name)) => Some(loader.floats(&format!("{mlp}.{name}"), &[shape.num_experts])?),
            Some(ChoiceBias::Row(name)) => Some(loader.floats(&format!("{mlp}.{name}"), &[1, shape.num_experts])?),
        };
        let shared = match self.num_shared {
            0 => None,
            n => {
                let sizes = [shape.hidden_size, n * shape.width];
                Some(Mlp::load_with(loader, &format!("{mlp}.shared_experts"), sizes, self.bias)?)
            }
        };
        Ok(FeedForwardParts::moe(MoeParts {
            shared: shared.map(|mlp| SharedExpert { mlp, gate: None }),
            ..MoeParts::load(loader, &mlp, moe::PROJECTIONS, shape, RouterSpec { bias, ..self.spec.clone() })?
        }))
    }
}

/// DeepSeek-V3's router: sigmoid scores; bias and groups (by the sum of their two best) steer the choice, unbiased scores
/// are the weights.
pub(super) fn sigmoid_router(config: &ModelConfig) -> Result<RouterSpec, EngineError> {
    Ok(RouterSpec {
        groups: groups(config, GroupScore::TopTwoSum, f32::NEG_INFINITY)?,
        renormalize: config.flag_or("norm_topk_prob", true)?.then_some(1e-20),
        scale: config.float_or("routed_scaling_factor", 1.0)? as f32,
        ..RouterSpec::new(Scoring::Sigmoid, config.size("num_experts_per_tok")?)
    })
}

/// `n_group` groups of which `topk_group` are open; one group is no limit at all.
pub(super) fn groups(config: &ModelConfig, score: GroupScore, masked: f32) -> Result<Option<Groups>, EngineError> {
    let num = config.count_or("n_group", 1)?;
    let top = config.count_or("topk_group", num)?;
    Ok((num > 1).then_some(Groups { num, top, score, masked }))
}

/// Multi-token-prediction layers are stored after the last decoder layer.
pub(super) fn is_mtp_tensor(config: &ModelConfig, name: &str) -> bool {
    let num_layers = config.count_or("num_hidden_layers", usize::MAX).unwrap_or(usize::MAX);
    let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
    layer.is_some_and(|layer| layer >= num_layers)
}
