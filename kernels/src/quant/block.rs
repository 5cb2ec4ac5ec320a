//! The product of a few quantized input rows with a few panels of a quantized weight.

use std::ops::Range;

use super::activations::{QuantizedRows, Terms};
use super::layout::{Layout, PANEL_ROWS, Panel};
#[cfg(target_arch = "x86_64")]
use super::tiles;
use super::{Codes, FP4_TABLE, QuantFormat};
use crate::dispatch::{self, ByWidth, Kernel};
use crate::lanes::{BYTES, Lanes, WIDTH};

/// How far ahead of its use a weight is asked for, in bytes and times the panels of a tile, whose ends are followed by the
/// next ones. Between 4 and 16 KiB it is a matter of a tenth or so, one way in one shape and the other in another
/// (tests/bench/results/2026-11-22-prefetch.txt).
pub(super) const PREFETCH_BYTES: usize = 6144;

/// A product to compute: `out[i][j] = rows[i] · weight[outs.start + j]`.
pub(crate) struct QuantBlock<'a> {
    pub(crate) x: &'a QuantizedRows,
    /// Input rows.
    pub(crate) rows: &'a [u32],
    pub(crate) layout: Layout,
    /// All bytes of the weight.
    pub(crate) weight: &'a [u8],
    pub(crate) outs: Range<usize>,
    /// Row-major with `outs.len()` as stride.
    pub(crate) out: &'a mut [f32],
}

/// Computes a block on the instruction set of this machine.
pub(crate) fn multiply(block: QuantBlock<'_>) {
    debug_assert_eq!(block.x.form, block.layout.format.row_form());
    debug_assert_eq!(block.x.num_groups, block.layout.num_groups);
    #[cfg(target_arch = "x86_64")]
    if block.rows.len() >= tiles::MIN_ROWS
        && let Some(unit) = dispatch::tiles()
    {
        return tiles::multiply(block, unit);
    }
    dispatch::run_by_width(WideBlock(block));
}

/// A block on vectors of which the register file holds 32: tiles of up to 6 rows and 2 panels.
pub(super) struct WideBlock<'a>(pub(super) QuantBlock<'a>);

/// A block on vectors of which it holds 8.
pub(super) struct NarrowBlock<'a>(QuantBlock<'a>);

impl<'a> ByWidth for WideBlock<'a> {
    type Narrow = NarrowBlock<'a>;

    fn narrow(self) -> NarrowBlock<'a> {
        NarrowBlock(self.0)
    }
}

impl Kernel for WideBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.0.layout.format.codes {
            Codes::Fp4 => self.bands::<L, Fp4>(lanes),
            codes if codes.are_nibbles() => self.bands::<L, Nibbles>(lanes),
            _ => self.bands::<L, Bytes>(lanes),
        }
    }
}

impl Kernel for NarrowBlock<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.0.layout.format.codes {
            Codes::Fp4 => self.bands::<L, Fp4>(lanes),
            codes if codes.are_nibbles() => self.bands::<L, Nibbles>(lanes),
            _ => self.bands::<L, Bytes>(lanes),
        }
    }
}

/// How 64 bytes of codes become factors of a product.
pub(super) trait Decode {
    /// Vectors of codes in 64 bytes.
    const VECTORS: usize;
    /// Whether [`Self::lifted`] is less work than [`Self::decode`].
    const LIFTS: bool = false;

    /// The first `VECTORS` are used.
    fn decode<L: Lanes>(lanes: L, bytes: &[u8; BYTES]) -> [L::B; 2];

    /// The same with the second vector times 16.
    #[inline(always)]
    fn lifted<L: Lanes>(_lanes: L, _bytes: &[u8; BYTES]) -> [L::B; 2] {
        unreachable!("only for those that lift")
    }
}

pub(super) struct Bytes;

impl Decode for Bytes {
    const VECTORS: usize = 1;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, bytes: &[u8; BYTES]) -> [L::B; 2] {
        [lanes.load_bytes(bytes); 2]
    }
}

pub(super) struct Nibbles;

impl Decode for Nibbles {
    const VECTORS: usize = 2;
    const LIFTS: bool = true;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, bytes: &[u8; BYTES]) -> [L::B; 2] {
        let v = lanes.load_bytes(bytes);
        [lanes.low_nibbles(v), lanes.high_nibbles(v)]
    }

    #[inline(always)]
    fn lifted<L: Lanes>(lanes: L, bytes: &[u8; BYTES]) -> [L::B; 2] {
        let v = lanes.load_bytes(bytes);
        [lanes.low_nibbles(v), lanes.lifted_nibbles(v)]
    }
}

