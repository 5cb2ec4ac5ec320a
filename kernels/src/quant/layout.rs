//! Where everything lies in the bytes of a quantized weight.
//!
//! Rows go in panels of 16, so that one vector holds the same columns of a whole panel. A panel, from a multiple of 64
//! bytes, little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 64 | f32 factor of each row, a power of two where scales are f16 |
//! | 64, of `Int4Double` | f32 of each row by which its minima are multiplied before the factor |
//! | per group 32 | f16 scale of each row; of `Int4Double` a byte, and behind the bytes that of the minimum plus 128 |
//! | per group 32, where there are minima beside scales in f16 | f16 minimum of each row |
//! | up to 32 | zeros, to the next multiple of 64 |
//! | per four columns 64, or per eight where two codes share a byte | four bytes of each row |
//!
//! Columns are filled up to whole groups and rows to whole panels. Four bytes hold columns `c..c + 4` of a row; where two
//! codes share a byte, columns `c..c + 4` are the lower halves and `c + 4..c + 8` the upper ones. It is what a dot-product
//! instruction multiplies with four broadcast activations, and a tile of AMX with sixteen rows of them.

use half::f16;

use super::{Codes, QuantFormat};
use crate::lanes::{BYTES, Lanes, WIDTH};
use crate::memory::view;

/// Rows of a panel.
pub(crate) const PANEL_ROWS: usize = WIDTH;

const FACTOR_BYTES: usize = 4 * PANEL_ROWS;
/// Of a scale and a minimum in 8 bits as of a scale in f16.
const SCALE_BYTES: usize = 2 * PANEL_ROWS;
/// What a minimum in 8 bits is stored with, so that it is not negative.
pub(super) const MIN_CENTER: u8 = 128;

/// Sizes of a weight `[_, cols]`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Layout {
    pub(crate) format: QuantFormat,
    pub(crate) cols: usize,
    pub(crate) num_groups: usize,
    codes_start: usize,
    pub(crate) panel_bytes: usize,
}

/// One panel, apart.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a> {
    pub(crate) factors: &'a [f32; PANEL_ROWS],
    scales: Scales<'a>,
    pub(crate) codes: &'a [[u8; BYTES]],
}

/// Of each group.
#[derive(Clone, Copy)]
enum Scales<'a> {
    Plain(&'a [[f16; PANEL_ROWS]]),
    /// Each with its minimum.
    WithMin(&'a [[[f16; PANEL_ROWS]; 2]]),
    Double {
        min_factors: &'a [f32; PANEL_ROWS],
        pairs: &'a [[[u8; PANEL_ROWS]; 2]],
    },
}

impl Panel<'_> {
    /// Scales and minima of a group, before the factors; minima that there are none of are zero.
    #[inline(always)]
    pub(super) fn scales<L: Lanes>(&self, lanes: L, group_idx: usize) -> (L::V, L::V) {
        match self.scales {
            Scales::Plain(scales) => (lanes.load_f16(&scales[group_idx]), lanes.splat(0.0)),
            Scales::WithMin(pairs) => {
                let [scale, min] = &pairs[group_idx];
                (lanes.load_f16(scale), lanes.load_f16(min))
            }
            Scales::Double { min_factors, pairs } => {
                let [scale, min] = &pairs[group_idx];
                let min = lanes.sub(lanes.load_u8(min), lanes.splat(f32::from(MIN_CENTER)));
                (lanes.load_u8(scale), lanes.mul(min, lanes.load(min_factors)))
            }
        }
    }

    /// The scale and minimum of one row's group.
    pub(super) fn scale_of(&self, row: usize, group_idx: usize) -> (f32, f32) {
        let factor = self.factors[row];
        match self.scales {
            Scales::Plain(scales) => (scales[group_idx][row].to_f32() * factor, 0.0),
            Scales::WithMin(pairs) => {
                let [scale, min] = pairs[group_idx].map(|values| values[row].to_f32() * factor);
                (scale, min)
            }
            Scales::Double { min_factors, pairs } => {
                let [scale, min] = pairs[group_idx].map(|values| f32::from(values[row]));
                (scale * factor, (min - f32::from(MIN_CENTER)) * min_factors[row] * factor)
            }
        }
    }
}

