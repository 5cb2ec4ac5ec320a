//! Rows into packed bytes and back.

use half::f16;

use super::layout::{Layout, MIN_CENTER, PANEL_ROWS};
use super::rotation::Rotate;
use super::{Codes, QuantFormat};
use crate::dispatch;
use crate::error::{KernelError, Result};
use crate::memory::Disjoint;
use crate::pool;

/// Binary exponent of the largest scale or minimum of a row once its factor is taken out: far enough from both ends of
/// f16 that numbers down to 2^-24 of it keep all their bits.
const TOP_EXPONENT: i32 = 10;

/// Of the scale in the minimum of a row.
const SMALLEST_SCALE_SHARE: f32 = 1.0 / (1u128 << 100) as f32;

/// Shares of a group's range that are tried as its step.
const STEP_SHARES: [f32; 4] = [1.0, 0.95, 0.9, 0.85];

/// One row of a weight, group by group.
#[derive(Debug, Clone, Default)]
pub struct GroupRow {
    /// One per column.
    pub codes: Vec<u8>,
    /// One per group.
    pub scales: Vec<f32>,
    /// One per group; used by formats with a minimum only.
    pub mins: Vec<f32>,
}

impl GroupRow {
    fn new(layout: &Layout) -> Self {
        let groups = vec![0.0; layout.num_groups];
        // Turned blocks have no filling: what stands there is part of them.
        let codes = if layout.format.codes.are_rotated() { layout.padded_cols() } else { layout.cols };
        Self { codes: vec![0; codes], scales: groups.clone(), mins: groups }
    }
}

/// Packs rows that are coded already; `fill` sets every field of a row. Fails on a scale or minimum that is no number,
/// naming the row.
pub(crate) fn pack(
    layout: &Layout,
    rows: usize,
    out: &mut [u8],
    fill: impl Fn(usize, &mut GroupRow) + Sync,
) -> Result<()> {
    let bad_row = std::sync::atomic::AtomicUsize::new(usize::MAX);
    let target = Disjoint::new(out);
    pool::parallel_for(rows.div_ceil(PANEL_ROWS), |panel_idx| {
        // SAFETY: each panel is a task.
        let panel = unsafe { target.part(panel_idx * layout.panel_bytes, layout.panel_bytes) };
        let mut row = GroupRow::new(layout);
        let first = panel_idx * PANEL_ROWS;
        for row_idx in first..rows.min(first + PANEL_ROWS) {
            fill(row_idx, &mut row);
            if row.write(layout, row_idx - first, panel).is_none() {
                bad_row.fetch_min(row_idx, std::sync::atomic::Ordering::Relaxed);
            }
        }
    });
    match bad_row.into_inner() {
        usize::MAX => Ok(()),
        row => Err(KernelError::Invalid { op: "weight", reason: format!("row {row} has a scale that is not finite") }),
    }
}

/// Quantizes the rows of a matrix.
pub(crate) fn quantize(layout: &Layout, rows: usize, values: &[f32], out: &mut [u8]) -> Result<()> {
    pack(layout, rows, out, |row_idx, row| {
        row.quantize(layout.format, &values[row_idx * layout.cols..(row_idx + 1) * layout.cols]);
    })
}

impl GroupRow {
    fn quantize(&mut self, format: QuantFormat, values: &[f32]) {
        if format.codes.are_rotated() {
            let mut rotated = values.to_vec();
            rotated.resize(self.codes.len(), 0.0);
            dispatch::run(Rotate(rotated.as_chunks_mut().0));
            return self.quantize_groups(format, &rotated);
        }
        self.quantize_groups(format, values);
        let is_finite = self.scales.iter().all(|scale| scale.is_finite());
        if format.codes == Codes::Int4Double && is_finite {
            let factors = DoubleFactors::of(self);
            let groups = values.chunks(format.group()).zip(self.codes.chunks_mut(format.group()));
            for (idx, (values, codes)) in groups.enumerate() {
                let (scale, min) = factors.round(self.scales[idx], self.mins[idx]);
                (self.scales[idx], self.mins[idx]) = (f32::from(scale) * factors.scale, f32::from(min) * factors.min);
                encode(values, (self.scales[idx], self.mins[idx]), format.codes, codes);
            }
        }
    }