pub(super) struct Fp4;

impl Decode for Fp4 {
    const VECTORS: usize = 2;

    #[inline(always)]
    fn decode<L: Lanes>(lanes: L, bytes: &[u8; BYTES]) -> [L::B; 2] {
        Nibbles::decode(lanes, bytes).map(|v| lanes.look_up(&FP4_TABLE, v))
    }
}

impl WideBlock<'_> {
    #[inline(always)]
    fn bands<L: Lanes, D: Decode>(mut self, lanes: L) {
        let mut first = 0;
        while first < self.0.rows.len() {
            first += match self.0.rows.len() - first {
                1 => self.0.band::<L, D, 1, 1>(lanes, first),
                2 | 4 => self.0.band::<L, D, 2, 2>(lanes, first),
                3 | 5 => self.0.band::<L, D, 3, 2>(lanes, first),
                _ => self.0.band::<L, D, 6, 2>(lanes, first),
            };
        }
    }
}

impl NarrowBlock<'_> {
    #[inline(always)]
    fn bands<L: Lanes, D: Decode>(mut self, lanes: L) {
        let mut first = 0;
        while first < self.0.rows.len() {
            first += match self.0.rows.len() - first {
                1 => self.0.band::<L, D, 1, 1>(lanes, first),
                _ => self.0.band::<L, D, 2, 1>(lanes, first),
            };
        }
    }
}

impl QuantBlock<'_> {
    /// `M` input rows against all panels, `P` at a time, and those left over one by one; gives `M`.
    #[inline(always)]
    fn band<L: Lanes, D: Decode, const M: usize, const P: usize>(&mut self, lanes: L, first: usize) -> usize {
        let rows: [usize; M] = std::array::from_fn(|m| self.rows[first + m] as usize);
        let (x, terms) = (rows.map(|row| self.x.codes(row)), rows.map(|row| self.x.terms(row)));
        let format = self.layout.format;
        let panels = self.outs.start / PANEL_ROWS..self.outs.end.div_ceil(PANEL_ROWS);
        let mut panel_idx = panels.start;
        while panel_idx + P <= panels.end {
            let tile = tile::<L, D, M, P>(lanes, (x, terms), self.panels(panel_idx), format);
            self.store(lanes, first, panel_idx, &tile);
            panel_idx += P;
        }
        for panel_idx in panel_idx..panels.end {
            for m in 0..M {
                let tile = tile::<L, D, 1, 1>(lanes, ([x[m]], [terms[m]]), self.panels(panel_idx), format);
                self.store(lanes, first + m, panel_idx, &tile);
            }
        }
        M
    }

    #[inline(always)]
    fn panels<const P: usize>(&self, first: usize) -> [Panel<'_>; P] {
        std::array::from_fn(|p| self.layout.panel(&self.weight[(first + p) * self.layout.panel_bytes..]))
    }

    /// Writes what of a tile lies within `outs`.
    #[inline(always)]
    fn store<L: Lanes, const M: usize, const P: usize>(
        &mut self,
        lanes: L,
        first: usize,
        panel_idx: usize,
        tile: &[[L::V; P]; M],
    ) {
        let stride = self.outs.len();
        for (m, tile_row) in tile.iter().enumerate() {
            let out = &mut self.out[(first + m) * stride..(first + m + 1) * stride];
            for (p, &v) in tile_row.iter().enumerate() {
                let start = (panel_idx + p) * PANEL_ROWS;
                let whole = start.checked_sub(self.outs.start).and_then(|at| out.get_mut(at..)?.first_chunk_mut());
                if let Some(whole) = whole {
                    lanes.store(v, whole);
                    continue;
                }
                let mut values = [0.0; WIDTH];
                lanes.store(v, &mut values);
                let wanted = start.max(self.outs.start)..(start + PANEL_ROWS).min(self.outs.end);
                out[wanted.start - self.outs.start..wanted.end - self.outs.start]
                    .copy_from_slice(&values[wanted.start - start..wanted.end - start]);
            }
        }
    }
}

