//! The product of many input rows on matrix tiles: the integers of `block`, sixteen rows at a time, and behind them the
//! same steps in f32, so the same bits.

use std::cell::RefCell;

use super::activations::QuantizedRows;
use super::block::{Bytes, Decode, Fp4, Nibbles, PREFETCH_BYTES, QuantBlock, add_scaled};
use super::layout::{PANEL_ROWS, Panel};
use super::{Codes, MAX_GROUP};
use crate::amx::{MAX_ROW_BYTES, MAX_ROWS, TileConfig, TileUnit, Tiles};
use crate::dispatch::{self, Kernel};
use crate::lanes::{BYTES, Lanes, WIDTH};

/// From so many input rows on, a tile of sixteen costs less than a vector for each; reckoned from the two peaks, not measured.
pub(super) const MIN_ROWS: usize = 8;

/// Tiles of input rows that share the tiles of weights.
const ROW_TILES: usize = 3;
const BAND_ROWS: usize = ROW_TILES * MAX_ROWS;
/// Panels of weights that share a tile of input rows.
const PANELS: usize = 2;

/// What tiles give for one group: for each tile of rows and each panel, sums of sixteen rows.
type Sums = [[[[i32; WIDTH]; MAX_ROWS]; PANELS]; ROW_TILES];

/// Where tiles and vectors meet; in cache lines of its own, since rows of tiles are as long as they are.
#[repr(C, align(64))]
struct Scratch {
    /// Of the group that vectors scale, and of the next.
    sums: [Sums; 2],
    /// Weights of a group with one byte per code.
    expanded: [[[u8; BYTES]; MAX_GROUP / 4]; PANELS],
    /// A tile of input rows that do not lie at equal distances.
    gathered: [[u8; MAX_ROW_BYTES]; MAX_ROWS],
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const {
        RefCell::new(Scratch {
            sums: [[[[[0; WIDTH]; MAX_ROWS]; PANELS]; ROW_TILES]; 2],
            expanded: [[[0; BYTES]; MAX_GROUP / 4]; PANELS],
            gathered: [[0; MAX_ROW_BYTES]; MAX_ROWS],
        })
    };
}

/// Computes a block on tiles, and on the widest vectors of this machine.
pub(super) fn multiply<U: TileUnit>(block: QuantBlock<'_>, unit: U) {
    SCRATCH.with_borrow_mut(|scratch| dispatch::run_beside_tiles(TileBlock { block, unit, scratch }));
}

/// [`multiply`] on one instruction set.
#[cfg(test)]
pub(super) fn multiply_on<U: TileUnit>(isa: dispatch::Isa, block: QuantBlock<'_>, unit: U) {
    SCRATCH.with_borrow_mut(|scratch| isa.run(TileBlock { block, unit, scratch }));
}

struct TileBlock<'a, U> {
    block: QuantBlock<'a>,
    unit: U,
    scratch: &'a mut Scratch,
}

impl<U: TileUnit> Kernel for TileBlock<'_, U> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.block.layout.format.codes {
            Codes::Fp4 => self.bands::<L, Fp4>(lanes),
            codes if codes.are_nibbles() => self.bands::<L, Nibbles>(lanes),
            _ => self.bands::<L, Bytes>(lanes),
        }
    }
}

