//! T5's attentions: a sequence over itself, with a learned bias for each distance, and a decoder over its source.

use candle_core::Tensor;
use kernels::{GqaSpec, LearnedScores, PositionBias, Reach};

use super::linear::{Bias, Linear};
use crate::error::EngineError;
use crate::forward_input::{PagedRows, Pass};
use crate::models::{CacheSite, ForwardContext};
use crate::weights::loader::Loader;

#[derive(Clone, Copy, Debug)]
pub struct AttentionSize {
    pub hidden_size: usize,
    pub num_heads: usize,
    pub head_dim: usize,
}

impl AttentionSize {
    pub fn cache_site(&self) -> CacheSite {
        CacheSite::Gqa { num_kv_heads: self.num_heads, head_dim: self.head_dim, window: None }
    }

    fn width(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// T5 does not scale its scores.
    fn spec(&self, reach: Reach) -> GqaSpec {
        GqaSpec { num_heads: self.num_heads, num_kv_heads: self.num_heads, head_dim: self.head_dim, scale: 1.0, reach }
    }
}

/// Of an encoder, in both directions, or of a decoder.
#[derive(Debug)]
pub struct SelfAttention {
    qkv: Linear,
    out: Linear,
    size: AttentionSize,
}

impl SelfAttention {
    /// `{prefix}.{q,k,v,o}.weight`
    pub fn load(loader: &Loader, prefix: &str, size: AttentionSize) -> Result<Self, EngineError> {
        let parts = ["q", "k", "v"].map(|part| (format!("{prefix}.{part}"), size.width()));
        let qkv = Linear::load_fused(loader, &parts, size.hidden_size, Bias::No)?;
        let out = Linear::load(loader, &format!("{prefix}.o"), size.hidden_size, size.width(), Bias::No)?;
        Ok(Self { qkv, out, size })
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(
        &self,
        x: &Tensor,
        (site, bias): (usize, &PositionBias),
        context: &mut ForwardContext,
    ) -> Result<Tensor, EngineError> {
        let qkv = self.qkv.forward(x)?;
        let q = heads(&qkv.narrow(1, 0, self.size.width())?, self.size)?;
        let kv = qkv.narrow(1, self.size.width(), 2 * self.size.width())?.contiguous()?;
        let reach = match context.input.pass {
            Pass::Encoder => Reach::Source,
            Pass::Decoder => Reach::Full,
        };
        let (cache, rows) = context.paged(site);
        cache.write(&kv, &rows.slot_mapping)?;
        let learned = LearnedScores { sinks: None, position_bias: Some(bias) };
        let spec = self.size.spec(reach);
        self.out.forward(&kernels::paged_attention(&q, cache, &rows.batch, &spec, learned)?)
    }
}

/// Of a decoder over what its encoder made of the source.
#[derive(Debug)]
pub struct CrossAttention {
    q: Linear,
    kv: Linear,
    out: Linear,
    size: AttentionSize,
}

impl CrossAttention {
    /// `{prefix}.{q,k,v,o}.weight`
    pub fn load(loader: &Loader, prefix: &str, size: AttentionSize) -> Result<Self, EngineError> {
        let kv = ["k", "v"].map(|part| (format!("{prefix}.{part}"), size.width()));
        Ok(Self {
            q: Linear::load(loader, &format!("{prefix}.q"), size.width(), size.hidden_size, Bias::No)?,
            kv: Linear::load_fused(loader, &kv, size.hidden_size, Bias::No)?,
            out: Linear::load(loader, &format!("{prefix}.o"), size.hidden_size, size.width(), Bias::No)?,
            size,
        })
    }

    /// Keys and values of the encoder's output, `[num_tokens, hidden_size]`, go where the source's positions are.
    pub fn keep_source(&self, encoded: &Tensor, site: usize, context: &mut ForwardContext) -> Result<(), EngineError> {
        let rows = self.kv.forward(encoded)?;
        let (cache, PagedRows { slot_mapping, .. }) = context.paged(site);
        Ok(cache.write(&rows, slot_mapping)?)
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(&self, x: &Tensor, site: usize, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let q = heads(&self.q.forward(x)?, self.size)?;
        let (cache, rows) = context.paged(site);
        let spec = self.size.spec(Reach::Source);
        let learned = LearnedScores::default();
        self.out.forward(&kernels::paged_attention(&q, cache, &rows.batch, &spec, learned)?)
    }
}

/// `[num_tokens, width]` to `[num_tokens, num_heads, head_dim]`.
fn heads(x: &Tensor, size: AttentionSize) -> Result<Tensor, EngineError> {
    Ok(x.contiguous()?.reshape((x.dim(0)?, size.num_heads, size.head_dim))?)
}
