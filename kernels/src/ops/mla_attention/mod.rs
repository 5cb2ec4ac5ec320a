//! Multi-head latent attention in its absorbed form (DeepSeek-V2): all heads share one latent and one rotary key.

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp2, Layout, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::attention::cuda::Call;
use super::attention::{self, Attention, HeadLayout};
use super::paged_attention::{LearnedScores, Reach};
use crate::check::{self, Input, f32_output, f32_slice};
use crate::error::{KernelError, Result};
use crate::paged_batch::PagedBatch;
use crate::paged_cache::PagedCache;

const OP: &str = "mla_attention";

/// Heads of latent attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MlaSpec {
    pub num_heads: usize,
    /// `kv_lora_rank`
    pub latent_dim: usize,
    /// `qk_rope_head_dim`
    pub rope_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
}

/// `softmax(scale * (q_latent · cᵀ + q_rope · rᵀ)) · c` for each row and head over the context of its sequence. A row of
/// the cache holds the latent `c`, then the rotary key `r`. Fails if the shapes do not fit, the operands are not on
/// one device, or the batch names rows or blocks that do not exist.
pub fn mla_attention(
    q_latent: &Tensor,  /* [num_tokens, num_heads, latent_dim] */
    q_rope: &Tensor,    /* [num_tokens, num_heads, rope_dim] */
    cache: &PagedCache, /* width latent_dim + rope_dim */
    batch: &PagedBatch,
    spec: &MlaSpec,
) -> Result<Tensor /* [num_tokens, num_heads, latent_dim] */> {
    let input = Input { op: OP, what: "q_latent", tensor: q_latent };
    let [num_tokens, _, _] = input.dims("[num_tokens, num_heads, latent_dim]")?;
    input.has_dims(&[num_tokens, spec.num_heads, spec.latent_dim])?;
    Input { op: OP, what: "q_rope", tensor: q_rope }.has_dims(&[num_tokens, spec.num_heads, spec.rope_dim])?;
    check::length(OP, "width of the cache", cache.width(), spec.latent_dim + spec.rope_dim)?;
    if !cache.is_on(q_latent.device()) {
        return Err(KernelError::OtherDevice { op: OP, what: "cache" });
    }
    batch.check(OP, num_tokens, cache, Reach::Full)?;
    Ok(q_latent.apply_op2_no_bwd(q_rope, &MlaAttention { cache, batch, spec })?)
}

struct MlaAttention<'a> {
    cache: &'a PagedCache,
    batch: &'a PagedBatch,
    spec: &'a MlaSpec,
}

impl MlaAttention<'_> {
    fn heads(&self) -> HeadLayout {
        let MlaSpec { num_heads, latent_dim, rope_dim, .. } = *self.spec;
        HeadLayout {
            num_heads,
            group_size: num_heads,
            key_start: 0,
            key_dim: latent_dim + rope_dim,
            value_start: 0,
            value_dim: latent_dim,
        }
    }
}

impl CustomOp2 for MlaAttention<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        q_latent: &CpuStorage,
        latent_layout: &Layout,
        q_rope: &CpuStorage,
        rope_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let &Self { cache, batch, spec: &MlaSpec { latent_dim, rope_dim, scale, .. } } = self;
        let q = [(f32_slice(q_latent, latent_layout)?, latent_dim), (f32_slice(q_rope, rope_layout)?, rope_dim)];
        let (heads, reach, learned) = (self.heads(), Reach::Full, LearnedScores::default());
        let out = attention::forward(&Attention { q: &q, cache, batch, heads, scale, reach, learned });
        Ok(f32_output(out, latent_layout.shape().clone()))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        q_latent: &CudaStorage,
        latent_layout: &Layout,
        q_rope: &CudaStorage,
        rope_layout: &Layout,
    ) -> candle_core::Result<(CudaStorage, Shape)> {
        let &Self { cache, batch, spec: &MlaSpec { latent_dim, rope_dim, scale, .. } } = self;
        let q = [(q_latent, latent_layout, latent_dim), (q_rope, rope_layout, rope_dim)];
        let (heads, reach, learned) = (self.heads(), Reach::Full, LearnedScores::default());
        let out = attention::cuda::forward(&Call { q: &q, cache, batch, heads, scale, reach, learned })?;
        Ok((out, latent_layout.shape().clone()))
    }
}