impl<U: TileUnit> TileBlock<'_, U> {
    #[inline(always)]
    fn bands<L: Lanes, D: Decode>(self, lanes: L) {
        let Self { block: QuantBlock { x, rows, layout, weight, outs, out }, unit, scratch } = self;
        // Tiles 0 to 3 are sums, 4 and 5 input rows, 6 and 7 weights.
        let inner = layout.format.group().min(MAX_ROW_BYTES);
        let (c, a, b) = ((MAX_ROWS, MAX_ROW_BYTES), (MAX_ROWS, inner), (inner / 4, MAX_ROW_BYTES));
        let mut tiles = unit.configure(&TileConfig::new([c, c, c, c, a, a, b, b]));
        let panels = outs.start / PANEL_ROWS..outs.end.div_ceil(PANEL_ROWS);
        let panel = |idx: usize| layout.panel(&weight[idx * layout.panel_bytes..]);
        for (rows, out) in rows.chunks(BAND_ROWS).zip(out.chunks_mut(BAND_ROWS * outs.len().max(1))) {
            for first in panels.clone().step_by(PANELS) {
                let wanted = |p: usize| {
                    let start = (first + p) * PANEL_ROWS;
                    (start, start.max(outs.start)..(start + PANEL_ROWS).min(outs.end))
                };
                let mut store = |p: usize, m: usize, values: &[f32; WIDTH]| {
                    let (start, wanted) = wanted(p);
                    let out = &mut out[m * outs.len()..(m + 1) * outs.len()];
                    out[wanted.start - outs.start..wanted.end - outs.start]
                        .copy_from_slice(&values[wanted.start - start..wanted.end - start]);
                };
                let context = (&mut tiles, &mut *scratch);
                if first + 1 < panels.end {
                    let band =
                        Band { x, codes: layout.format.codes, rows, panels: [panel(first), panel(first + 1)], inner };
                    band.compute::<L, D, U::Tiles>(lanes, context, &mut store);
                } else {
                    let band = Band { x, codes: layout.format.codes, rows, panels: [panel(first)], inner };
                    band.compute::<L, D, U::Tiles>(lanes, context, &mut store);
                }
            }
        }
    }
}

/// Up to [`BAND_ROWS`] input rows against `P` panels.
struct Band<'a, const P: usize> {
    x: &'a QuantizedRows,
    codes: Codes,
    rows: &'a [u32],
    panels: [Panel<'a>; P],
    /// Columns of a tile of input rows.
    inner: usize,
}

/// Sixteen rows or fewer against one group.
#[derive(Clone, Copy)]
struct Step<'a> {
    group_idx: usize,
    /// Whether the weights are not in their tiles yet.
    is_first: bool,
    rows: &'a [u32],
    weights: [&'a [u8]; PANELS],
}

