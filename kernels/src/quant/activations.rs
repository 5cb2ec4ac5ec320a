//! Input rows as int8 under a scale for each group.

use super::rotation::rotate;
use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, WIDTH, load_tail};
use crate::memory::{Disjoint, unsigned};
use crate::pool;

/// Rows of a task.
const TASK_ROWS: usize = 4;
/// A row's element costs about as much as so many multiplications.
const ELEMENT_WORK: usize = 4;

/// Columns of the largest group.
const MAX_GROUP: usize = 128;
/// Quads of codes in a cache line.
const LINE_QUADS: usize = 16;

/// Rows of activations, quantized: `x = scale * code`, codes -127 to 127.
pub(crate) struct QuantizedRows {
    pub(crate) form: RowForm,
    pub(crate) num_groups: usize,
    /// `[rows, num_groups * group / 4]`, zeros behind the columns.
    codes: Vec<[i8; 4]>,
    /// Where the first row starts: at a cache line, which rows of tiles are as long as.
    first: usize,
    /// `[rows, num_groups]`
    terms: Vec<Terms>,
}

/// How rows are quantized.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowForm {
    /// Columns that share a scale.
    pub(crate) group: usize,
    /// Whether blocks of columns are turned first; they fill groups.
    pub(crate) is_rotated: bool,
}

/// What the product needs to know of a group of a row.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Terms {
    pub(crate) scale: f32,
    /// Sum of the codes.
    pub(crate) sum: i32,
}

impl QuantizedRows {
    /// Quantizes the rows of `x`, each `cols` long. A group that holds something that is no number gets a NaN as scale.
    pub(crate) fn new(x: &[f32], cols: usize, form: RowForm) -> Self {
        let group = form.group;
        let num_rows = x.len().checked_div(cols).unwrap_or(0);
        let num_groups = cols.div_ceil(group);
        let quads = num_groups * group / 4;
        let (mut codes, mut terms) =
            (vec![[0; 4]; num_rows * quads + LINE_QUADS], vec![Terms::default(); num_rows * num_groups]);
        let first = codes.as_ptr().align_offset(4 * LINE_QUADS).min(LINE_QUADS);
        let (code_parts, term_parts) = (Disjoint::new(&mut codes[first..]), Disjoint::new(&mut terms));
        pool::parallel_if(ELEMENT_WORK * x.len(), num_rows.div_ceil(TASK_ROWS), |task_idx| {
            for row in task_idx * TASK_ROWS..num_rows.min((task_idx + 1) * TASK_ROWS) {
                // SAFETY: each row belongs to exactly one task.
                let codes = unsafe { code_parts.part(row * quads, quads) };
                // SAFETY: as above.
                let terms = unsafe { term_parts.part(row * num_groups, num_groups) };
                dispatch::run(Quantize { x: &x[row * cols..(row + 1) * cols], form, codes, terms });
            }
        });
        Self { form, num_groups, codes, first, terms }
    }

    pub(crate) fn codes(&self, row: usize) -> &[[i8; 4]] {
        let quads = self.num_groups * self.form.group / 4;
        &self.codes[self.first + row * quads..self.first + (row + 1) * quads]
    }

    /// The codes of a row and of all behind it, and the bytes from row to row.
    pub(super) fn bytes_from(&self, row: usize) -> (&[u8], usize) {
        let quads = self.num_groups * self.form.group / 4;
        (unsigned(self.codes[self.first + row * quads..].as_flattened()), 4 * quads)
    }

    pub(crate) fn terms(&self, row: usize) -> &[Terms] {
        &self.terms[row * self.num_groups..(row + 1) * self.num_groups]
    }
}

/// One row.
struct Quantize<'a> {
    x: &'a [f32],
    form: RowForm,
    codes: &'a mut [[i8; 4]],
    terms: &'a mut [Terms],
}

impl Kernel for Quantize<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        let RowForm { group, is_rotated } = self.form;
        let codes = self.codes.chunks_exact_mut(group / 4);
        let mut rotated = [0.0; MAX_GROUP];
        for ((x, codes), terms) in self.x.chunks(group).zip(codes).zip(self.terms) {
            let mut x = x;
            if is_rotated {
                rotated[..x.len()].copy_from_slice(x);
                rotated[x.len()..].fill(0.0);
                let blocks = rotated[..group].as_chunks_mut().0;
                blocks.iter_mut().for_each(|block| rotate(lanes, block));
                x = &rotated[..group];
            }
            let (mut largest, mut poison) = (lanes.splat(0.0), lanes.splat(0.0));
            let zero = lanes.splat(0.0);
            for x in x.chunks(WIDTH) {
                let v = load_chunk(lanes, x);
                largest = lanes.max(largest, lanes.max(v, lanes.sub(zero, v)));
                // 0 for every number, NaN for what is none.
                poison = lanes.fma(v, zero, poison);
            }
            let mut magnitudes = [0.0; WIDTH];
            lanes.store(largest, &mut magnitudes);
            let largest = magnitudes.into_iter().fold(0f32, f32::max);
            let is_number = lanes.sum(poison) == 0.0;
            terms.scale = if is_number { largest / 127.0 } else { f32::NAN };
            let inverse = if is_number && largest > 0.0 { 127.0 / largest } else { 0.0 };
            // A group of denormals has an inverse that is none.
            let inverse = lanes.splat(if inverse.is_finite() { inverse } else { 0.0 });
            terms.sum = 0;
            for (x, codes) in x.chunks(WIDTH).zip(codes.chunks_exact_mut(WIDTH / 4)) {
                let mut bytes = [0; WIDTH];
                if is_number {
                    lanes.store_i8(lanes.mul(load_chunk(lanes, x), inverse), &mut bytes);
                }
                terms.sum += bytes.iter().map(|&byte| i32::from(byte)).sum::<i32>();
                codes.as_flattened_mut().copy_from_slice(&bytes);
            }
        }
    }
}

/// Up to 16 elements, zeros behind them.
#[inline(always)]
fn load_chunk<L: Lanes>(lanes: L, x: &[f32]) -> L::V {
    match x.try_into() {
        Ok(whole) => lanes.load(whole),
        Err(_) => load_tail(lanes, x),
    }
}