impl Layout {
    pub(crate) fn new(format: QuantFormat, cols: usize) -> Self {
        let num_groups = cols.div_ceil(format.group());
        let scales_end = head_bytes(format) + num_groups * vectors_per_group(format) * SCALE_BYTES;
        let codes_start = scales_end.next_multiple_of(BYTES);
        let code_bytes = num_groups * format.group() * PANEL_ROWS / if format.codes.are_nibbles() { 2 } else { 1 };
        Self { format, cols, num_groups, codes_start, panel_bytes: codes_start + code_bytes }
    }

    /// Bytes of so many rows.
    pub(crate) fn num_bytes(&self, rows: usize) -> usize {
        rows.div_ceil(PANEL_ROWS) * self.panel_bytes
    }

    /// Columns with the filling.
    pub(crate) fn padded_cols(&self) -> usize {
        self.num_groups * self.format.group()
    }

    /// Splits the bytes of one panel, which may go on.
    pub(crate) fn panel<'a>(&self, bytes: &'a [u8]) -> Panel<'a> {
        let (head, codes) = bytes[..self.panel_bytes].split_at(self.codes_start);
        let (factors, scales) = head.split_at(head_bytes(self.format));
        let factors: &[[f32; PANEL_ROWS]] = view::<f32>(factors).as_chunks().0;
        let scales = &scales[..self.num_groups * vectors_per_group(self.format) * SCALE_BYTES];
        let scales = match self.format.codes {
            Codes::Int4Double => Scales::Double { min_factors: &factors[1], pairs: scales.as_chunks().0.as_chunks().0 },
            codes if codes.have_min() => Scales::WithMin(view::<f16>(scales).as_chunks().0.as_chunks().0),
            _ => Scales::Plain(view::<f16>(scales).as_chunks().0),
        };
        Panel { factors: &factors[0], scales, codes: codes.as_chunks().0 }
    }

    /// Bytes of a panel that hold a row's factor and, where it has one, the factor of its minima.
    pub(super) fn factors_at(&self, row: usize) -> impl Iterator<Item = usize> + use<> {
        (0..head_bytes(self.format)).step_by(FACTOR_BYTES).map(move |start| start + 4 * row)
    }

    /// Byte of a panel that holds a scale, or the minimum behind it, and its length.
    pub(super) fn scale_at(&self, row: usize, group: usize, is_min: usize) -> (usize, usize) {
        let len = if self.format.codes == Codes::Int4Double { 1 } else { 2 };
        let group_start = head_bytes(self.format) + group * vectors_per_group(self.format) * SCALE_BYTES;
        (group_start + (is_min * PANEL_ROWS + row) * len, len)
    }

    /// Byte of a panel that holds a code, and how far to the left it is in it.
    pub(super) fn code_at(&self, row: usize, col: usize) -> (usize, u32) {
        if self.format.codes.are_nibbles() {
            let shift = if col % 8 < 4 { 0 } else { 4 };
            (self.codes_start + col / 8 * BYTES + 4 * row + col % 4, shift)
        } else {
            (self.codes_start + col / 4 * BYTES + 4 * row + col % 4, 0)
        }
    }
}

/// Bytes of the factors.
fn head_bytes(format: QuantFormat) -> usize {
    if format.codes == Codes::Int4Double { 2 * FACTOR_BYTES } else { FACTOR_BYTES }
}

/// Of scales and minima.
fn vectors_per_group(format: QuantFormat) -> usize {
    if format.codes.have_min() && format.codes != Codes::Int4Double { 2 } else { 1 }
}
