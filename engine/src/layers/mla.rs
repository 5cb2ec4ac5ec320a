//! Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) in its absorbed form.
//!
//! The cache holds the compressed latent and the shared rotary key of a token, nothing per head. Queries are carried into
//! the latent space (`q W_uk`), attend there, and the result is carried out of it (`W_uv`).

use std::iter::repeat_n;
use std::sync::Arc;

use candle_core::Tensor;
use kernels::{MlaSpec, PackedWeight, QuantFormat, RopeStyle, RopeTable, WeightFormat};

use super::linear::{Bias, Linear};
use super::moe::transposed;
use super::norm::Norm;
use crate::error::EngineError;
use crate::models::{CacheSite, ForwardContext};
use crate::weights::Role;
use crate::weights::loader::Loader;

/// Sizes and settings, with the Hugging Face keys.
#[derive(Clone, Debug)]
pub struct MlaConfig {
    pub hidden_size: usize,
    pub num_heads: usize,
    /// `None`: queries come from one full projection.
    pub q_lora_rank: Option<usize>,
    pub kv_lora_rank: usize,
    pub qk_nope_head_dim: usize,
    pub qk_rope_head_dim: usize,
    pub v_head_dim: usize,
    /// Bias on `q_a_proj`, `kv_a_proj_with_mqa` and `o_proj`.
    pub bias: Bias,
    /// Of the two low-rank norms; the reference fixes it at 1e-6.
    pub lora_norm_eps: f64,
    pub scale: f64,
    /// Factors on queries and on the latent (LongCat-Flash); 1 elsewhere.
    pub lora_scales: LoraScales,
    pub rope: Arc<RopeTable>,
    pub rope_style: RopeStyle,
}

/// Factors that make up for the variance that low ranks lose.
#[derive(Clone, Copy, Debug)]
pub struct LoraScales {
    pub query: f64,
    pub latent: f64,
}

impl Default for LoraScales {
    fn default() -> Self {
        Self { query: 1.0, latent: 1.0 }
    }
}

#[derive(Debug)]
pub struct MlaAttention {
    query: Query,
    kv_a: Linear,
    kv_a_norm: Norm,
    /// Per head `[kv_lora_rank, qk_nope_head_dim]`.
    to_latent: Vec<PackedWeight>,
    /// Per head `[v_head_dim, kv_lora_rank]`.
    from_latent: Vec<PackedWeight>,
    out: Linear,
    config: MlaConfig,
    spec: MlaSpec,
    site: usize,
}

#[derive(Debug)]
enum Query {
    Full(Linear),
    LowRank { down: Linear, norm: Norm, up: Linear },
}

impl MlaAttention {
    /// The tensors under `{prefix}.`, named as DeepSeek publishes them.
    pub fn load(loader: &Loader, prefix: &str, config: MlaConfig, site: usize) -> Result<Self, EngineError> {
        let name = |part: &str| format!("{prefix}.{part}");
        let (latent, heads, hidden) = (config.kv_lora_rank, config.num_heads, config.hidden_size);
        let q_width = heads.saturating_mul(config.qk_nope_head_dim + config.qk_rope_head_dim);
        let query = match config.q_lora_rank {
            None => Query::Full(Linear::load(loader, &name("q_proj"), q_width, hidden, Bias::No)?),
            Some(rank) => Query::LowRank {
                down: Linear::load(loader, &name("q_a_proj"), rank, hidden, config.bias)?,
                // What follows is linear, so the factor may act here, once and for all.
                norm: Norm::load(loader, &name("q_a_layernorm"), rank, config.lora_norm_eps)?
                    .scaled(config.lora_scales.query)?,
                up: Linear::load(loader, &name("q_b_proj"), q_width, rank, Bias::No)?,
            },
        };
        let kv_a_width = latent + config.qk_rope_head_dim;
        let kv_a = Linear::load(loader, &name("kv_a_proj_with_mqa"), kv_a_width, hidden, config.bias)?;
        let kv_a_norm = Norm::load(loader, &name("kv_a_layernorm"), latent, config.lora_norm_eps)?
            .scaled(config.lora_scales.latent)?;
        let (to_latent, from_latent) = load_kv_b(loader, prefix, &config)?;
        let out = Linear::load(loader, &name("o_proj"), hidden, heads * config.v_head_dim, config.bias)?;
        let spec = MlaSpec {
            num_heads: heads,
            latent_dim: latent,
            rope_dim: config.qk_rope_head_dim,
            scale: config.scale as f32,
        };
        Ok(Self { query, kv_a, kv_a_norm, to_latent, from_latent, out, config, spec, site })
    }

