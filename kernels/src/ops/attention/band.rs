//! The two products of attention for a band of (row, head) pairs over a tile of positions, in registers.

use crate::lanes::{Lanes, WIDTH};

use super::tile::TILE;

/// Most pairs of a band: with 4 vectors each they fill 24 of 32 registers, with one 6 of 8.
pub(super) const BAND: usize = 6;

/// Elements of a key that are summed one after the other before they join the sum of those before them, which keeps
/// rounding in long keys small.
const KEY_CHUNK: usize = 128;

/// Vectors of a band where the register file is large.
const WIDE: usize = 4;

/// Vectors of a slice of the values: as many as a band has registers for.
pub(super) const fn slice_vectors<L: Lanes>() -> usize {
    if L::NUM_VECTORS >= 32 { WIDE } else { 1 }
}

/// `scores[m][p] = queries[..][m] · keys[..][p]` for the positions of the vectors `first..end`. A score is a sum in order
/// of the elements, whatever the band.
#[inline(always)]
pub(super) fn score<L: Lanes, const M: usize>(
    lanes: L,
    queries: &[f32], /* [key_dim, M] */
    keys: &[f32],    /* [TILE / WIDTH, key_dim, WIDTH] */
    (mut first, end): (usize, usize),
    scores: &mut [[f32; TILE]], /* [M] */
) {
    while first < end {
        if end - first >= slice_vectors::<L>() && slice_vectors::<L>() == WIDE {
            score_vectors::<L, M, WIDE>(lanes, queries, keys, first, scores);
            first += WIDE;
        } else {
            score_vectors::<L, M, 1>(lanes, queries, keys, first, scores);
            first += 1;
        }
    }
}

#[inline(always)]
fn score_vectors<L: Lanes, const M: usize, const N: usize>(
    lanes: L,
    queries: &[f32],
    keys: &[f32],
    first: usize,
    scores: &mut [[f32; TILE]],
) {
    let (queries, _) = queries.as_chunks::<M>();
    let (keys, _) = keys.as_chunks::<WIDTH>();
    let key_dim = queries.len();
    let mut chunk_start = 0;
    // Once at least, so that keys of no elements score 0.
    loop {
        let len = (key_dim - chunk_start).min(KEY_CHUNK);
        let queries = &queries[chunk_start..chunk_start + len];
        let mut vectors: [&[[f32; WIDTH]]; N] = [&[]; N];
        for (n, vectors) in vectors.iter_mut().enumerate() {
            let start = (first + n) * key_dim + chunk_start;
            *vectors = &keys[start..start + len];
        }
        let mut acc = [[lanes.splat(0.0); N]; M];
        for i in 0..len {
            let mut key = [lanes.splat(0.0); N];
            for n in 0..N {
                key[n] = lanes.load(&vectors[n][i]);
            }
            for m in 0..M {
                let query = lanes.splat(queries[i][m]);
                for n in 0..N {
                    acc[m][n] = lanes.fma(query, key[n], acc[m][n]);
                }
            }
        }
        for (row, acc) in scores[..M].iter_mut().zip(acc) {
            let (row, _) = row.as_chunks_mut::<WIDTH>();
            for (target, v) in row[first..first + N].iter_mut().zip(acc) {
                let sum = if chunk_start == 0 { v } else { lanes.add(lanes.load(target), v) };
                lanes.store(sum, target);
            }
        }
        chunk_start += len;
        if chunk_start >= key_dim {
            break;
        }
    }
}

/// What a band adds to its sums: weights of positions, and the values at these.
pub(super) struct Weighted<'a> {
    /// `[M]`
    pub(super) weights: &'a [[f32; TILE]],
    /// Slices of [`slice_vectors`] vectors while there are so many, then of one: `[slices][TILE, slice_len]`.
    pub(super) values: &'a [f32],
    /// Elements of a value, whole vectors.
    pub(super) value_len: usize,
}

impl Weighted<'_> {
    /// `acc[m] += weights[m][p] * values[p]` for the positions `first..end`, one after the other; none if they are no range.
    #[inline(always)]
    pub(super) fn add<L: Lanes, const M: usize>(
        &self,
        lanes: L,
        positions: (usize, usize),
        acc: &mut [f32], /* [M, value_len], or more */
    ) {
        let mut element = if positions.0 < positions.1 { 0 } else { self.value_len };
        while element < self.value_len {
            if self.value_len - element >= WIDE * WIDTH && slice_vectors::<L>() == WIDE {
                self.add_slice::<L, M, WIDE>(lanes, positions, element, acc);
                element += WIDE * WIDTH;
            } else {
                self.add_slice::<L, M, 1>(lanes, positions, element, acc);
                element += WIDTH;
            }
        }
    }

    #[inline(always)]
    fn add_slice<L: Lanes, const M: usize, const N: usize>(
        &self,
        lanes: L,
        (first, end): (usize, usize),
        element: usize,
        acc: &mut [f32],
    ) {
        let slice = &self.values[element * TILE..(element + N * WIDTH) * TILE];
        let values = &slice.as_chunks::<WIDTH>().0.as_chunks::<N>().0[first..end];
        let mut weights: [&[f32]; M] = [&[]; M];
        for (weights, row) in weights.iter_mut().zip(self.weights) {
            *weights = &row[first..end];
        }
        let mut sums = [[lanes.splat(0.0); N]; M];
        for (m, sums) in sums.iter_mut().enumerate() {
            let (row, _) = acc[m * self.value_len + element..].as_chunks::<WIDTH>();
            for (sum, from) in sums.iter_mut().zip(&row[..N]) {
                *sum = lanes.load(from);
            }
        }
        for i in 0..values.len() {
            let mut value = [lanes.splat(0.0); N];
            for n in 0..N {
                value[n] = lanes.load(&values[i][n]);
            }
            for m in 0..M {
                let weight = lanes.splat(weights[m][i]);
                for n in 0..N {
                    sums[m][n] = lanes.fma(weight, value[n], sums[m][n]);
                }
            }
        }
        for (m, sums) in sums.into_iter().enumerate() {
            let (row, _) = acc[m * self.value_len + element..].as_chunks_mut::<WIDTH>();
            for (sum, to) in sums.into_iter().zip(&mut row[..N]) {
                lanes.store(sum, to);
            }
        }
    }
}