/// All groups of `M` rows and `P` panels, first to last.
#[inline(always)]
fn tile<L: Lanes, D: Decode, const M: usize, const P: usize>(
    lanes: L,
    (x, terms): ([&[[i8; 4]]; M], [&[Terms]; M]),
    panels: [Panel<'_>; P],
    format: QuantFormat,
) -> [[L::V; P]; M] {
    let (group, has_min, offset) = (format.group(), format.codes.have_min(), format.codes.offset());
    let num_groups = terms[0].len();
    let terms = terms.map(|terms| &terms[..num_groups]);
    let vectors = group / 4 / D::VECTORS;
    let mut acc = [[lanes.splat(0.0); P]; M];
    for idx in 0..num_groups {
        let codes: [&[[u8; BYTES]]; P] = std::array::from_fn(|p| &panels[p].codes[idx * vectors..(idx + 1) * vectors]);
        let x: [&[[i8; 4]]; M] = std::array::from_fn(|m| &x[m][idx * group / 4..(idx + 1) * group / 4]);
        // Codes with a minimum have no offset.
        let starts = std::array::from_fn(|m| if has_min { 0 } else { -offset * terms[m][idx].sum });
        let sums = dot_group::<L, D, M, P>(lanes, x, codes, starts);
        for p in 0..P {
            let (scale, min) = panels[p].scales(lanes, idx);
            for m in 0..M {
                acc[m][p] = add_scaled(lanes, acc[m][p], sums[m][p], (scale, min), (&terms[m][idx], has_min));
            }
        }
    }
    for p in 0..P {
        let factor = lanes.load(panels[p].factors);
        for acc in &mut acc {
            acc[p] = lanes.mul(acc[p], factor);
        }
    }
    acc
}

/// Adds the integers of one group under their scale, and what its minimum gives if there is one.
#[inline(always)]
pub(super) fn add_scaled<L: Lanes>(
    lanes: L,
    acc: L::V,
    sums: L::I,
    (scale, min): (L::V, L::V),
    (terms, has_min): (&Terms, bool),
) -> L::V {
    let acc = lanes.fma(lanes.int_to_float(sums), lanes.mul(scale, lanes.splat(terms.scale)), acc);
    if has_min { lanes.fma(min, lanes.splat(terms.scaled_sum), acc) } else { acc }
}

/// The integer products of one group, added to `starts`.
#[inline(always)]
fn dot_group<L: Lanes, D: Decode, const M: usize, const P: usize>(
    lanes: L,
    x: [&[[i8; 4]]; M],
    codes: [&[[u8; BYTES]]; P],
    starts: [i32; M],
) -> [[L::I; P]; M] {
    // One row leaves registers for sums of their own, which are shifted once for a group.
    let lifts = D::LIFTS && L::DOTS_ANY_BYTE && M == 1;
    let mut acc: [[L::I; P]; M] = std::array::from_fn(|m| [lanes.splat_int(starts[m]); P]);
    let mut lifted = [[lanes.splat_int(0); P]; M];
    let vectors = codes[0].len();
    let x = x.map(|x| &x[..vectors * D::VECTORS]);
    let codes = codes.map(|codes| &codes[..vectors]);
    for idx in 0..vectors {
        let mut w = [[lanes.load_bytes(&[0; BYTES]); 2]; P];
        for p in 0..P {
            lanes.prefetch_far(codes[p][idx].as_ptr().wrapping_add(P * PREFETCH_BYTES));
            w[p] = if lifts { D::lifted(lanes, &codes[p][idx]) } else { D::decode(lanes, &codes[p][idx]) };
        }
        if D::VECTORS == 2 && !L::DOTS_ANY_BYTE {
            for m in 0..M {
                for p in 0..P {
                    acc[m][p] = lanes.dot8_small(acc[m][p], w[p], [x[m][2 * idx], x[m][2 * idx + 1]]);
                }
            }
            continue;
        }
        for half in 0..D::VECTORS {
            for m in 0..M {
                for p in 0..P {
                    let x = x[m][idx * D::VECTORS + half];
                    if lifts && half == 1 {
                        lifted[m][p] = lanes.dot4(lifted[m][p], w[p][half], x);
                    } else {
                        acc[m][p] = lanes.dot4(acc[m][p], w[p][half], x);
                    }
                }
            }
        }
    }
    if lifts {
        for m in 0..M {
            for p in 0..P {
                acc[m][p] = lanes.add_int(acc[m][p], lanes.sixteenth(lifted[m][p]));
            }
        }
    }
    acc
}
