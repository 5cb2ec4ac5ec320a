//! One task of attention: pairs of a row and a head over segments of positions, a tile of positions at a time.
//!
//! What a pair gets is a function of its query and of the positions it sees: a score is a sum over the key in order; within
//! a segment the softmax goes on from tile to tile under a running maximum; segments are folded in order. Tiles and segments
//! begin at multiples of their length, so nothing depends on which pairs, tiles or segments share a task.

use std::ops::Range;

use super::band::{BAND, Weighted, score, slice_vectors};
use super::scratch::Scratch;
use super::transpose::{CacheElement, transpose};
use super::{Attention, HeadLayout};
use crate::dispatch::Kernel;
use crate::lanes::{Lanes, WIDTH, exp_sum, load_tail};
use crate::memory::Disjoint;

/// Positions of a tile: keys and values of 64 elements fill half of a first-level cache each.
pub(super) const TILE: usize = 64;
/// Positions of a segment, whole tiles: a quarter of a megabyte of one head's keys and values.
pub(super) const SEGMENT: usize = 512;

const LINE_BYTES: usize = 64;

/// Calls a method for a band of so many pairs.
macro_rules! with_band {
    ($len:expr, $self:ident.$method:ident::<$lanes:ident>($($argument:expr),*)) => {
        match $len {
            1 => $self.$method::<$lanes, 1>($($argument),*),
            2 => $self.$method::<$lanes, 2>($($argument),*),
            3 => $self.$method::<$lanes, 3>($($argument),*),
            4 => $self.$method::<$lanes, 4>($($argument),*),
            5 => $self.$method::<$lanes, 5>($($argument),*),
            _ => $self.$method::<$lanes, BAND>($($argument),*),
        }
    };
}

/// Pairs of one sequence over some of its segments. Pair `p` of a key-value head is row `p / group_size` of the sequence
/// and head `p % group_size` of the group.
#[derive(Debug, Clone)]
pub(super) struct Task {
    pub(super) seq_idx: usize,
    pub(super) kv_heads: Range<usize>,
    pub(super) pairs: Range<usize>,
    pub(super) segments: Range<usize>,
    /// Where the sums of a task of one segment go that is not its pairs' only one; see [`partial_len`].
    pub(super) partial: Option<Partial>,
}

/// Place of a segment's sums among the partial ones: `[kv_heads, pairs]` from `first` on.
#[derive(Debug, Clone, Copy)]
pub(super) struct Partial {
    pub(super) first: usize,
    /// Pairs of the sequence per key-value head.
    pub(super) num_pairs: usize,
}

impl Partial {
    /// Index of a pair's sums.
    pub(super) fn of_pair(&self, kv_head: usize, pair: usize) -> usize {
        self.first + kv_head * self.num_pairs + pair
    }
}

/// Numbers of a pair's partial sums: its maximum, the sum of its weights, the weighted values.
pub(super) fn partial_len(heads: &HeadLayout) -> usize {
    2 + heads.value_dim
}

pub(super) struct TaskKernel<'a, E> {
    op: &'a Attention<'a>,
    task: &'a Task,
    scratch: &'a mut Scratch,
    out: &'a Disjoint<'a, f32>,
    partials: &'a Disjoint<'a, f32>,
    /// Cache rows of the tile's positions.
    rows: [&'a [E]; TILE],
    /// Those of the next tile of the segment, if there is one.
    rows_ahead: [&'a [E]; TILE],
}

/// A tile's first position, and the part of it that some pair of the task sees.
#[derive(Clone, Copy)]
struct Seen {
    tile_start: usize,
    first: usize,
    end: usize,
}

impl Seen {
    /// Of a tile that these positions reach into.
    fn new(tile_idx: usize, positions: Range<usize>) -> Self {
        let tile_start = tile_idx * TILE;
        let first = positions.start.max(tile_start) - tile_start;
        Self { tile_start, first, end: TILE.min(positions.end - tile_start) }
    }
}

/// Pairs of the task by index, whose first one is this.
#[derive(Clone, Copy)]
struct Band {
    first: usize,
    len: usize,
}

impl<'a, E: CacheElement> TaskKernel<'a, E> {
    /// `out` is the op's, `partials` those of all split sequences.
    pub(super) fn new(
        op: &'a Attention<'a>,
        task: &'a Task,
        scratch: &'a mut Scratch,
        (out, partials): (&'a Disjoint<'a, f32>, &'a Disjoint<'a, f32>),
    ) -> Self {
        Self { op, task, scratch, out, partials, rows: [&[]; TILE], rows_ahead: [&[]; TILE] }
    }
}

impl<E: CacheElement> Kernel for TaskKernel<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let span = self.prepare();
        for segment in self.task.segments.clone() {
            let (start, end) = (span.start.max(segment * SEGMENT), span.end.min((segment + 1) * SEGMENT));
            if start >= end {
                continue;
            }
            self.scratch.segment.clear();
            let seen = |tile_idx: usize| Seen::new(tile_idx, start..end);
            self.rows_ahead = self.find_rows(seen(start / TILE));
            for tile_idx in start / TILE..end.div_ceil(TILE) {
                self.rows = self.rows_ahead;
                let is_last = (tile_idx + 1) * TILE >= end;
                self.rows_ahead = if is_last { [&[]; TILE] } else { self.find_rows(seen(tile_idx + 1)) };
                for head_idx in 0..self.task.kv_heads.len() {
                    self.fetch_ahead(lanes, head_idx);
                    self.attend(lanes, head_idx, seen(tile_idx));
                }
            }
            match self.task.partial {
                Some(partial) => self.write_partial(partial),
                None => self.fold(segment),
            }
        }
        if self.task.partial.is_none() {
            self.write_out();
        }
    }
}

