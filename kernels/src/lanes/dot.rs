//! A tile of dot products: each has one accumulator of 16 lanes over the whole length, whatever the tile.

use super::{Element, Lanes, WIDTH, load_tail};

const LINE_BYTES: usize = 64;

/// `out[m][n] = x[m] · w[n]`. The bits of an entry depend on its two rows alone; the tile only shares loads.
/// Panics if a row is shorter than `x[0]`.
#[inline(always)]
pub(crate) fn dot_tile<L: Lanes, E: Element, const M: usize, const N: usize>(
    lanes: L,
    x: [&[f32]; M],
    w: [&[E]; N],
) -> [[f32; N]; M] {
    dot::<L, E, M, N, false>(lanes, x, w)
}

/// [`dot_tile`] for rows `w` that follow each other in memory and are read once: fetches the rows behind them meanwhile.
/// Short rows end before the processor's own prefetcher has learned their streams.
#[inline(always)]
pub(crate) fn dot_tile_streamed<L: Lanes, E: Element, const M: usize, const N: usize>(
    lanes: L,
    x: [&[f32]; M],
    w: [&[E]; N],
) -> [[f32; N]; M] {
    dot::<L, E, M, N, true>(lanes, x, w)
}

#[inline(always)]
fn dot<L: Lanes, E: Element, const M: usize, const N: usize, const STREAMED: bool>(
    lanes: L,
    x: [&[f32]; M],
    w: [&[E]; N],
) -> [[f32; N]; M] {
    let len = x[0].len();
    let (x_chunks, x_tails) = split(x, len);
    let (w_chunks, w_tails) = split(w, len);
    let mut acc = [[lanes.splat(0.0); N]; M];
    for chunk in 0..x_chunks[0].len() {
        let mut w_v = [lanes.splat(0.0); N];
        for n in 0..N {
            w_v[n] = E::load(lanes, &w_chunks[n][chunk]);
        }
        if STREAMED {
            // In the order of the addresses, which memory likes better than the order of use.
            let behind = w[0].as_ptr().wrapping_add(N * len + N * WIDTH * chunk);
            for line in 0..(N * WIDTH * size_of::<E>()).div_ceil(LINE_BYTES) {
                lanes.prefetch_far(behind.wrapping_byte_add(line * LINE_BYTES));
            }
        }
        for m in 0..M {
            let x_v = lanes.load(&x_chunks[m][chunk]);
            for n in 0..N {
                acc[m][n] = lanes.fma(x_v, w_v[n], acc[m][n]);
            }
        }
    }
    if !x_tails[0].is_empty() {
        for n in 0..N {
            let w_v = load_tail(lanes, w_tails[n]);
            for m in 0..M {
                acc[m][n] = lanes.fma(load_tail(lanes, x_tails[m]), w_v, acc[m][n]);
            }
        }
    }
    let mut out = [[0.0; N]; M];
    for m in 0..M {
        for n in 0..N {
            out[m][n] = lanes.sum(acc[m][n]);
        }
    }
    out
}

/// The whole chunks and the tails of the first `len` elements of each row. All chunk lists have one length, which lets
/// the compiler drop the bounds checks of the loop.
#[inline(always)]
fn split<T, const R: usize>(rows: [&[T]; R], len: usize) -> ([&[[T; WIDTH]]; R], [&[T]; R]) {
    let num_chunks = len / WIDTH;
    let (mut chunks, mut tails): ([&[[T; WIDTH]]; R], [&[T]; R]) = ([&[]; R], [&[]; R]);
    for ((row, chunk), tail) in rows.into_iter().zip(&mut chunks).zip(&mut tails) {
        let (whole, rest) = row[..len].as_chunks::<WIDTH>();
        (*chunk, *tail) = (&whole[..num_chunks], rest);
    }
    (chunks, tails)
}
