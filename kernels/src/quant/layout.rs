//! Where everything lies in the bytes of a quantized weight.
//!
//! Rows go in panels of 16, so that one vector holds the same columns of a whole panel. A panel, from a multiple of 64
//! bytes, little-endian:
//!
//! | bytes | content |
//! |---|---|
//! | 64 | f32 factor of each row, a power of two |
//! | per group 32 | f16 scale of each row |
//! | per group 32, where the codes have a minimum | f16 minimum of each row |
//! | up to 32 | zeros, to the next multiple of 64 |
//! | per four columns 64, or per eight where two codes share a byte | four bytes of each row |
//!
//! Columns are filled up to whole groups and rows to whole panels. Four bytes hold columns `c..c + 4` of a row; where two
//! codes share a byte, columns `c..c + 4` are the lower halves and `c + 4..c + 8` the upper ones. It is what a dot-product
//! instruction multiplies with four broadcast activations, and a tile of AMX with sixteen rows of them.

use half::f16;

use super::QuantFormat;
use crate::lanes::{BYTES, WIDTH};
use crate::memory::view;

/// Rows of a panel.
pub(crate) const PANEL_ROWS: usize = WIDTH;

const FACTOR_BYTES: usize = 4 * PANEL_ROWS;
const SCALE_BYTES: usize = 2 * PANEL_ROWS;

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
    /// Scale and, where there is one, minimum of each group, one after the other.
    pub(crate) scales: &'a [[f16; PANEL_ROWS]],
    pub(crate) codes: &'a [[u8; BYTES]],
}

impl Layout {
    pub(crate) fn new(format: QuantFormat, cols: usize) -> Self {
        let num_groups = cols.div_ceil(format.group());
        let vectors_per_group = 1 + usize::from(format.codes.have_min());
        let codes_start = (FACTOR_BYTES + num_groups * vectors_per_group * SCALE_BYTES).next_multiple_of(BYTES);
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
        let (factors, scales) = head.split_at(FACTOR_BYTES);
        let num_scales = self.num_groups * (1 + usize::from(self.format.codes.have_min()));
        let factors = view::<f32>(factors).try_into().expect("16 factors");
        let scales = view::<f16>(&scales[..num_scales * SCALE_BYTES]).as_chunks().0;
        Panel { factors, scales, codes: codes.as_chunks().0 }
    }

    /// Byte of a panel that holds a factor.
    pub(super) fn factor_at(row: usize) -> usize {
        4 * row
    }

    /// Byte of a panel that holds a scale, or the minimum behind it.
    pub(super) fn scale_at(&self, row: usize, group: usize, is_min: usize) -> usize {
        let vectors_per_group = 1 + usize::from(self.format.codes.have_min());
        FACTOR_BYTES + (group * vectors_per_group + is_min) * SCALE_BYTES + 2 * row
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
