//! The matrix product that linear, per-head and expert ops share: a few input rows against a few weight rows.

use std::cell::RefCell;
use std::ops::Range;

use crate::dispatch::{self, ByWidth, Kernel};
use crate::lanes::{Element, Lanes, dot_tile, dot_tile_streamed};
use crate::quant::{self, QuantBlock, QuantizedRows};
use crate::weight::{PackedWeight, WeightFormat, WeightView};

/// Input rows of a block: with 1000 inputs they fill a fifth of a second-level cache.
pub(crate) const BLOCK_ROWS: usize = 48;
/// Weight rows of a block: enough work to hide taking a task, few enough to share 576 outputs among two threads.
pub(crate) const BLOCK_OUTS: usize = 32;

/// Weight rows of a tile up to this size leave room in the second-level cache for the next ones.
const STREAMED_BYTES: usize = 128 << 10;

/// Results of one block, row-major with the number of weight rows as stride.
pub(crate) type BlockOut = [f32; BLOCK_ROWS * BLOCK_OUTS];

thread_local! {
    /// Of each worker, so that a task need not clear its own.
    static BLOCKS: RefCell<[BlockOut; 2]> = const { RefCell::new([[0.0; BLOCK_ROWS * BLOCK_OUTS]; 2]) };
}

/// Lends two blocks that hold what their last user left. Panics if they are lent already.
pub(crate) fn with_blocks(work: impl FnOnce(&mut [BlockOut; 2])) {
    BLOCKS.with_borrow_mut(work);
}

/// The input rows of an op in every form that its weights want: as they are, and quantized once for all tasks.
pub(crate) struct Activations<'a> {
    x: &'a [f32],
    cols: usize,
    /// At most one of each form.
    quantized: Vec<QuantizedRows>,
}

/// Some rows of the activations, at most [`BLOCK_ROWS`], without allocation.
pub(crate) struct RowBlock {
    rows: [u32; BLOCK_ROWS],
    len: usize,
}

impl RowBlock {
    /// Takes the first [`BLOCK_ROWS`] rows.
    pub(crate) fn new(rows: impl Iterator<Item = usize>) -> Self {
        let mut block = Self { rows: [0; BLOCK_ROWS], len: 0 };
        for (slot, row) in block.rows.iter_mut().zip(rows) {
            *slot = row as u32;
            block.len += 1;
        }
        block
    }

    fn rows(&self) -> &[u32] {
        &self.rows[..self.len]
    }
}

impl<'a> Activations<'a> {
    /// Rows of `x`, each `cols` long, for weights of these formats.
    pub(crate) fn new(x: &'a [f32], cols: usize, formats: impl Iterator<Item = WeightFormat>) -> Self {
        let mut quantized: Vec<QuantizedRows> = Vec::new();
        for format in formats {
            if let WeightFormat::Quantized(format) = format
                && quantized.iter().all(|rows| rows.form != format.row_form())
            {
                quantized.push(QuantizedRows::new(x, cols, format.row_form()));
            }
        }
        Self { x, cols, quantized }
    }

    /// `out[i][j] = rows[i] · weight[outs.start + j]`. At most [`BLOCK_OUTS`] weight rows, of a format that was announced;
    /// input rows are as long as the weight is wide.
    pub(crate) fn multiply(&self, rows: &RowBlock, weight: &PackedWeight, outs: Range<usize>, out: &mut BlockOut) {
        let cols = weight.cols();
        debug_assert!(cols == self.cols && outs.len() <= BLOCK_OUTS);
        if cols == 0 {
            return out.fill(0.0);
        }
        let elements = outs.start * cols..outs.end * cols;
        match weight.view() {
            WeightView::F32(values) => self.multiply_floats(rows, &values[elements], out),
            WeightView::F16(values) => self.multiply_floats(rows, &values[elements], out),
            WeightView::Bf16(values) => self.multiply_floats(rows, &values[elements], out),
            WeightView::Quantized(layout, weight) => {
                let x = self.quantized.iter().find(|x| x.form == layout.format.row_form());
                let x = x.expect("activations were quantized for every format of the op");
                quant::multiply(QuantBlock { x, rows: rows.rows(), layout, weight, outs, out });
            }
        }
    }