impl<'a, E: CacheElement> TaskKernel<'a, E> {
    /// Lays out the task's scratch memory. Returns the positions from the first to the last that a pair sees.
    fn prepare(&mut self) -> Range<usize> {
        let (op, task) = (self.op, self.task);
        let HeadLayout { group_size, key_dim, .. } = op.heads;
        let rows = op.batch.seq_rows(task.seq_idx);
        let num_pairs = task.pairs.len();
        self.scratch.lay_out(&op.heads, [task.kv_heads.len(), num_pairs]);
        let Scratch { queries, query, visible, .. } = &mut *self.scratch;
        visible.extend(task.pairs.clone().map(|pair| op.visible(task.seq_idx, op.position(task.seq_idx, pair))));
        for (head_idx, kv_head) in task.kv_heads.clone().enumerate() {
            for Band { first, len } in bands(num_pairs) {
                let start = (head_idx * num_pairs + first) * key_dim;
                let band = &mut queries.as_mut_slice()[start..start + len * key_dim];
                for (m, pair) in (task.pairs.start + first..task.pairs.start + first + len).enumerate() {
                    op.gather_query(rows.start + pair / group_size, op.head(kv_head, pair), query);
                    for (target, value) in band[m..].iter_mut().step_by(len).zip(&*query) {
                        *target = value * op.scale;
                    }
                }
            }
        }
        // Later pairs are of later positions, so both ends rise with the pair.
        visible[0].start..visible[num_pairs - 1].end
    }

    /// Looks up the cache rows of a tile; those of positions that nobody sees repeat one that is seen.
    fn find_rows(&self, seen: Seen) -> [&'a [E]; TILE] {
        let mut found: [&[E]; TILE] = [&[]; TILE];
        let (cache, table) = (self.op.cache, self.op.batch.block_table(self.task.seq_idx));
        let (block_size, width) = (cache.block_size(), cache.width());
        let (mut position, end) = (seen.tile_start + seen.first, seen.tile_start + seen.end);
        while position < end {
            let block = cache.block::<E>(table[position / block_size] as usize);
            let block_end = end.min((position / block_size + 1) * block_size);
            let rows = block[position % block_size * width..].chunks_exact(width);
            for (slot, row) in found[position - seen.tile_start..block_end - seen.tile_start].iter_mut().zip(rows) {
                *slot = row;
            }
            position = block_end;
        }
        let (first, last) = (found[seen.first], found[seen.end - 1]);
        found[..seen.first].fill(first);
        found[seen.end..].fill(last);
        found
    }

    /// Asks for a head's keys and values of the next tile: rows lie too far apart for the processor to guess them.
    #[inline(always)]
    fn fetch_ahead<L: Lanes>(&self, lanes: L, head_idx: usize) {
        let HeadLayout { key_start, key_dim, value_start, value_dim, .. } = self.op.heads;
        let kv_head = self.task.kv_heads.start + head_idx;
        let line_len = LINE_BYTES / size_of::<E>();
        for row in self.rows_ahead {
            for (start, dim) in [(key_start, key_dim), (value_start, value_dim)] {
                let first = row.as_ptr().wrapping_add(start + kv_head * dim);
                for line in 0..dim.div_ceil(line_len) {
                    lanes.prefetch(first.wrapping_add(line * line_len));
                }
            }
        }
    }

    /// Adds a tile to the sums of all pairs of a key-value head.
    #[inline(always)]
    fn attend<L: Lanes>(&mut self, lanes: L, head_idx: usize, seen: Seen) {
        let HeadLayout { key_start, key_dim, .. } = self.op.heads;
        let key = key_start + (self.task.kv_heads.start + head_idx) * key_dim;
        let mut keys = self.rows;
        keys.iter_mut().for_each(|row| *row = &row[key..key + key_dim]);
        transpose(&keys, seen.first..seen.end, self.scratch.keys.as_mut_slice());
        self.pack_values(lanes, head_idx, seen);
        // Scores first, then sums: each reads one of the two operands that share the first-level cache.
        for band in bands(self.task.pairs.len()) {
            with_band!(band.len, self.score_band::<L>(lanes, head_idx, band, seen));
        }
        for band in bands(self.task.pairs.len()) {
            with_band!(band.len, self.add_band::<L>(lanes, head_idx, band));
        }
    }