    pub fn cache_site(&self) -> CacheSite {
        CacheSite::Mla { latent_dim: self.spec.latent_dim, rope_dim: self.spec.rope_dim }
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let MlaSpec { num_heads, latent_dim, rope_dim, .. } = self.spec;
        let nope_dim = self.config.qk_nope_head_dim;
        let num_tokens = x.dim(0)?;
        let positions = &context.input.positions;
        let q = self.query.forward(x)?.reshape((num_tokens, num_heads, nope_dim + rope_dim))?;
        let q_rope = q.narrow(2, nope_dim, rope_dim)?.contiguous()?;
        let q_rope = kernels::rope(&q_rope, &self.config.rope, positions, self.config.rope_style)?;
        let q_latent = kernels::head_linear(&q.narrow(2, 0, nope_dim)?.contiguous()?, &self.to_latent)?;

        let kv = self.kv_a.forward(x)?;
        let latent = self.kv_a_norm.forward(&kv.narrow(1, 0, latent_dim)?.contiguous()?)?;
        let k_rope = kv.narrow(1, latent_dim, rope_dim)?.contiguous()?.reshape((num_tokens, 1, rope_dim))?;
        let k_rope = kernels::rope(&k_rope, &self.config.rope, positions, self.config.rope_style)?;
        let (cache, rows) = context.paged(self.site);
        cache.write_parts(&[&latent, &k_rope.reshape((num_tokens, rope_dim))?], &rows.slot_mapping)?;

        let attended = kernels::mla_attention(&q_latent, &q_rope, cache, &rows.batch, &self.spec)?;
        let values = kernels::head_linear(&attended, &self.from_latent)?;
        self.out.forward(&values.reshape((num_tokens, num_heads * self.config.v_head_dim))?)
    }
}

impl Query {
    fn forward(&self, x: &Tensor) -> Result<Tensor, EngineError> {
        match self {
            Self::Full(linear) => linear.forward(x),
            Self::LowRank { down, norm, up } => up.forward(&norm.forward(&down.forward(x)?)?),
        }
    }
}

/// `W_uk` (transposed, so that both are `[out, in]`) and `W_uv` of each head: `k_b_proj [heads, latent, nope]` and
/// `v_b_proj [heads, v, latent]` where the checkpoint has them so, else `kv_b_proj [heads * (nope + v), latent]`.
fn load_kv_b(
    loader: &Loader,
    prefix: &str,
    config: &MlaConfig,
) -> Result<(Vec<PackedWeight>, Vec<PackedWeight>), EngineError> {
    let (latent, nope, v) = (config.kv_lora_rank, config.qk_nope_head_dim, config.v_head_dim);
    let [joint, key, value] = ["kv_b_proj", "k_b_proj", "v_b_proj"].map(|part| format!("{prefix}.{part}.weight"));
    if loader.has(&key) {
        // Some files have it both ways.
        loader.skip(&joint);
        let keys = loader.stacked_weights((&key, Role::Layer), [config.num_heads, latent, nope])?;
        return Ok((keys, loader.stacked_weights((&value, Role::Layer), [config.num_heads, v, latent])?));
    }
    let shape = [config.num_heads.saturating_mul(nope + v), latent];
    let open = || loader.borrow_weight(&joint, shape);
    let rows_of = |head: usize| head * (nope + v)..(head + 1) * (nope + v);
    let keys = format!("{joint}/keys");
    let to_latent =
        loader.made((&keys, Role::Layer), repeat_n([latent, nope], config.num_heads), open, |stored, head| {
            let rows: Vec<usize> = rows_of(head).take(nope).collect();
            // Turned the other way they have groups of their own: codes of four bits would be rounded a second time.
            let format = match stored.format() {
                WeightFormat::Quantized(_) => WeightFormat::Quantized(QuantFormat::INT8),
                plain => plain,
            };
            let turned = transposed(&stored.select_rows(&rows)?.to_f32(), latent);
            Ok(PackedWeight::from_f32(format, latent, nope, &turned)?)
        })?;
    let values = format!("{joint}/values");
    let from_latent =
        loader.made((&values, Role::Layer), repeat_n([v, latent], config.num_heads), open, |stored, head| {
            Ok(stored.select_rows(&rows_of(head).skip(nope).collect::<Vec<_>>())?)
        })?;
    Ok((to_latent, from_latent))
}
