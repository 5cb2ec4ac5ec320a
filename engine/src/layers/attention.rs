//! Grouped-query attention over the paged cache.

use std::sync::Arc;

use candle_core::Tensor;
use kernels::{GqaSpec, LearnedScores, Pointwise, Reach, RopeStyle, RopeTable};

use super::ends::scaled_by;
use super::linear::{Bias, Linear};
use super::norm::{Norm, NormKind};
use super::rope::{ContextLen, Rope};
use crate::error::EngineError;
use crate::models::{CacheSite, ForwardContext};
use crate::weights::loader::Loader;
use crate::weights::model_config::ModelConfig;

/// Everything that tells one family's attention from another's.
#[derive(Clone, Debug)]
pub struct AttentionConfig {
    pub hidden_size: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    pub qkv_bias: Bias,
    pub out_bias: Bias,
    /// Factor on the scores, `head_dim^-0.5` in most families.
    pub scale: f64,
    pub reach: Reach,
    /// A learned score per head that takes part in its softmax: `{prefix}.sinks [num_heads]`.
    pub has_sinks: bool,
    pub names: AttentionNames,
    pub qk_norm: Option<QkNorm>,
    pub norm_kind: NormKind,
    /// The query projection gives each head a gate beside its query, whose sigmoid multiplies what the head attends to.
    pub has_output_gate: bool,
    /// Clamp of queries, keys and values after their norms.
    pub clip: Option<f64>,
    /// `None`: positions do not rotate.
    pub rope: Option<Arc<RopeTable>>,
    pub rope_style: RopeStyle,
    pub temperature: Option<QueryTemperature>,
}

/// Queries grow with their position: `q * (1 + scale * ln(1 + floor((position + 1) / floor)))` (Llama 4's NoPE layers).
#[derive(Clone, Copy, Debug)]
pub struct QueryTemperature {
    pub scale: f64,
    pub floor: f64,
}

impl QueryTemperature {
    fn factor(&self, position: u32) -> f32 {
        let step = ((f64::from(position) + 1.0) / self.floor).floor();
        (1.0 + self.scale * (1.0 + step).ln()) as f32
    }
}

impl AttentionConfig {
    /// The plain attention of Llama and most families after it: no biases, no norms, rotation by halves.
    pub fn from_config(config: &ModelConfig, max_model_len: ContextLen) -> Result<Self, EngineError> {
        let (num_heads, head_dim) = (config.size("num_attention_heads")?, config.head_dim()?);
        let num_kv_heads = config.opt_count("num_key_value_heads")?.unwrap_or(num_heads);
        if num_kv_heads == 0 || !num_heads.is_multiple_of(num_kv_heads) {
            let reason = format!("is {num_kv_heads}, which does not divide num_attention_heads = {num_heads}");
            return Err(EngineError::Config { key: "num_key_value_heads", reason });
        }
        Ok(Self {
            hidden_size: config.size("hidden_size")?,
            num_heads,
            num_kv_heads,
            head_dim,
            qkv_bias: Bias::No,
            out_bias: Bias::No,
            scale: (head_dim as f64).powf(-0.5),
            reach: Reach::Full,
            has_sinks: false,
            names: AttentionNames::default(),
            qk_norm: None,
            norm_kind: NormKind::Rms,
            has_output_gate: false,
            clip: None,
            rope: Some(Rope::from_config(config)?.table(rotary_dim(config, head_dim)?, max_model_len)?),
            temperature: None,
            rope_style: RopeStyle::Halves,
        })
    }
}

/// Leading dimensions of a head that rotate: `rotary_dim`, or `partial_rotary_factor` of the head.
fn rotary_dim(config: &ModelConfig, head_dim: usize) -> Result<usize, EngineError> {
    let nested = Rope::section(config).map(|section| section.opt_float("partial_rotary_factor"));
    let factor = match nested.transpose()?.flatten() {
        Some(factor) => factor,
        None => config.float_or("partial_rotary_factor", 1.0)?,
    };
    let rotary_dim = config.count_or("rotary_dim", (head_dim as f64 * factor) as usize)?;
    if rotary_dim > head_dim {
        let reason = format!("gives {rotary_dim} of {head_dim} dimensions");
        return Err(EngineError::Config { key: "partial_rotary_factor", reason });
    }
    Ok(rotary_dim)
}

/// What a family calls its projections and norms under the layer's prefix.
#[derive(Clone, Copy, Debug)]
pub struct AttentionNames {
    pub qkv: QkvNames,
    pub out: &'static str,
    pub q_norm: &'static str,
    pub k_norm: &'static str,
}