    /// Widens the values of a tile into slices as [`Weighted`] takes them; zeros fill the last vector.
    #[inline(always)]
    fn pack_values<L: Lanes>(&mut self, lanes: L, head_idx: usize, seen: Seen) {
        let HeadLayout { value_start, value_dim, .. } = self.op.heads;
        let start = value_start + (self.task.kv_heads.start + head_idx) * value_dim;
        let (packed, _) = self.scratch.values.as_mut_slice().as_chunks_mut::<WIDTH>();
        let (num_vectors, slice_len) = (value_dim.div_ceil(WIDTH), slice_vectors::<L>());
        let mut first = 0;
        while first < num_vectors {
            let len = if num_vectors - first >= slice_len { slice_len } else { 1 };
            let slice = &mut packed[first * TILE..(first + len) * TILE];
            let elements = start + first * WIDTH..start + value_dim.min((first + len) * WIDTH);
            for (row, packed) in self.rows[seen.first..seen.end].iter().zip(slice[seen.first * len..].chunks_mut(len)) {
                let (whole, tail) = row[elements.clone()].as_chunks::<WIDTH>();
                for (from, to) in whole.iter().zip(&mut *packed) {
                    lanes.store(E::load(lanes, from), to);
                }
                if !tail.is_empty() {
                    lanes.store(load_tail(lanes, tail), &mut packed[whole.len()]);
                }
            }
            first += len;
        }
    }

    /// Scores of a band over a tile, then their weights under the new maxima.
    #[inline(always)]
    fn score_band<L: Lanes, const M: usize>(&mut self, lanes: L, head_idx: usize, band: Band, seen: Seen) {
        let (num_pairs, key_dim) = (self.task.pairs.len(), self.op.heads.key_dim);
        let Scratch { queries, keys, scores, ranges, visible, .. } = &mut *self.scratch;
        let (mut first, mut end) = (TILE, 0);
        for (range, visible) in ranges[band.first..].iter_mut().zip(&visible[band.first..band.first + M]) {
            let within = |position: usize| position.saturating_sub(seen.tile_start).min(TILE);
            *range = (within(visible.start), within(visible.end));
            if range.0 < range.1 {
                (first, end) = (first.min(range.0), end.max(range.1));
            }
        }
        if first >= end {
            return;
        }
        let start = (head_idx * num_pairs + band.first) * key_dim;
        let queries = &queries.as_slice()[start..start + M * key_dim];
        let scores = &mut scores[band.first..band.first + M];
        score::<L, M>(lanes, queries, keys.as_slice(), (first / WIDTH, end.div_ceil(WIDTH)), scores);
        for m in 0..M {
            self.weigh(lanes, head_idx, band.first + m, seen);
        }
    }

    /// Turns a pair's scores into weights, and what it has so far into what it is under the new maximum.
    #[inline(always)]
    fn weigh<L: Lanes>(&mut self, lanes: L, head_idx: usize, pair: usize, seen: Seen) {
        let (op, task) = (self.op, self.task);
        let Scratch { scores, ranges, segment, factors, .. } = &mut *self.scratch;
        let (first, end) = ranges[pair];
        if first >= end {
            return;
        }
        let row = &mut scores[pair];
        if let Some(bias) = op.learned.position_bias {
            let pair = task.pairs.start + pair;
            let head = op.head(task.kv_heads.start + head_idx, pair);
            bias.add(
                (head, op.position(task.seq_idx, pair)),
                seen.tile_start + first..seen.tile_start + end,
                &mut row[first..end],
            );
        }
        // Whole vectors, whatever is seen of them: what is hidden weighs next to nothing and is never added to the values.
        row[..first].fill(f32::NEG_INFINITY);
        row[end..].fill(f32::NEG_INFINITY);
        let idx = head_idx * task.pairs.len() + pair;
        let before = segment.max[idx];
        let largest = largest(lanes, row, before);
        let factor = if largest == before { 1.0 } else { (before - largest).exp() };
        factors[pair] = factor;
        segment.max[idx] = largest;
        segment.sum[idx] = segment.sum[idx] * factor + exp_sum(lanes, row, largest);
    }

