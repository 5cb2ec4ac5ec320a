//! The product of many input rows on matrix tiles: the integers of `block`, sixteen rows at a time, and behind them the
//! same steps in f32, so the same bits.

use super::Codes;
use super::activations::QuantizedRows;
use super::block::{Bytes, BytesMin, Decode, Fp4, Nibbles, NibblesMin, QuantBlock};
use super::layout::{PANEL_ROWS, Panel};
use crate::amx::{MAX_ROW_BYTES, MAX_ROWS, TileConfig, TileUnit, Tiles};
use crate::dispatch::Kernel;
use crate::lanes::{BYTES, Lanes, WIDTH};

/// From so many input rows on, a tile of sixteen costs less than a vector for each; reckoned from the two peaks, not measured.
pub(super) const MIN_ROWS: usize = 8;

/// Tiles of input rows that share the tiles of weights.
const ROW_TILES: usize = 3;
const BAND_ROWS: usize = ROW_TILES * MAX_ROWS;
/// Panels of weights that share a tile of input rows.
const PANELS: usize = 2;
/// Columns of the largest group.
const MAX_GROUP: usize = 128;

/// A [`QuantBlock`] to compute on tiles.
pub(super) struct TileBlock<'a, U> {
    pub(super) block: QuantBlock<'a>,
    pub(super) unit: U,
}

impl<U: TileUnit> Kernel for TileBlock<'_, U> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        match self.block.layout.format.codes {
            Codes::Int8 => self.bands::<L, Bytes>(lanes),
            Codes::Int8Min => self.bands::<L, BytesMin>(lanes),
            Codes::Int4 => self.bands::<L, Nibbles>(lanes),
            Codes::Int4Min => self.bands::<L, NibblesMin>(lanes),
            Codes::Fp4 => self.bands::<L, Fp4>(lanes),
        }
    }
}

impl<U: TileUnit> TileBlock<'_, U> {
    #[inline(always)]
    fn bands<L: Lanes, D: Decode>(self, lanes: L) {
        let Self { block: QuantBlock { x, rows, layout, weight, outs, out }, unit } = self;
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
                if first + 1 < panels.end {
                    let band = Band { x, rows, panels: [panel(first), panel(first + 1)], inner };
                    band.compute::<L, D, U::Tiles>(lanes, &mut tiles, &mut store);
                } else {
                    let band = Band { x, rows, panels: [panel(first)], inner };
                    band.compute::<L, D, U::Tiles>(lanes, &mut tiles, &mut store);
                }
            }
        }
    }
}

/// Up to [`BAND_ROWS`] input rows against `P` panels.
struct Band<'a, const P: usize> {
    x: &'a QuantizedRows,
    rows: &'a [u32],
    panels: [Panel<'a>; P],
    /// Columns of a tile of input rows.
    inner: usize,
}

/// What tiles give for one group: for each tile of rows and each panel, sums of sixteen rows.
type Sums = [[[[i32; WIDTH]; MAX_ROWS]; PANELS]; ROW_TILES];

/// Weights of a group with one byte per code.
type Expanded = [[[u8; BYTES]; MAX_GROUP / 4]; PANELS];

/// A tile of input rows, gathered.
type Gathered = [[u8; MAX_ROW_BYTES]; MAX_ROWS];

