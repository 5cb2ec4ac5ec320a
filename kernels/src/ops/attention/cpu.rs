//! Attention in tiles of (row, head) pairs that read the same keys and values.
//!
//! The scores of a pair are dot products, each with its own accumulator; the softmax runs over the positions from the
//! first visible one; the weighted sum adds one position after the other. None of it depends on the tile.

use std::ops::Range;

use half::bf16;

use super::{Attention, HeadLayout};
use crate::dispatch::{self, Kernel};
use crate::lanes::{Element, Lanes, WIDTH, dot_tile, exp_sum, load_tail, max, store_tail};
use crate::memory::Disjoint;
use crate::ops::paged_attention::PositionBias;
use crate::paged_cache::KvFormat;
use crate::pool;

/// Pairs of a task.
const TILE_PAIRS: usize = 8;

/// Pairs `first_pair..` of one sequence and key-value head; pair `p` is row `p / group_size` of the sequence and head
/// `p % group_size` of the group.
struct Tile {
    seq_idx: usize,
    kv_head: usize,
    pairs: Range<usize>,
}

/// `[num_tokens, num_heads, value_dim]`
pub(crate) fn forward(op: &Attention<'_>) -> Vec<f32> {
    let HeadLayout { num_heads, group_size, key_dim, value_dim, .. } = op.heads;
    let num_tokens = op.batch.cu_seqlens.last().map_or(0, |&rows| rows as usize);
    let mut out = vec![0.0; num_tokens * num_heads * value_dim];
    let (mut tiles, mut work) = (Vec::new(), 0);
    for seq_idx in 0..op.batch.num_seqs() {
        let num_pairs = op.batch.seq_rows(seq_idx).len() * group_size;
        work += num_pairs * op.batch.context_lens[seq_idx] as usize;
        for kv_head in 0..num_heads / group_size.max(1) {
            let firsts = (0..num_pairs).step_by(TILE_PAIRS);
            tiles.extend(firsts.map(|pair| Tile { seq_idx, kv_head, pairs: pair..num_pairs.min(pair + TILE_PAIRS) }));
        }
    }
    let target = Disjoint::new(&mut out);
    pool::parallel_if(work * (key_dim + value_dim), tiles.len(), |tile_idx| match op.cache.format() {
        KvFormat::F32 => run_tile::<f32>(op, &tiles[tile_idx], &target),
        KvFormat::Bf16 => run_tile::<bf16>(op, &tiles[tile_idx], &target),
    });
    out
}

fn run_tile<E: Element>(op: &Attention<'_>, tile: &Tile, out: &Disjoint<'_, f32>) {
    let HeadLayout { num_heads, group_size, key_start, key_dim, value_start, value_dim } = op.heads;
    let rows = op.batch.seq_rows(tile.seq_idx);
    let first_position = op.batch.context_lens[tile.seq_idx] as usize - rows.len();
    let mut queries = vec![0.0; tile.pairs.len() * key_dim];
    let mut visible = Vec::with_capacity(tile.pairs.len());
    let mut terms = Vec::with_capacity(tile.pairs.len());
    for (pair, query) in tile.pairs.clone().zip(queries.chunks_exact_mut(key_dim.max(1))) {
        let head = tile.kv_head * group_size + pair % group_size;
        op.gather_query(rows.start + pair / group_size, head, query);
        let position = first_position + pair / group_size;
        terms.push(PairTerms { head, position, sink: op.learned.sinks.map(|sinks| sinks[head]) });
        visible.push(op.visible(tile.seq_idx, position));
    }
    // Rows of later pairs are later positions, so both ends rise with the pair.
    let span = visible[0].start..visible[visible.len() - 1].end;
    let context = op.context::<E>(tile.seq_idx, span.clone());
    visible.iter_mut().for_each(|range| *range = range.start - span.start..range.end - span.start);
    let values = dispatch::run(TileKernel {
        queries: &queries,
        visible: &visible,
        terms: &terms,
        bias: op.learned.position_bias,
        context_start: span.start,
        context: &context,
        key: key_start + tile.kv_head * key_dim..key_start + (tile.kv_head + 1) * key_dim,
        value: value_start + tile.kv_head * value_dim..value_start + (tile.kv_head + 1) * value_dim,
        scale: op.scale,
    });
    for (pair, values) in tile.pairs.clone().zip(values.chunks_exact(value_dim.max(1))) {
        let head = tile.kv_head * group_size + pair % group_size;
        let start = ((rows.start + pair / group_size) * num_heads + head) * value_dim;
        // SAFETY: each (row, head) belongs to exactly one tile.
        unsafe { out.part(start, value_dim) }.copy_from_slice(values);
    }
}

