//! Input rows as int8 under a scale for each group.

use super::MAX_GROUP;
use super::rotation::rotate;
use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, WIDTH};
use crate::memory::{Disjoint, unsigned};
use crate::pool;

/// Rows of a task.
const TASK_ROWS: usize = 4;
/// A row's element costs about as much as so many multiplications.
const ELEMENT_WORK: usize = 4;

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
    /// The same times the scale.
    pub(crate) scaled_sum: f32,
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
        let mut filled = [0.0; MAX_GROUP];
        for ((x, codes), terms) in self.x.chunks(group).zip(codes).zip(self.terms) {
            filled[..x.len()].copy_from_slice(x);
            filled[x.len()..].fill(0.0);
            let x = &mut filled[..group];
            if is_rotated {
                x.as_chunks_mut().0.iter_mut().for_each(|block| rotate(lanes, block));
            }
            quantize_group(lanes, x.as_chunks().0, (codes.as_chunks_mut().0, terms));
        }
    }
}

/// Whole vectors, which hold zeros behind the columns.
#[inline(always)]
fn quantize_group<L: Lanes>(lanes: L, x: &[[f32; WIDTH]], (codes, terms): (&mut [[[i8; 4]; WIDTH / 4]], &mut Terms)) {
    let zero = lanes.splat(0.0);
    let (mut largest, mut poison) = (zero, zero);
    for x in x {
        let v = lanes.load(x);
        largest = lanes.max(largest, lanes.max(v, lanes.sub(zero, v)));
        // 0 for every number, NaN for what is none.
        poison = lanes.fma(v, zero, poison);
    }
    largest = lanes.max(largest, lanes.swap::<8>(largest));
    largest = lanes.max(largest, lanes.swap::<4>(largest));
    largest = lanes.max(largest, lanes.swap::<2>(largest));
    largest = lanes.max(largest, lanes.swap::<1>(largest));
    let mut magnitudes = [0.0; WIDTH];
    lanes.store(largest, &mut magnitudes);
    let largest = magnitudes[0];
    if lanes.sum(poison) != 0.0 {
        *terms = Terms { scale: f32::NAN, sum: 0, scaled_sum: f32::NAN };
        return codes.fill([[0; 4]; WIDTH / 4]);
    }
    terms.scale = largest / 127.0;
    // A group of denormals has an inverse that is none.
    let inverse = 127.0 / largest;
    let inverse = lanes.splat(if inverse.is_finite() { inverse } else { 0.0 });
    // Of integers, far below where f32 would round it.
    let mut sum = zero;
    for (x, codes) in x.iter().zip(codes) {
        let rounded = lanes.round(lanes.mul(lanes.load(x), inverse));
        sum = lanes.add(sum, rounded);
        let mut bytes = [0; WIDTH];
        lanes.store_i8(rounded, &mut bytes);
        codes.as_flattened_mut().copy_from_slice(&bytes);
    }
    terms.sum = lanes.sum(sum) as i32;
    terms.scaled_sum = terms.scale * terms.sum as f32;
}