    /// Adds the weighted values of a tile to the sums of a band. The positions that all pairs see are added together;
    /// those before and after, which only some see, pair by pair, in order.
    #[inline(always)]
    fn add_band<L: Lanes, const M: usize>(&mut self, lanes: L, head_idx: usize, band: Band) {
        let Scratch { values, scores, ranges, segment, factors, .. } = &mut *self.scratch;
        let value_len = segment.value_len;
        let weights = &scores[band.first..band.first + M];
        let ranges = &ranges[band.first..band.first + M];
        let start = (head_idx * self.task.pairs.len() + band.first) * value_len;
        let acc = &mut segment.values.as_mut_slice()[start..start + M * value_len];
        let values = values.as_slice();
        let (first, end) = ranges.iter().fold((0, TILE), |(first, end), range| (first.max(range.0), end.min(range.1)));
        let common = if first < end { (first, end) } else { (TILE, TILE) };
        for (m, acc) in acc.chunks_exact_mut(value_len.max(1)).enumerate() {
            if ranges[m].0 < ranges[m].1 && factors[band.first + m] != 1.0 {
                acc.iter_mut().for_each(|value| *value *= factors[band.first + m]);
            }
        }
        for m in 0..M {
            let before = (ranges[m].0, ranges[m].1.min(common.0));
            Weighted { weights: &weights[m..=m], values, value_len }.add::<L, 1>(
                lanes,
                before,
                &mut acc[m * value_len..],
            );
        }
        Weighted { weights, values, value_len }.add::<L, M>(lanes, common, acc);
        for m in 0..M {
            let behind = (ranges[m].0.max(common.1), ranges[m].1);
            Weighted { weights: &weights[m..=m], values, value_len }.add::<L, 1>(
                lanes,
                behind,
                &mut acc[m * value_len..],
            );
        }
    }

    /// The task's pairs by index among its sums, and what each of them sees.
    fn pairs(&self) -> impl Iterator<Item = (usize, usize, usize)> + use<E> {
        let (heads, pairs) = (self.task.kv_heads.clone(), self.task.pairs.clone());
        let num_pairs = pairs.len();
        heads.enumerate().flat_map(move |(head_idx, kv_head)| {
            pairs.clone().enumerate().map(move |(idx, pair)| (head_idx * num_pairs + idx, kv_head, pair))
        })
    }

    fn write_partial(&mut self, partial: Partial) {
        let len = partial_len(&self.op.heads);
        for (idx, kv_head, pair) in self.pairs() {
            let sum = self.scratch.segment.of(idx);
            // SAFETY: each (segment, head, pair) belongs to exactly one task.
            let target = unsafe { self.partials.part(partial.of_pair(kv_head, pair) * len, len) };
            (target[0], target[1]) = (sum.max, sum.sum);
            target[2..].copy_from_slice(&sum.values[..len - 2]);
        }
    }

    /// Joins the sums of a segment with those of the segments before it.
    fn fold(&mut self, segment_idx: usize) {
        let num_pairs = self.task.pairs.len();
        let Scratch { visible, segment, total, .. } = &mut *self.scratch;
        for idx in 0..segment.max.len() {
            let segments = segments(&visible[idx % num_pairs]);
            if segments.start == segment_idx {
                total.set(idx, &segment.of(idx));
            } else if segments.contains(&segment_idx) {
                total.join(idx, &segment.of(idx));
            }
        }
    }

    fn write_out(&mut self) {
        let op = self.op;
        for (idx, kv_head, pair) in self.pairs() {
            let start = op.out_start(self.task.seq_idx, kv_head, pair);
            // SAFETY: each (row, head) belongs to exactly one task that is not one of several segments.
            let target = unsafe { self.out.part(start, op.heads.value_dim) };
            self.scratch.total.of(idx).finish(op.sink(kv_head, pair), target);
        }
    }
}

/// The segments that hold these positions.
pub(super) fn segments(positions: &Range<usize>) -> Range<usize> {
    positions.start / SEGMENT..positions.end.div_ceil(SEGMENT)
}

/// Pairs in bands as equal as can be.
fn bands(num_pairs: usize) -> impl Iterator<Item = Band> {
    let num_bands = num_pairs.div_ceil(BAND);
    let first = move |band: usize| band * num_pairs / num_bands;
    (0..num_bands).map(move |band| Band { first: first(band), len: first(band + 1) - first(band) })
}

/// The largest of the numbers and of `before`; NaN counts for nothing.
#[inline(always)]
fn largest<L: Lanes>(lanes: L, row: &[f32; TILE], before: f32) -> f32 {
    let mut best = lanes.splat(before);
    for chunk in row.as_chunks::<WIDTH>().0 {
        best = lanes.max(lanes.load(chunk), best);
    }
    let mut candidates = [0.0; WIDTH];
    lanes.store(best, &mut candidates);
    for half in [8, 4, 2, 1] {
        for i in 0..half {
            candidates[i] = if candidates[i] > candidates[i + half] { candidates[i] } else { candidates[i + half] };
        }
    }
    candidates[0]
}
