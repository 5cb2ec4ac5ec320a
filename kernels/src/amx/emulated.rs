//! Tiles in plain Rust, as Intel's Software Developer's Manual (volume 2, TDPB* and TDPBF16PS) defines them.

use half::bf16;

use super::{MAX_ROW_BYTES, MAX_ROWS, NUM_TILES, TileConfig, TileUnit, Tiles};

/// Needs nothing of the machine.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Emulation;

impl TileUnit for Emulation {
    type Tiles = Emulated;

    fn configure(self, config: &TileConfig) -> Emulated {
        Emulated::new(*config)
    }
}

type Tile = [[u8; MAX_ROW_BYTES]; MAX_ROWS];

const ZERO: Tile = [[0; MAX_ROW_BYTES]; MAX_ROWS];

/// Eight tiles in memory; bytes outside a tile's shape are zero.
#[derive(Debug)]
pub(crate) struct Emulated {
    config: TileConfig,
    tiles: [Tile; NUM_TILES],
}

impl Emulated {
    pub(crate) const fn new(config: TileConfig) -> Self {
        Self { config, tiles: [ZERO; NUM_TILES] }
    }

    pub(super) fn row_bytes(&self, tile: usize) -> usize {
        self.config.row_bytes(tile)
    }

    pub(super) fn rows(&self, tile: usize) -> usize {
        self.config.rows(tile)
    }

    pub(super) fn row(&self, tile: usize, row: usize) -> &[u8] {
        &self.tiles[tile][row][..self.config.row_bytes(tile)]
    }

    pub(super) fn set_row(&mut self, tile: usize, row: usize, bytes: &[u8]) {
        self.tiles[tile][row][..bytes.len()].copy_from_slice(bytes);
    }

    pub(super) fn zero_tile(&mut self, tile: usize) {
        self.tiles[tile] = ZERO;
    }

    pub(super) fn dot_i8_u8_of(&mut self, [c, a, b]: [usize; 3]) {
        self.config.check_dot(c, a, b);
        for m in 0..self.rows(c) {
            for n in 0..self.row_bytes(c) / 4 {
                let mut sum = i32::from_le_bytes(quad(&self.tiles[c][m], n));
                for k in 0..self.rows(b) {
                    let pairs = quad(&self.tiles[a][m], k).into_iter().zip(quad(&self.tiles[b][k], n));
                    sum = pairs.fold(sum, |sum, (x, w)| sum.wrapping_add(i32::from(x as i8) * i32::from(w)));
                }
                self.tiles[c][m][4 * n..4 * n + 4].copy_from_slice(&sum.to_le_bytes());
            }
        }
    }

    pub(super) fn dot_bf16_of(&mut self, [c, a, b]: [usize; 3]) {
        self.config.check_dot(c, a, b);
        for m in 0..self.rows(c) {
            for n in 0..self.row_bytes(c) / 4 {
                let mut sums = [0.0; 2];
                for k in 0..self.rows(b) {
                    let (x, w) = (pair(&self.tiles[a][m], k), pair(&self.tiles[b][k], n));
                    sums = std::array::from_fn(|i| fma(x[i], w[i], sums[i]));
                }
                let old = f32::from_le_bytes(quad(&self.tiles[c][m], n));
                let new = fma(old, 1.0, fma(sums[0], 1.0, sums[1]));
                self.tiles[c][m][4 * n..4 * n + 4].copy_from_slice(&new.to_le_bytes());
            }
        }
    }
}

impl Tiles for Emulated {
    fn zero<const T: usize>(&mut self) {
        self.zero_tile(T);
    }

    fn load<const T: usize>(&mut self, from: &[u8], stride: usize) {
        let row_bytes = self.row_bytes(T);
        self.config.check_room(T, (row_bytes, stride), from.len());
        self.zero_tile(T);
        for row in 0..self.rows(T) {
            self.set_row(T, row, &from[row * stride..row * stride + row_bytes]);
        }
    }

    fn store<const T: usize>(&self, to: &mut [i32], stride: usize) {
        self.config.check_room(T, (self.row_bytes(T).div_ceil(4), stride), to.len());
        for row in 0..self.rows(T) {
            let (words, _) = self.row(T, row).as_chunks();
            let target = &mut to[row * stride..];
            target.iter_mut().zip(words).for_each(|(to, word)| *to = i32::from_le_bytes(*word));
        }
    }

    fn dot_i8_u8<const C: usize, const A: usize, const B: usize>(&mut self) {
        self.dot_i8_u8_of([C, A, B]);
    }

    fn dot_bf16<const C: usize, const A: usize, const B: usize>(&mut self) {
        self.dot_bf16_of([C, A, B]);
    }
}

fn quad(row: &[u8; MAX_ROW_BYTES], idx: usize) -> [u8; 4] {
    row.as_chunks().0[idx]
}

fn pair(row: &[u8; MAX_ROW_BYTES], idx: usize) -> [f32; 2] {
    let [a, b, c, d] = quad(row, idx);
    [[a, b], [c, d]].map(|bytes| bf16::from_le_bytes(bytes).to_f32())
}

/// `a * b + c`, rounded once to nearest even, with subnormal operands and results as zeros of their sign.
pub(super) fn fma(a: f32, b: f32, c: f32) -> f32 {
    let flush = |x: f32| if x.is_subnormal() { 0f32.copysign(x) } else { x };
    let (a, b, c) = (flush(a), flush(b), flush(c));
    let sum = a.mul_add(b, c);
    if sum.abs() != f32::MIN_POSITIVE {
        return flush(sum);
    }
    // The least normal number is flushed too if it came out only because subnormals have fewer bits to round to.
    const UP: f32 = (1u128 << 64) as f32;
    let (small, large) = if a.abs() < b.abs() { (a, b) } else { (b, a) };
    if (small * UP).mul_add(large, c * UP).abs() < f32::MIN_POSITIVE * UP { 0f32.copysign(sum) } else { sum }
}