    fn quantize_groups(&mut self, format: QuantFormat, values: &[f32]) {
        let group = format.group();
        for (idx, (values, codes)) in values.chunks(group).zip(self.codes.chunks_mut(group)).enumerate() {
            (self.scales[idx], self.mins[idx]) = match format.codes {
                _ if values.iter().any(|value| !value.is_finite()) => (f32::NAN, 0.0),
                Codes::Int8 | Codes::Int8Rotated | Codes::Int4 => {
                    (quantize_symmetric(format.codes, values, codes), 0.0)
                }
                Codes::Int8Min | Codes::Int4Min | Codes::Int4Double => quantize_range(format.codes, values, codes),
                Codes::Fp4 => (quantize_fp4(values, codes), 0.0),
            };
        }
    }

    /// Puts the row into its place of a panel; `None` if a scale is not finite.
    fn write(&self, layout: &Layout, row: usize, panel: &mut [u8]) -> Option<()> {
        let QuantFormat { codes, .. } = layout.format;
        let mins = if codes.have_min() { self.mins.as_slice() } else { &[] };
        let is_finite = self.scales.iter().chain(mins).all(|value| value.is_finite());
        if codes == Codes::Int4Double {
            self.write_double(layout, row, panel);
        } else {
            let largest = self.scales.iter().chain(mins).fold(0f32, |largest, value| largest.max(value.abs()));
            let factor = if largest > 0.0 && is_finite { power_below(largest, TOP_EXPONENT) } else { 1.0 };
            layout.factors_at(row).for_each(|at| panel[at..at + 4].copy_from_slice(&factor.to_le_bytes()));
            for (is_min, values) in [self.scales.as_slice(), mins].into_iter().enumerate() {
                let scale_factor = if is_min == 0 { codes.scale_factor() } else { 1.0 };
                for (group, value) in values.iter().enumerate() {
                    let half = f16::from_f32(value * scale_factor / factor);
                    let (at, len) = layout.scale_at(row, group, is_min);
                    panel[at..at + len].copy_from_slice(&half.to_le_bytes());
                }
            }
        }
        for col in 0..layout.padded_cols() {
            let (at, shift) = layout.code_at(row, col);
            // The filling is multiplied with zeros.
            panel[at] |= self.codes.get(col).map_or(0, |code| code & codes.largest()) << shift;
        }
        is_finite.then_some(())
    }

    fn write_double(&self, layout: &Layout, row: usize, panel: &mut [u8]) {
        let factors = DoubleFactors::of(self);
        for (at, factor) in layout.factors_at(row).zip([factors.scale, factors.min / factors.scale]) {
            panel[at..at + 4].copy_from_slice(&factor.to_le_bytes());
        }
        for (group, (&scale, &min)) in self.scales.iter().zip(&self.mins).enumerate() {
            let (scale, min) = factors.round(scale, min);
            panel[layout.scale_at(row, group, 0).0] = scale;
            panel[layout.scale_at(row, group, 1).0] = min.cast_unsigned() ^ MIN_CENTER;
        }
    }
}

/// What the 8 bits of a row's scales and minima are multiplied with.
struct DoubleFactors {
    scale: f32,
    min: f32,
}

impl DoubleFactors {
    fn of(row: &GroupRow) -> Self {
        let largest = |values: &[f32]| values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
        let (scale, min) = (largest(&row.scales) / 255.0, largest(&row.mins) / 127.0);
        // Minima are stored by their share of the scale, which must be a number. A row that is constant in each group has
        // no scale.
        let scale = if scale > 0.0 { scale.max(min * SMALLEST_SCALE_SHARE) } else { 1.0 };
        Self { scale, min }
    }

    /// A scale that is not zero does not become it.
    fn round(&self, scale: f32, min: f32) -> (u8, i8) {
        let rounded = (scale / self.scale).round_ties_even() as u8;
        let scale = if scale > 0.0 { rounded.max(1) } else { 0 };
        let min = if self.min > 0.0 { (min / self.min).round_ties_even() as i8 } else { 0 };
        (scale, min)
    }
}