impl<const P: usize> Band<'_, P> {
    /// Tiles work on a group while vectors scale the sums of the one before.
    #[inline(always)]
    fn compute<L: Lanes, D: Decode, T: Tiles>(
        &self,
        lanes: L,
        (tiles, scratch): (&mut T, &mut Scratch),
        store: &mut impl FnMut(usize, usize, &[f32; WIDTH]),
    ) {
        let Scratch { sums, expanded, gathered } = scratch;
        let mut acc = [[[0.0; WIDTH]; PANELS]; BAND_ROWS];
        let [mut ready, mut next] = sums.each_mut();
        for group_idx in 0..=self.x.num_groups {
            if group_idx < self.x.num_groups {
                let weights = self.weights::<L, D>(lanes, group_idx, expanded);
                let row_tiles = next.iter_mut().zip(self.rows.chunks(MAX_ROWS));
                for (row_tile, (sums, rows)) in row_tiles.enumerate() {
                    let step = Step { group_idx, is_first: row_tile == 0, rows, weights };
                    if row_tile % 2 == 0 {
                        self.multiply::<0, 1, 4, T>(tiles, step, gathered, sums);
                    } else {
                        self.multiply::<2, 3, 5, T>(tiles, step, gathered, sums);
                    }
                }
            }
            if group_idx > 0 {
                self.scale(lanes, group_idx - 1, ready, &mut acc);
            }
            std::mem::swap(&mut ready, &mut next);
        }
        for (m, acc) in acc[..self.rows.len()].iter().enumerate() {
            for (p, panel) in self.panels.iter().enumerate() {
                let mut values = [0.0; WIDTH];
                lanes.store(lanes.mul(lanes.load(&acc[p]), lanes.load(panel.factors)), &mut values);
                store(p, m, &values);
            }
        }
    }

    /// The weights of a group, four columns of sixteen rows after each other, and the next ones asked for.
    #[inline(always)]
    fn weights<'b, L: Lanes, D: Decode>(
        &'b self,
        lanes: L,
        group_idx: usize,
        expanded: &'b mut [[[u8; BYTES]; MAX_GROUP / 4]; PANELS],
    ) -> [&'b [u8]; PANELS] {
        let vectors = self.x.form.group / 4 / D::VECTORS;
        let mut weights: [&[u8]; PANELS] = [&[]; PANELS];
        for (p, expanded) in expanded.iter_mut().enumerate().take(P) {
            let codes = &self.panels[p].codes[group_idx * vectors..(group_idx + 1) * vectors];
            for codes in codes {
                lanes.prefetch_far(codes.as_ptr().wrapping_add(P * PREFETCH_BYTES));
            }
            weights[p] = if D::VECTORS == 1 {
                codes.as_flattened()
            } else {
                for (codes, expanded) in codes.iter().zip(expanded.as_chunks_mut::<2>().0) {
                    let decoded = D::decode(lanes, codes);
                    lanes.store_bytes(decoded[0], &mut expanded[0]);
                    lanes.store_bytes(decoded[1], &mut expanded[1]);
                }
                expanded.as_flattened()
            };
        }
        weights
    }

    /// The integer products of sixteen rows with one group.
    #[inline(always)]
    fn multiply<const C0: usize, const C1: usize, const A: usize, T: Tiles>(
        &self,
        tiles: &mut T,
        step: Step<'_>,
        gathered: &mut [[u8; MAX_ROW_BYTES]; MAX_ROWS],
        sums: &mut [[[i32; WIDTH]; MAX_ROWS]; PANELS],
    ) {
        let group = self.x.form.group;
        tiles.zero::<C0>();
        if P == 2 {
            tiles.zero::<C1>();
        }
        for first in (0..group).step_by(self.inner) {
            // Where a group is one step, its weights stay in their tiles for all rows.
            if step.is_first || self.inner < group {
                tiles.load::<6>(&step.weights[0][first * PANEL_ROWS..], BYTES);
                if P == 2 {
                    tiles.load::<7>(&step.weights[1][first * PANEL_ROWS..], BYTES);
                }
            }
            self.load_rows::<A, T>(tiles, step.rows, step.group_idx * group + first, gathered);
            tiles.dot_i8_u8::<C0, A, 6>();
            if P == 2 {
                tiles.dot_i8_u8::<C1, A, 7>();
            }
        }
        tiles.store::<C0>(sums[0].as_flattened_mut(), WIDTH);
        if P == 2 {
            tiles.store::<C1>(sums[1].as_flattened_mut(), WIDTH);
        }
    }

    /// From where they are if there are sixteen at equal distances, as most ops have them.
    #[inline(always)]
    fn load_rows<const A: usize, T: Tiles>(
        &self,
        tiles: &mut T,
        rows: &[u32],
        first_col: usize,
        gathered: &mut [[u8; MAX_ROW_BYTES]; MAX_ROWS],
    ) {
        let (bytes, row_bytes) = self.x.bytes_from(rows[0] as usize);
        match distance(rows) {
            Some(distance) => tiles.load::<A>(&bytes[first_col..], distance * row_bytes),
            None => {
                // Rows that there are none of are multiplied too, whatever is there, and not looked at.
                for (gathered, &row) in gathered.iter_mut().zip(rows) {
                    let (bytes, _) = self.x.bytes_from(row as usize);
                    gathered[..self.inner].copy_from_slice(&bytes[first_col..first_col + self.inner]);
                }
                tiles.load::<A>(gathered.as_flattened(), MAX_ROW_BYTES);
            }
        }
    }

    /// What `block` does with the sums of a group.
    #[inline(always)]
    fn scale<L: Lanes>(&self, lanes: L, group_idx: usize, sums: &Sums, acc: &mut [[[f32; WIDTH]; PANELS]; BAND_ROWS]) {
        let has_min = self.codes.have_min();
        let scales = self.panels.map(|panel| panel.scales(lanes, group_idx));
        for (m, (&row, acc)) in self.rows.iter().zip(acc).enumerate() {
            let terms = self.x.terms(row as usize)[group_idx];
            let offset = lanes.splat_int(-self.codes.offset() * terms.sum);
            for p in 0..P {
                let sum = lanes.add_int(lanes.load_int(&sums[m / MAX_ROWS][p][m % MAX_ROWS]), offset);
                let v = add_scaled(lanes, lanes.load(&acc[p]), sum, scales[p], (&terms, has_min));
                lanes.store(v, &mut acc[p]);
            }
        }
    }
}

/// From each of sixteen rows to the next, if it is the same everywhere.
fn distance(rows: &[u32]) -> Option<usize> {
    let distance = rows.get(1)?.checked_sub(rows[0])?;
    let is_even = rows.len() == MAX_ROWS && rows.windows(2).all(|pair| pair[1].checked_sub(pair[0]) == Some(distance));
    is_even.then_some(distance as usize)
}
