//! Mixture of attention heads (JetMoE, arXiv 2404.07413): a router picks experts that make queries and take outputs; keys
//! and values are shared.

use std::sync::Arc;

use candle_core::Tensor;
use kernels::{GqaSpec, LearnedScores, PackedWeight, RopeStyle, RopeTable, RouterSpec, TopK};

use super::decoder::gather_rows;
use super::ends::scaled_by;
use super::linear::{Bias, Linear};
use crate::error::EngineError;
use crate::experts::{ExpertCost, MoeShape};
use crate::models::{CacheSite, ForwardContext};
use crate::weights::Role;
use crate::weights::loader::Loader;

/// Sizes and settings of one layer.
#[derive(Clone, Debug)]
pub struct MoaConfig {
    pub hidden_size: usize,
    pub num_experts: usize,
    /// Each chosen expert makes one query head per key-value head.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub spec: RouterSpec,
    pub rope: Arc<RopeTable>,
}

/// Where a layer keeps its rows and counts its choices.
#[derive(Clone, Copy, Debug)]
pub struct MoaPlace {
    pub site: usize,
    pub moe_idx: usize,
}

#[derive(Debug)]
pub struct MoaAttention {
    router: Linear,
    /// Per expert `[num_kv_heads * head_dim, hidden_size]`.
    queries: Vec<PackedWeight>,
    /// Per expert `[hidden_size, num_kv_heads * head_dim]`.
    outputs: Vec<PackedWeight>,
    kv: Linear,
    bias: Tensor,
    config: MoaConfig,
    attention: GqaSpec,
    place: MoaPlace,
}

impl MoaAttention {
    /// `{prefix}.experts.{router.layer,input_linear,output_linear}.weight`, `{prefix}.experts.bias` and
    /// `{prefix}.kv_proj.weight`, keys before values.
    pub fn load(loader: &Loader, prefix: &str, config: MoaConfig, place: MoaPlace) -> Result<Self, EngineError> {
        let MoaConfig { hidden_size, num_experts, num_kv_heads, head_dim, .. } = config;
        let width = num_kv_heads * head_dim;
        let name = |part: &str| format!("{prefix}.experts.{part}");
        config.spec.check(num_experts).map_err(EngineError::Router)?;
        let num_heads = config.spec.top_k * num_kv_heads;
        Ok(Self {
            router: Linear::load_router(loader, &name("router.layer"), [num_experts, hidden_size], Bias::No)?,
            queries: loader
                .stacked_weights((&name("input_linear.weight"), Role::Layer), [num_experts, width, hidden_size])?,
            outputs: loader
                .stacked_weights((&name("output_linear.weight"), Role::Layer), [num_experts, hidden_size, width])?,
            kv: Linear::load(loader, &format!("{prefix}.kv_proj"), 2 * width, hidden_size, Bias::No)?,
            bias: loader.vector(&name("bias"), hidden_size)?,
            attention: GqaSpec {
                num_heads,
                num_kv_heads,
                head_dim,
                scale: (head_dim as f32).powf(-0.5),
                reach: kernels::Reach::Full,
            },
            config,
            place,
        })
    }

    pub fn cache_site(&self) -> CacheSite {
        CacheSite::Gqa { num_kv_heads: self.config.num_kv_heads, head_dim: self.config.head_dim, window: None }
    }

    pub fn shape(&self) -> MoeShape {
        MoeShape { num_experts: self.config.num_experts, top_k: self.config.spec.top_k }
    }

    /// All chosen experts run: options leave none of them out.
    pub fn cost(&self) -> ExpertCost {
        ExpertCost::fixed(self.config.num_experts)
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let MoaConfig { num_kv_heads, head_dim, ref rope, .. } = self.config;
        let (width, num_heads) = (num_kv_heads * head_dim, self.attention.num_heads);
        let num_tokens = x.dim(0)?;
        let choices = kernels::choose(&self.router.forward(x)?, &self.config.spec)?;
        context.record_routing(self.place.moe_idx, &choices);
        let topk = choices.into_host()?;

        let tokens: Vec<u32> = (0..num_tokens as u32).flat_map(|token| (0..topk.k).map(move |_| token)).collect();
        let q = grouped_linear(&gather_rows(x, &tokens)?, &topk, &self.queries)?;
        let positions = &context.input.positions;
        let q = kernels::rope(&q.reshape((num_tokens, num_heads, head_dim))?, rope, positions, RopeStyle::Halves)?;
        let kv = self.kv.forward(x)?;
        let k = kv.narrow(1, 0, width)?.contiguous()?.reshape((num_tokens, num_kv_heads, head_dim))?;
        let k = kernels::rope(&k, rope, positions, RopeStyle::Halves)?.reshape((num_tokens, width))?;
        let (cache, rows) = context.paged(self.place.site);
        cache.write_parts(&[&k, &kv.narrow(1, width, width)?], &rows.slot_mapping)?;

        // Experts make heads in the order [slot, kv head]; the op wants those of one kv head together.
        let q = swap(&q, [num_tokens, topk.k, num_kv_heads, head_dim])?;
        let q = q.reshape((num_tokens, num_heads, head_dim))?;
        let learned = LearnedScores::default();
        let attended = kernels::paged_attention(&q, cache, &rows.batch, &self.attention, learned)?;
        let attended = swap(&attended, [num_tokens, num_kv_heads, topk.k, head_dim])?;
        let out = grouped_linear(&attended.reshape((num_tokens * topk.k, width))?, &topk, &self.outputs)?;
        self.combine(&out, &topk)
    }

    /// Weighted sum over the slots of each token, in slot order, and the bias.
    fn combine(&self, out: &Tensor, topk: &TopK) -> Result<Tensor, EngineError> {
        let num_pairs = topk.weights.len();
        let num_tokens = num_pairs / topk.k;
        let weights = Tensor::from_slice(&topk.weights, (num_pairs, 1), out.device())?;
        let weighted = scaled_by(out, &weights)?.reshape((num_tokens, topk.k, self.config.hidden_size))?;
        let mut sum = weighted.get_on_dim(1, 0)?;
        for slot in 1..topk.k {
            sum = (sum + weighted.get_on_dim(1, slot)?)?;
        }
        Ok(sum.broadcast_add(&self.bias.to_dtype(sum.dtype())?)?)
    }
}

/// Swaps the two middle dimensions of a tensor of shape `dims`.
fn swap(x: &Tensor, dims: [usize; 4]) -> Result<Tensor, EngineError> {
    Ok(x.reshape(dims.to_vec())?.transpose(1, 2)?.contiguous()?)
}

/// Row `p` of `x` through the expert of pair `p`, one matrix product per expert: `[pairs, in]` to `[pairs, out]`.
fn grouped_linear(x: &Tensor, topk: &TopK, experts: &[PackedWeight]) -> Result<Tensor, EngineError> {
    let mut sorted: Vec<u32> = (0..topk.experts.len() as u32).collect();
    sorted.sort_by_key(|&pair| topk.experts[pair as usize]);
    let parts = sorted
        .chunk_by(|&a, &b| topk.experts[a as usize] == topk.experts[b as usize])
        .map(|pairs| {
            let expert = topk.experts[pairs[0] as usize] as usize;
            Ok(kernels::linear(&gather_rows(x, pairs)?, &experts[expert], None)?)
        })
        .collect::<Result<Vec<Tensor>, EngineError>>()?;
    let mut place = vec![0; sorted.len()];
    for (row, &pair) in sorted.iter().enumerate() {
        place[pair as usize] = row as u32;
    }
    gather_rows(&Tensor::cat(&parts, 0)?, &place)
}