    fn multiply_floats<E: Element>(&self, rows: &RowBlock, weight: &[E], out: &mut BlockOut) {
        let mut input: [&[f32]; BLOCK_ROWS] = [&[]; BLOCK_ROWS];
        for (slot, &row) in input.iter_mut().zip(rows.rows()) {
            *slot = &self.x[row as usize * self.cols..(row as usize + 1) * self.cols];
        }
        dispatch::run_by_width(Block { rows: &input[..rows.len], weight, out });
    }
}

struct Block<'a, E> {
    rows: &'a [&'a [f32]],
    weight: &'a [E],
    out: &'a mut [f32],
}

/// The block for sets whose register file holds few vectors.
struct NarrowBlock<'a, E>(Block<'a, E>);

impl<'a, E: Element> ByWidth for Block<'a, E> {
    type Narrow = NarrowBlock<'a, E>;

    fn narrow(self) -> NarrowBlock<'a, E> {
        NarrowBlock(self)
    }
}

impl<E: Element> Kernel for Block<'_, E> {
    type Output = ();

    /// Bands of rows as equal as can be, in tiles that fill the register file.
    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let mut first = 0;
        while first < self.rows.len() {
            let left = self.rows.len() - first;
            let num_rows = left.div_ceil(left.div_ceil(6));
            match num_rows {
                1 => self.band::<L, 1, 8>(lanes, first),
                2 => self.band::<L, 2, 8>(lanes, first),
                3 => self.band::<L, 3, 8>(lanes, first),
                4 => self.band::<L, 4, 4>(lanes, first),
                5 => self.band::<L, 5, 4>(lanes, first),
                _ => self.band::<L, 6, 4>(lanes, first),
            }
            first += num_rows;
        }
    }
}

impl<E: Element> Kernel for NarrowBlock<'_, E> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(mut self, lanes: L) {
        let num_rows = self.0.rows.len();
        for first in (0..num_rows).step_by(2) {
            match num_rows - first {
                1 => self.0.band::<L, 1, 4>(lanes, first),
                _ => self.0.band::<L, 2, 2>(lanes, first),
            }
        }
    }
}

impl<E: Element> Block<'_, E> {
    /// `M` input rows against all weight rows, `N` at a time.
    #[inline(always)]
    fn band<L: Lanes, const M: usize, const N: usize>(&mut self, lanes: L, first: usize) {
        let mut x: [&[f32]; M] = [&[]; M];
        x.copy_from_slice(&self.rows[first..first + M]);
        let cols = x[0].len();
        let num_outs = self.weight.len() / cols;
        // The first rows read the weights from memory, those after them from a cache.
        let streamed = first == 0 && N * cols * size_of::<E>() <= STREAMED_BYTES;
        let mut out_idx = 0;
        while out_idx + N <= num_outs {
            let mut w: [&[E]; N] = [&[]; N];
            for (n, w) in w.iter_mut().enumerate() {
                *w = &self.weight[(out_idx + n) * cols..(out_idx + n + 1) * cols];
            }
            let tile = if streamed { dot_tile_streamed(lanes, x, w) } else { dot_tile(lanes, x, w) };
            for (m, tile_row) in tile.iter().enumerate() {
                let start = (first + m) * num_outs + out_idx;
                self.out[start..start + N].copy_from_slice(tile_row);
            }
            out_idx += N;
        }
        for out_idx in out_idx..num_outs {
            let tile = dot_tile(lanes, x, [&self.weight[out_idx * cols..(out_idx + 1) * cols]]);
            for (m, [entry]) in tile.into_iter().enumerate() {
                self.out[(first + m) * num_outs + out_idx] = entry;
            }
        }
    }
}

/// The `idx`-th part of `0..len` in parts of `size`.
pub(crate) fn part(idx: usize, size: usize, len: usize) -> Range<usize> {
    idx * size..len.min((idx + 1) * size)
}