impl Attention<'_> {
    /// The cache rows of a range of positions.
    fn context<E: Element>(&self, seq_idx: usize, positions: Range<usize>) -> Vec<&[E]> {
        let block_size = self.cache.block_size();
        let mut rows = Vec::with_capacity(positions.len() + 2 * block_size);
        let blocks = &self.batch.block_table(seq_idx)[positions.start / block_size..positions.end.div_ceil(block_size)];
        for &block in blocks {
            rows.extend(self.cache.block::<E>(block as usize).chunks_exact(self.cache.width()));
        }
        rows.drain(..positions.start % block_size);
        rows.truncate(positions.len());
        rows
    }
}

/// What the learned part of a pair's scores follows from.
struct PairTerms {
    head: usize,
    position: usize,
    sink: Option<f32>,
}

struct TileKernel<'a, E> {
    queries: &'a [f32],
    /// Indices into `context`, per pair.
    visible: &'a [Range<usize>],
    terms: &'a [PairTerms],
    bias: Option<&'a PositionBias>,
    /// Position of `context[0]`.
    context_start: usize,
    context: &'a [&'a [E]],
    /// Elements of a cache row.
    key: Range<usize>,
    value: Range<usize>,
    scale: f32,
}

impl<E: Element> Kernel for TileKernel<'_, E> {
    type Output = Vec<f32>;

    /// `[num_pairs, value_dim]`
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> Vec<f32> {
        let num_pairs = self.visible.len();
        let band_pairs = if L::NUM_VECTORS >= 32 { 4 } else { 2 };
        let mut scores = vec![0.0; num_pairs * self.context.len()];
        for first in (0..num_pairs).step_by(band_pairs) {
            match band_pairs.min(num_pairs - first) {
                1 => self.score::<L, 1, 8>(lanes, first, &mut scores),
                2 => self.score::<L, 2, 4>(lanes, first, &mut scores),
                3 => self.score::<L, 3, 4>(lanes, first, &mut scores),
                _ => self.score::<L, 4, 4>(lanes, first, &mut scores),
            }
        }
        let mut sums = Vec::with_capacity(num_pairs);
        for (pair, scores) in scores.chunks_exact_mut(self.context.len()).enumerate() {
            let (visible, terms) = (self.visible[pair].clone(), &self.terms[pair]);
            let keys = self.context_start + visible.start..self.context_start + visible.end;
            let scores = &mut scores[visible];
            if let Some(bias) = self.bias {
                bias.add((terms.head, terms.position), keys, scores);
            }
            let largest = max(lanes, scores);
            sums.push(match terms.sink {
                None => exp_sum(lanes, scores, largest),
                Some(sink) => {
                    let largest = largest.max(sink);
                    exp_sum(lanes, scores, largest) + (sink - largest).exp()
                }
            });
        }
        let mut out = vec![0.0; num_pairs * self.value.len()];
        for first in (0..num_pairs).step_by(band_pairs) {
            match band_pairs.min(num_pairs - first) {
                1 => self.weigh::<L, 1>(lanes, first, &scores, &mut out),
                2 => self.weigh::<L, 2>(lanes, first, &scores, &mut out),
                3 => self.weigh::<L, 3>(lanes, first, &scores, &mut out),
                _ => self.weigh::<L, 4>(lanes, first, &scores, &mut out),
            }
        }
        for (values, sum) in out.chunks_exact_mut(self.value.len().max(1)).zip(sums) {
            values.iter_mut().for_each(|value| *value /= sum);
        }
        out
    }
}