#[derive(Clone, Copy, Debug)]
pub enum QkvNames {
    /// `q_proj`, `k_proj`, `v_proj`.
    Apart,
    /// One matrix: the rows of all query heads, then of all keys, then of all values.
    Fused(&'static str),
}

impl Default for AttentionNames {
    fn default() -> Self {
        Self { qkv: QkvNames::Apart, out: "o_proj", q_norm: "q_norm", k_norm: "k_norm" }
    }
}

/// RMS norms on queries and keys.
#[derive(Clone, Copy, Debug)]
pub enum QkNorm {
    /// Over each head apart, before rotation.
    PerHead { eps: f64 },
    /// Over each head apart, after rotation.
    PerRotatedHead { eps: f64 },
    /// Over each head apart, after rotation, without weights.
    PerRotatedHeadUnit { eps: f64 },
    /// Over the whole projection, before the split into heads.
    Whole { eps: f64 },
}

#[derive(Debug)]
pub struct Attention {
    qkv: Linear,
    out: Linear,
    norms: Option<(QkNorm, Norm, Norm)>,
    sinks: Option<Vec<f32>>,
    config: AttentionConfig,
    spec: GqaSpec,
    site: usize,
}

impl Attention {
    /// The tensors under `{prefix}.`, by the names in `config`; its keys and values live in cache site `site`.
    pub fn load(loader: &Loader, prefix: &str, config: AttentionConfig, site: usize) -> Result<Self, EngineError> {
        let (q_width, kv_width) = (config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim);
        let q_rows = if config.has_output_gate { 2 * q_width } else { q_width };
        let names = config.names;
        let name = |part: &str| format!("{prefix}.{part}");
        let parts = match names.qkv {
            QkvNames::Apart => vec![(name("q_proj"), q_rows), (name("k_proj"), kv_width), (name("v_proj"), kv_width)],
            QkvNames::Fused(fused) => vec![(name(fused), q_rows + 2 * kv_width)],
        };
        let qkv = Linear::load_fused(loader, &parts, config.hidden_size, config.qkv_bias)?;
        let out = Linear::load(loader, &name(names.out), config.hidden_size, q_width, config.out_bias)?;
        let norms = config.qk_norm.map(|kind| {
            if let QkNorm::PerRotatedHeadUnit { eps } = kind {
                let unit = || Norm::unit(loader, config.head_dim, eps);
                return Ok((kind, unit()?, unit()?));
            }
            let (q_len, k_len, eps) = match kind {
                QkNorm::PerHead { eps } | QkNorm::PerRotatedHead { eps } | QkNorm::PerRotatedHeadUnit { eps } => {
                    (config.head_dim, config.head_dim, eps)
                }
                QkNorm::Whole { eps } => (q_width, kv_width, eps),
            };
            let load = |part, len| Norm::load_kind(loader, &name(part), len, (config.norm_kind, eps));
            Ok::<_, EngineError>((kind, load(names.q_norm, q_len)?, load(names.k_norm, k_len)?))
        });
        let spec = GqaSpec {
            num_heads: config.num_heads,
            num_kv_heads: config.num_kv_heads,
            head_dim: config.head_dim,
            scale: config.scale as f32,
            reach: config.reach,
        };
        let sinks = config.has_sinks.then(|| loader.floats(&name("sinks"), &[config.num_heads])).transpose()?;
        Ok(Self { qkv, out, norms: norms.transpose()?, sinks, config, spec, site })
    }

    pub fn cache_site(&self) -> CacheSite {
        let GqaSpec { num_kv_heads, head_dim, reach, .. } = self.spec;
        CacheSite::Gqa { num_kv_heads, head_dim, window: reach.window() }
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let GqaSpec { num_heads, num_kv_heads, head_dim, .. } = self.spec;
        let kv_width = num_kv_heads * head_dim;
        let qkv = self.qkv.forward(x)?;
        let q_rows = qkv.dim(1)? - 2 * kv_width;
        let (mut q, gate) = self.split_gate(qkv.narrow(1, 0, q_rows)?)?;
        let mut k = qkv.narrow(1, q_rows, kv_width)?.contiguous()?;
        let mut v = qkv.narrow(1, q_rows + kv_width, kv_width)?;
        if let Some((QkNorm::Whole { .. }, q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        if let Some(limit) = self.config.clip {
            (q, k, v) = (q.clamp(-limit, limit)?, k.clamp(-limit, limit)?, v.clamp(-limit, limit)?);
        }
        let num_tokens = x.dim(0)?;
        q = q.reshape((num_tokens, num_heads, head_dim))?;
        k = k.reshape((num_tokens, num_kv_heads, head_dim))?;
        if let Some((QkNorm::PerHead { .. }, q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        let positions = &context.input.positions;
        if let Some(rope) = &self.config.rope {
            q = kernels::rope(&q, rope, positions, self.config.rope_style)?;
            k = kernels::rope(&k, rope, positions, self.config.rope_style)?;
        }
        if let Some((QkNorm::PerRotatedHead { .. } | QkNorm::PerRotatedHeadUnit { .. }, q_norm, k_norm)) = &self.norms {
            (q, k) = (q_norm.forward(&q)?, k_norm.forward(&k)?);
        }
        if let Some(temperature) = self.config.temperature {
            let factors: Vec<f32> = positions.iter().map(|&position| temperature.factor(position)).collect();
            let factors = Tensor::from_vec(factors, (num_tokens, 1, 1), q.device())?;
            q = scaled_by(&q, &factors)?;
        }
        let (cache, rows) = context.paged(self.site);
        cache.write_parts(&[&k.reshape((num_tokens, kv_width))?, &v], &rows.slot_mapping)?;
        let learned = LearnedScores { sinks: self.sinks.as_deref(), position_bias: None };
        let attended = kernels::paged_attention(&q, cache, &rows.batch, &self.spec, learned)?;
        match gate {
            None => self.out.forward(&attended),
            Some(gate) => self.out.forward(&(attended * kernels::pointwise(&gate, Pointwise::Sigmoid)?)?),
        }
    }

    /// The query projection's output as queries and, where heads have them, gates, both `[num_tokens, q_width]`.
    fn split_gate(&self, q: Tensor) -> Result<(Tensor, Option<Tensor>), EngineError> {
        if !self.config.has_output_gate {
            return Ok((q.contiguous()?, None));
        }
        let GqaSpec { num_heads, head_dim, .. } = self.spec;
        let num_tokens = q.dim(0)?;
        let heads = q.contiguous()?.reshape((num_tokens, num_heads, 2 * head_dim))?;
        let half = |first| heads.narrow(2, first, head_dim)?.contiguous()?.reshape((num_tokens, num_heads * head_dim));
        Ok((half(0)?, Some(half(head_dim)?)))
    }
}