impl<const P: usize> Band<'_, P> {
    /// Tiles work on a group while vectors scale the sums of the one before.
    #[inline(always)]
    fn compute<L: Lanes, D: Decode, T: Tiles>(
        &self,
        lanes: L,
        tiles: &mut T,
        store: &mut impl FnMut(usize, usize, &[f32; WIDTH]),
    ) {
        let mut sums: [Sums; 2] = [[[[[0; WIDTH]; MAX_ROWS]; PANELS]; ROW_TILES]; 2];
        let mut acc = [[[0.0; WIDTH]; PANELS]; BAND_ROWS];
        let [mut ready, mut next] = sums.each_mut();
        for group_idx in 0..=self.x.num_groups {
            if group_idx < self.x.num_groups {
                self.multiply::<L, D, T>(lanes, tiles, group_idx, next);
            }
            if group_idx > 0 {
                self.scale::<L, D>(lanes, group_idx - 1, ready, &mut acc);
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

    /// The integer products of one group.
    #[inline(always)]
    fn multiply<L: Lanes, D: Decode, T: Tiles>(&self, lanes: L, tiles: &mut T, group_idx: usize, sums: &mut Sums) {
        let vectors = self.x.group / 4 / D::VECTORS;
        let mut expanded: Expanded = [[[0; BYTES]; MAX_GROUP / 4]; PANELS];
        let mut weights: [&[u8]; PANELS] = [&[]; PANELS];
        for (p, expanded) in expanded.iter_mut().enumerate().take(P) {
            let codes = &self.panels[p].codes[group_idx * vectors..(group_idx + 1) * vectors];
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
        for (row_tile, sums) in sums.iter_mut().enumerate().take(self.rows.len().div_ceil(MAX_ROWS)) {
            if row_tile % 2 == 0 {
                self.row_tile::<0, 1, 4, T>(tiles, (row_tile, group_idx), weights, sums);
            } else {
                self.row_tile::<2, 3, 5, T>(tiles, (row_tile, group_idx), weights, sums);
            }
        }
    }

    #[inline(always)]
    fn row_tile<const C0: usize, const C1: usize, const A: usize, T: Tiles>(
        &self,
        tiles: &mut T,
        (row_tile, group_idx): (usize, usize),
        weights: [&[u8]; PANELS],
        sums: &mut [[[i32; WIDTH]; MAX_ROWS]; PANELS],
    ) {
        let rows = &self.rows[row_tile * MAX_ROWS..self.rows.len().min((row_tile + 1) * MAX_ROWS)];
        let group = self.x.group;
        tiles.zero::<C0>();
        if P == 2 {
            tiles.zero::<C1>();
        }
        for first in (0..group).step_by(self.inner) {
            // Where a group is one step, its weights stay in their tiles for all rows.
            if row_tile == 0 || self.inner < group {
                tiles.load::<6>(&weights[0][first * PANEL_ROWS..], BYTES);
                if P == 2 {
                    tiles.load::<7>(&weights[1][first * PANEL_ROWS..], BYTES);
                }
            }
            self.load_rows::<A, T>(tiles, rows, group_idx * group + first);
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
    fn load_rows<const A: usize, T: Tiles>(&self, tiles: &mut T, rows: &[u32], first_col: usize) {
        let (bytes, row_bytes) = self.x.bytes_from(rows[0] as usize);
        match distance(rows) {
            Some(distance) => tiles.load::<A>(&bytes[first_col..], distance * row_bytes),
            None => {
                let mut gathered: Gathered = [[0; MAX_ROW_BYTES]; MAX_ROWS];
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
    fn scale<L: Lanes, D: Decode>(
        &self,
        lanes: L,
        group_idx: usize,
        sums: &Sums,
        acc: &mut [[[f32; WIDTH]; PANELS]; BAND_ROWS],
    ) {
        let scale_idx = if D::HAS_MIN { 2 * group_idx } else { group_idx };
        let scales = self.panels.map(|panel| lanes.load_f16(&panel.scales[scale_idx]));
        // Read, but not used, where there is no minimum.
        let mins = self.panels.map(|panel| lanes.load_f16(&panel.scales[scale_idx + usize::from(D::HAS_MIN)]));
        for (m, (&row, acc)) in self.rows.iter().zip(acc).enumerate() {
            let terms = self.x.terms(row as usize)[group_idx];
            let (x_scale, offset) = (lanes.splat(terms.scale), lanes.splat_int(-D::CODES.offset() * terms.sum));
            let x_sum = lanes.splat(terms.scale * terms.sum as f32);
            for p in 0..P {
                let sum = lanes.add_int(lanes.load_int(&sums[m / MAX_ROWS][p][m % MAX_ROWS]), offset);
                let mut v = lanes.load(&acc[p]);
                v = lanes.fma(lanes.int_to_float(sum), lanes.mul(scales[p], x_scale), v);
                if D::HAS_MIN {
                    v = lanes.fma(mins[p], x_sum, v);
                }
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