impl<E: Element> TileKernel<'_, E> {
    /// Scores of `M` pairs with all of the context, `N` positions at a time. Those a pair does not see are not used.
    #[inline(always)]
    fn score<L: Lanes, const M: usize, const N: usize>(&self, lanes: L, first: usize, scores: &mut [f32]) {
        let (context_len, key_dim) = (self.context.len(), self.key.len());
        let mut x: [&[f32]; M] = [&[]; M];
        for (m, x) in x.iter_mut().enumerate() {
            *x = &self.queries[(first + m) * key_dim..(first + m + 1) * key_dim];
        }
        let (groups, rest) = self.context.as_chunks::<N>();
        for (group_idx, group) in groups.iter().enumerate() {
            let mut keys: [&[E]; N] = [&[]; N];
            for (key, row) in keys.iter_mut().zip(group) {
                *key = &row[self.key.clone()];
            }
            for (m, tile_row) in dot_tile(lanes, x, keys).iter().enumerate() {
                let start = (first + m) * context_len + group_idx * N;
                for (score, dot) in scores[start..start + N].iter_mut().zip(tile_row) {
                    *score = dot * self.scale;
                }
            }
        }
        for (row, position) in rest.iter().zip(groups.len() * N..) {
            let tile = dot_tile(lanes, x, [&row[self.key.clone()]]);
            for (m, [dot]) in tile.into_iter().enumerate() {
                scores[(first + m) * context_len + position] = dot * self.scale;
            }
        }
    }

    /// Weighted sums of the values that `M` pairs see, in slices of 4, 2 or 1 vectors and a padded tail.
    #[inline(always)]
    fn weigh<L: Lanes, const M: usize>(&self, lanes: L, first: usize, scores: &[f32], out: &mut [f32]) {
        let value_dim = self.value.len();
        let out = &mut out[first * value_dim..(first + M) * value_dim];
        let mut element = 0;
        if L::NUM_VECTORS >= 32 {
            while element + 4 * WIDTH <= value_dim {
                self.weigh_slice::<L, M, 4>(lanes, (first, element), scores, out);
                element += 4 * WIDTH;
            }
        }
        while element + 2 * WIDTH <= value_dim {
            self.weigh_slice::<L, M, 2>(lanes, (first, element), scores, out);
            element += 2 * WIDTH;
        }
        while element < value_dim {
            self.weigh_slice::<L, M, 1>(lanes, (first, element), scores, out);
            element += WIDTH;
        }
    }

    /// `NV` vectors from `element` on, which may be cut short by the end of the value if `NV` is 1. The positions that
    /// all pairs see are done together; those before and after, which only some see, pair by pair, in order.
    #[inline(always)]
    fn weigh_slice<L: Lanes, const M: usize, const NV: usize>(
        &self,
        lanes: L,
        (first, element): (usize, usize),
        scores: &[f32],
        out: &mut [f32],
    ) {
        let (context_len, value_dim) = (self.context.len(), self.value.len());
        let ranges = &self.visible[first..first + M];
        let elements = self.value.start + element..self.value.end.min(self.value.start + element + NV * WIDTH);
        let mut common = ranges[M - 1].start..ranges[0].end;
        if common.is_empty() {
            common = context_len..context_len;
        }
        let mut pair_scores: [&[f32]; M] = [&[]; M];
        for (m, pair_scores) in pair_scores.iter_mut().enumerate() {
            *pair_scores = &scores[(first + m) * context_len..(first + m + 1) * context_len];
        }
        let mut acc = [[lanes.splat(0.0); NV]; M];
        for ((range, scores), acc) in ranges.iter().zip(pair_scores).zip(&mut acc) {
            let positions = range.start..range.end.min(common.start);
            self.accumulate(lanes, [scores], positions, elements.clone(), std::array::from_mut(acc));
        }
        self.accumulate(lanes, pair_scores, common.clone(), elements.clone(), &mut acc);
        for ((range, scores), acc) in ranges.iter().zip(pair_scores).zip(&mut acc) {
            let positions = range.start.max(common.end)..range.end;
            self.accumulate(lanes, [scores], positions, elements.clone(), std::array::from_mut(acc));
        }
        for (acc, out) in acc.iter().zip(out.chunks_exact_mut(value_dim)) {
            for (&v, out) in acc.iter().zip(out[element..element + elements.len()].chunks_mut(WIDTH)) {
                store_tail(lanes, v, out);
            }
        }
    }

    /// `acc[m] += scores[m][position] * value(position)`, one position after the other.
    #[inline(always)]
    fn accumulate<L: Lanes, const M: usize, const NV: usize>(
        &self,
        lanes: L,
        scores: [&[f32]; M],
        positions: Range<usize>,
        elements: Range<usize>,
        acc: &mut [[L::V; NV]; M],
    ) {
        for position in positions {
            let mut values = [lanes.splat(0.0); NV];
            let (whole, tail) = self.context[position][elements.clone()].as_chunks::<WIDTH>();
            if whole.len() == NV {
                for n in 0..NV {
                    values[n] = E::load(lanes, &whole[n]);
                }
            } else {
                values[0] = load_tail(lanes, tail);
            }
            for m in 0..M {
                let weight = lanes.splat(scores[m][position]);
                for n in 0..NV {
                    acc[m][n] = lanes.fma(weight, values[n], acc[m][n]);
                }
            }
        }
    }
}
