//! The attention that grouped and latent heads share: scores, softmax and weighted sum over one cache row per position.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod arguments;
mod band;
mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod plan;
#[cfg(test)]
mod reference;
mod scratch;
#[cfg(test)]
mod tests;
mod tile;
mod transpose;
#[cfg(any(test, feature = "cuda"))]
pub(crate) mod variant;

use std::ops::Range;

use super::paged_attention::{LearnedScores, PositionBias, Reach};
use crate::paged_batch::PagedBatch;
use crate::paged_cache::PagedCache;

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
    pub(crate) learned: LearnedScores<'a>,
}

impl PositionBias {
    /// Adds the bias of `head` to scores of the keys at `keys` with the query at `position`.
    fn add(&self, (head, position): (usize, usize), keys: Range<usize>, scores: &mut [f32]) {
        let width = 2 * self.max_distance + 1;
        let of_head = &self.table[head * width..(head + 1) * width];
        // Index of distance `key - position`, kept within the table.
        let nearest = (keys.start + self.max_distance) as isize - position as isize;
        for (score, index) in scores.iter_mut().zip(nearest..) {
            *score += of_head[index.clamp(0, width as isize - 1) as usize];
        }
    }
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

    /// Position of the row of a pair, see [`tile::Task`].
    fn position(&self, seq_idx: usize, pair: usize) -> usize {
        let num_rows = self.batch.seq_rows(seq_idx).len();
        self.batch.context_lens[seq_idx] as usize - num_rows + pair / self.heads.group_size
    }

    /// The query head of a pair.
    fn head(&self, kv_head: usize, pair: usize) -> usize {
        kv_head * self.heads.group_size + pair % self.heads.group_size
    }

    /// The learned score that takes part in the softmax of a pair.
    fn sink(&self, kv_head: usize, pair: usize) -> Option<f32> {
        self.learned.sinks.map(|sinks| sinks[self.head(kv_head, pair)])
    }

    /// Where the output of a pair begins.
    fn out_start(&self, seq_idx: usize, kv_head: usize, pair: usize) -> usize {
        let row = self.batch.seq_rows(seq_idx).start + pair / self.heads.group_size;
        (row * self.heads.num_heads + self.head(kv_head, pair)) * self.heads.value_dim
    }

    /// Positions that the row at `position` of a sequence sees, as a half-open range.
    fn visible(&self, seq_idx: usize, position: usize) -> Range<usize> {
        self.reach.visible(position, self.batch.source_lens[seq_idx] as usize)
    }
}

/// `[num_tokens, num_heads, value_dim]`
pub(crate) fn forward(op: &Attention<'_>) -> Vec<f32> {
    cpu::forward(op)
}