/// The power of two that brings a positive number's exponent to `exponent`, as far as f32 has one.
fn power_below(value: f32, exponent: i32) -> f32 {
    let own = (value.to_bits() >> 23) as i32 - 127;
    f32::from_bits(((own - exponent).clamp(-126, 127) + 127).cast_unsigned() << 23)
}

/// To the eleven bits that f16 keeps, so that codes are chosen for the scale that will be there.
fn to_half_precision(value: f32) -> f32 {
    const DROPPED: u32 = 13;
    let bits = value.to_bits();
    let half_less_one = (1 << (DROPPED - 1)) - 1;
    let rounded = bits + half_less_one + ((bits >> DROPPED) & 1);
    f32::from_bits(rounded & !((1 << DROPPED) - 1))
}

/// The largest magnitude becomes the last code; int4 gives it the one code more that the negative side has.
fn quantize_symmetric(kind: Codes, values: &[f32], codes: &mut [u8]) -> f32 {
    let offset = kind.offset() as f32;
    let extreme = values.iter().fold(0f32, |extreme, &value| if value.abs() > extreme.abs() { value } else { extreme });
    let scale = to_half_precision(if kind.offset() == 128 { extreme.abs() / 127.0 } else { extreme / -offset });
    let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = ((value * inverse).round_ties_even().clamp(-offset, offset - 1.0) + offset) as u8;
    }
    scale
}

/// The scale and minimum with the least squared error among a few ranges, each fitted to its codes.
fn quantize_range(kind: Codes, values: &[f32], codes: &mut [u8]) -> (f32, f32) {
    let (low, high) = values.iter().fold((f32::INFINITY, f32::NEG_INFINITY), |(l, h), &v| (l.min(v), h.max(v)));
    let largest = f32::from(kind.largest());
    let range = high - low;
    if range <= 0.0 {
        codes.fill(0);
        return (0.0, low);
    }
    let mut best = (f32::INFINITY, 0.0, low);
    for share in STEP_SHARES {
        let step = range * share / largest;
        let first = low + 0.5 * range * (1.0 - share);
        let (scale, min) = fit(values, (step, first), largest);
        let error = squared_error(values, (scale, min), largest);
        if error < best.0 {
            best = (error, scale, min);
        }
    }
    let (scale, min) = (to_half_precision(best.1), to_half_precision(best.2));
    encode(values, (scale, min), kind, codes);
    (scale, min)
}

/// The codes nearest to the values; zeros where there is no scale.
fn encode(values: &[f32], (scale, min): (f32, f32), kind: Codes, codes: &mut [u8]) {
    let inverse = if scale > 0.0 { 1.0 / scale } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        *code = code_of(*value, (inverse, min), f32::from(kind.largest())) as u8;
    }
}

fn code_of(value: f32, (inverse, min): (f32, f32), largest: f32) -> f32 {
    ((value - min) * inverse).round_ties_even().clamp(0.0, largest)
}

/// The line through codes and values that is nearest to the values.
fn fit(values: &[f32], (scale, min): (f32, f32), largest: f32) -> (f32, f32) {
    let inverse = 1.0 / scale;
    let count = values.len() as f32;
    let (mut q, mut qq, mut v, mut qv) = (0.0, 0.0, 0.0, 0.0);
    for &value in values {
        let code = code_of(value, (inverse, min), largest);
        (q, qq, v, qv) = (q + code, qq + code * code, v + value, qv + code * value);
    }
    let spread = count * qq - q * q;
    if spread <= 0.0 {
        return (scale, min);
    }
    let scale = (count * qv - q * v) / spread;
    (scale, (v - scale * q) / count)
}

fn squared_error(values: &[f32], range: (f32, f32), largest: f32) -> f32 {
    let (scale, min) = range;
    let code = |value| code_of(value, (1.0 / scale, min), largest);
    values.iter().map(|&value| (code(value) * scale + min - value).powi(2)).sum()
}

