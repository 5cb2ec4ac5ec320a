//! Attention of grouped query heads over keys and values in blocks.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod cache_write;

use std::ops::Range;

#[cfg(feature = "cuda")]
use candle_core::CudaStorage;
use candle_core::{CpuStorage, CustomOp1, Layout, Shape, Tensor};

#[cfg(feature = "cuda")]
use super::attention::cuda::Call;
use super::attention::{self, Attention, HeadLayout};
use crate::check::{self, Input, f32_output, f32_slice};
use crate::error::{KernelError, Result};
use crate::paged_batch::PagedBatch;
use crate::paged_cache::PagedCache;

const OP: &str = "paged_attention";

/// Heads of grouped-query attention (Ainslie et al., 2023).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GqaSpec {
    pub num_heads: usize,
    /// Divides `num_heads`; head `h` reads key-value head `h / (num_heads / num_kv_heads)`.
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Multiplies the scores.
    pub scale: f32,
    pub reach: Reach,
}

/// Which positions `j` a row at position `i` sees. All but `Source` are causal, `j <= i`, and keep to the decoder's own
/// positions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    Full,
    /// The last so many, its own included: `i - window < j`.
    Window(usize),
    /// Those of its own chunk of so many: `i / chunk == j / chunk` (Llama 4).
    Chunk(usize),
    /// All of the source, in both directions: self-attention of an encoder, cross-attention of a decoder.
    Source,
}

impl Reach {
    /// The first position that the row at `position` sees in a sequence that begins with a source of `source_len`; never
    /// less for a later row.
    pub(crate) fn start(self, position: usize, source_len: usize) -> usize {
        match self {
            Self::Source => 0,
            Self::Full => source_len,
            Self::Window(window) => (position + 1).saturating_sub(window).max(source_len),
            Self::Chunk(chunk) => (position / chunk * chunk).max(source_len),
        }
    }

    /// Positions that the row at `position` of such a sequence sees. Neither end is ever less for a later row.
    pub(crate) fn visible(self, position: usize, source_len: usize) -> Range<usize> {
        let end = if self == Self::Source { source_len } else { position + 1 };
        self.start(position, source_len)..end
    }

    /// Positions that a row sees at most, its own included, where that is less than all.
    pub fn window(self) -> Option<usize> {
        match self {
            Self::Window(len) | Self::Chunk(len) => Some(len),
            Self::Full | Self::Source => None,
        }
    }
}

/// Learned parts of the scores, beside what queries and keys give.
#[derive(Debug, Clone, Copy, Default)]
pub struct LearnedScores<'a> {
    /// One more score of each head that takes part in its softmax and has no value behind it (gpt-oss), `[num_heads]`.
    pub sinks: Option<&'a [f32]>,
    pub position_bias: Option<&'a PositionBias>,
}

/// A term of the score that depends on head and distance (T5; Raffel et al., 2020).
#[derive(Debug, Clone, PartialEq)]
pub struct PositionBias {
    /// Of key minus query position, from `-max_distance` to `max_distance`: `[num_heads, 2 * max_distance + 1]`.
    pub table: Vec<f32>,
    /// What lies further away has the bias of this distance.
    pub max_distance: usize,
}

/// `softmax(scale * q · Kᵀ) · V` for each row over the part of its sequence that it reaches. A row of the cache holds the
/// keys `[num_kv_heads * head_dim]`, then the values. Fails if the shapes do not fit, the cache is on another device,
/// or the batch names rows or blocks that do not exist.
pub fn paged_attention(
    q: &Tensor,         /* [num_tokens, num_heads, head_dim] */
    cache: &PagedCache, /* width 2 * num_kv_heads * head_dim */
    batch: &PagedBatch,
    spec: &GqaSpec,
    learned: LearnedScores,
) -> Result<Tensor /* [num_tokens, num_heads * head_dim] */> {
    let input = Input { op: OP, what: "q", tensor: q };
    let [num_tokens, _, _] = input.dims("[num_tokens, num_heads, head_dim]")?;
    input.has_dims(&[num_tokens, spec.num_heads, spec.head_dim])?;
    let sees_nothing = matches!(spec.reach, Reach::Window(0) | Reach::Chunk(0));
    if spec.num_kv_heads == 0 || !spec.num_heads.is_multiple_of(spec.num_kv_heads) || sees_nothing {
        return Err(KernelError::Invalid { op: OP, reason: format!("impossible heads or reach: {spec:?}") });
    }
    check::length(OP, "width of the cache", cache.width(), 2 * spec.num_kv_heads * spec.head_dim)?;
    if let Some(sinks) = learned.sinks {
        check::length(OP, "number of sinks", sinks.len(), spec.num_heads)?;
    }
    if let Some(bias) = learned.position_bias {
        let expected = spec.num_heads * (2 * bias.max_distance + 1);
        check::length(OP, "length of the position bias", bias.table.len(), expected)?;
    }
    if !cache.is_on(q.device()) {
        return Err(KernelError::OtherDevice { op: OP, what: "cache" });
    }
    batch.check(OP, num_tokens, cache, spec.reach)?;
    Ok(q.apply_op1_no_bwd(&PagedAttention { cache, batch, spec, learned })?)
}

struct PagedAttention<'a> {
    cache: &'a PagedCache,
    batch: &'a PagedBatch,
    spec: &'a GqaSpec,
    learned: LearnedScores<'a>,
}

impl PagedAttention<'_> {
    fn heads(&self) -> HeadLayout {
        let GqaSpec { num_heads, num_kv_heads, head_dim, .. } = *self.spec;
        HeadLayout {
            num_heads,
            group_size: num_heads / num_kv_heads,
            key_start: 0,
            key_dim: head_dim,
            value_start: num_kv_heads * head_dim,
            value_dim: head_dim,
        }
    }

    fn out_shape(&self, q_layout: &Layout) -> Shape {
        (q_layout.dims()[0], self.spec.num_heads * self.spec.head_dim).into()
    }
}

impl CustomOp1 for PagedAttention<'_> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, q: &CpuStorage, q_layout: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let &Self { cache, batch, spec: &GqaSpec { head_dim, scale, reach, .. }, learned } = self;
        let q = [(f32_slice(q, q_layout)?, head_dim)];
        let heads = self.heads();
        let out = attention::forward(&Attention { q: &q, cache, batch, heads, scale, reach, learned });
        Ok(f32_output(out, self.out_shape(q_layout)))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, q: &CudaStorage, q_layout: &Layout) -> candle_core::Result<(CudaStorage, Shape)> {
        let &Self { cache, batch, spec: &GqaSpec { head_dim, scale, reach, .. }, learned } = self;
        let q = [(q, q_layout, head_dim)];
        let heads = self.heads();
        let out = attention::cuda::forward(&Call { q: &q, cache, batch, heads, scale, reach, learned })?;
        Ok((out, self.out_shape(q_layout)))
    }
}
