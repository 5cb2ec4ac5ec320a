//! The attention that grouped and latent heads share: scores, softmax and weighted sum over one cache row per position.

mod cpu;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use super::paged_attention::Reach;
use crate::paged_cache::{PagedBatch, PagedCache};

/// Where the heads lie in a cache row, in elements.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadLayout {
    pub(crate) num_heads: usize,
    /// Query heads per key-value head; divides `num_heads`.
    pub(crate) group_size: usize,
    /// Key-value head `g` has its key at `key_start + g * key_dim`.
    pub(crate) key_start: usize,
    pub(crate) key_dim: usize,
    /// Key-value head `g` has its value at `value_start + g * value_dim`.
    pub(crate) value_start: usize,
    pub(crate) value_dim: usize,
}

/// Checked inputs of one call.
pub(crate) struct Attention<'a> {
    /// The query of a head is these parts one after the other: `[num_tokens, num_heads, dim]` and `dim`.
    pub(crate) q: &'a [(&'a [f32], usize)],
    pub(crate) cache: &'a PagedCache,
    pub(crate) batch: &'a PagedBatch,
    pub(crate) heads: HeadLayout,
    pub(crate) scale: f32,
    pub(crate) reach: Reach,
    /// A score per head that takes part in its softmax and has no value, `[num_heads]`.
    pub(crate) sinks: Option<&'a [f32]>,
}

impl Attention<'_> {
    /// Copies the query of a row's head into `out`, which is `key_dim` long.
    fn gather_query(&self, row: usize, head: usize, mut out: &mut [f32]) {
        for &(part, dim) in self.q {
            let start = (row * self.heads.num_heads + head) * dim;
            let (target, rest) = out.split_at_mut(dim);
            target.copy_from_slice(&part[start..start + dim]);
            out = rest;
        }
    }

    /// Positions that the row at `position` sees, as a half-open range.
    fn visible(&self, position: usize) -> std::ops::Range<usize> {
        let start = match self.reach {
            Reach::Full => 0,
            Reach::Window(window) => (position + 1).saturating_sub(window),
            Reach::Chunk(chunk) => position / chunk * chunk,
        };
        start..position + 1
    }
}

/// `[num_tokens, num_heads, value_dim]`
pub(crate) fn forward(op: &Attention<'_>) -> Vec<f32> {
    cpu::forward(op)
}