/// The scale is a power of two, as the format's standard has it.
fn quantize_fp4(values: &[f32], codes: &mut [u8]) -> f32 {
    const MAGNITUDES: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
    let scale = if largest > 0.0 { power_below(largest, 2) } else { 0.0 };
    for (code, value) in codes.iter_mut().zip(values) {
        let magnitude = if scale > 0.0 { value.abs() / scale } else { 0.0 };
        let nearest = MAGNITUDES.windows(2).take_while(|pair| magnitude > (pair[0] + pair[1]) / 2.0).count();
        *code = nearest as u8 | if *value < 0.0 { 8 } else { 0 };
    }
    scale
}

/// The numbers of one row.
pub(crate) fn read_row(layout: &Layout, bytes: &[u8], row_idx: usize, out: &mut [f32]) {
    if layout.format.codes.are_rotated() {
        let mut rotated = vec![0.0; layout.padded_cols()];
        read_stored(layout, bytes, row_idx, &mut rotated);
        dispatch::run(Rotate(rotated.as_chunks_mut().0));
        out.copy_from_slice(&rotated[..out.len()]);
    } else {
        read_stored(layout, bytes, row_idx, out);
    }
}

/// The first numbers of one row as they are multiplied: still turned where the format turns them.
pub(super) fn read_stored(layout: &Layout, bytes: &[u8], row_idx: usize, out: &mut [f32]) {
    let row = row_idx % PANEL_ROWS;
    let bytes = &bytes[row_idx / PANEL_ROWS * layout.panel_bytes..];
    let panel = layout.panel(bytes);
    let (codes, group) = (layout.format.codes, layout.format.group());
    for (idx, out) in out.chunks_mut(group).enumerate() {
        let (scale, min) = panel.scale_of(row, idx);
        for (col, out) in (idx * group..).zip(out) {
            let (at, shift) = layout.code_at(row, col);
            *out = scale * codes.number((bytes[at] >> shift) & codes.largest()) as f32 + min;
        }
    }
}

/// Copies rows of a weight into rows `first..` of another of the same layout, which holds zeros there.
pub(crate) fn copy_rows(layout: &Layout, from: &[u8], rows: &[usize], to: &mut [u8], first: usize) {
    let is_whole = |row: usize| row.is_multiple_of(PANEL_ROWS);
    for (idx, rows) in rows.chunks(PANEL_ROWS).enumerate() {
        let first = first + idx * PANEL_ROWS;
        let is_run = rows.windows(2).all(|pair| pair[0] + 1 == pair[1]);
        if rows.len() == PANEL_ROWS && is_run && is_whole(rows[0]) && is_whole(first) {
            let from = &from[rows[0] / PANEL_ROWS * layout.panel_bytes..][..layout.panel_bytes];
            to[first / PANEL_ROWS * layout.panel_bytes..][..layout.panel_bytes].copy_from_slice(from);
        } else {
            rows.iter().zip(first..).for_each(|(&row, target)| copy_row(layout, (from, row), (to, target)));
        }
    }
}

fn copy_row(layout: &Layout, (from, from_row): (&[u8], usize), (to, to_row): (&mut [u8], usize)) {
    let from = &from[from_row / PANEL_ROWS * layout.panel_bytes..][..layout.panel_bytes];
    let to = &mut to[to_row / PANEL_ROWS * layout.panel_bytes..][..layout.panel_bytes];
    let (from_row, to_row) = (from_row % PANEL_ROWS, to_row % PANEL_ROWS);
    let mut copy = |from_at: usize, to_at: usize, len| to[to_at..][..len].copy_from_slice(&from[from_at..][..len]);
    layout.factors_at(from_row).zip(layout.factors_at(to_row)).for_each(|(from_at, to_at)| copy(from_at, to_at, 4));
    for group in 0..layout.num_groups {
        for is_min in 0..=usize::from(layout.format.codes.have_min()) {
            let ((from_at, len), (to_at, _)) =
                (layout.scale_at(from_row, group, is_min), layout.scale_at(to_row, group, is_min));
            copy(from_at, to_at, len);
        }
    }
    let step = if layout.format.codes.are_nibbles() { 8 } else { 4 };
    for col in (0..layout.padded_cols()).step_by(step) {
        copy(layout.code_at(from_row, col).0, layout.code_at(to_row, col).0, 4);
    }
}
