//! Matrix tiles (Intel AMX): eight registers of at most 16 rows of 64 bytes, and the products of two of them.
//!
//! `hardware` runs the instructions, `emulated` computes to the bit what they do, so that kernels over [`Tiles`] are tested
//! on machines without AMX too; `trap` (tests) gives the instructions themselves to the emulation where the machine has
//! none.
//!
//! Quantized weights use them (`quant/tiles`). Weights of bf16 do not, though a f32 row as a sum of two bf16 would keep 16
//! bits in two products: a row's bits may not depend on how many rows there are, so one row would have to go the same way;
//! tiles want weights in pairs of columns, and those lie in rows here, mapped from checkpoints as they are.

#[cfg(test)]
mod emulated;
mod hardware;
#[cfg(test)]
mod tests;
#[cfg(all(test, target_os = "linux"))]
mod trap;

#[cfg(test)]
pub(crate) use emulated::Emulation;
pub(crate) use hardware::Amx;

/// The instructions: the processor's own, or where it has none with the emulation behind them.
#[cfg(test)]
pub(crate) fn instructions() -> Amx {
    #[cfg(target_os = "linux")]
    return Amx::detect().unwrap_or_else(Amx::trapped);
    #[cfg(not(target_os = "linux"))]
    Amx::detect().expect("elsewhere the emulation cannot stand in for the processor")
}

/// Tile registers.
pub(crate) const NUM_TILES: usize = 8;
/// Rows of a tile at most.
pub(crate) const MAX_ROWS: usize = 16;
/// Bytes of a tile's row at most.
pub(crate) const MAX_ROW_BYTES: usize = 64;

/// Where tiles come from. A value of the type proves that they can be used.
pub(crate) trait TileUnit: Copy {
    type Tiles: Tiles;

    /// Gives this thread tiles of these shapes, all zero, until they are dropped. Panics if it has some already.
    fn configure(self, config: &TileConfig) -> Self::Tiles;
}

/// The tiles of one thread. Tile numbers are below [`NUM_TILES`], or it does not compile. Where three tiles are named
/// (`C` += `A` · `B`) they differ, `A` has as many rows as `C`, `B` has rows as long as those of `C`, and a row of `A` has
/// four bytes for each row of `B`: what the processor demands. Row `k` of `B` holds what the numbers `k` of the rows of
/// `A` are multiplied with, in groups of four bytes for each output.
pub(crate) trait Tiles {
    fn zero<const T: usize>(&mut self);

    /// Row `r` becomes what starts at `from[r * stride]`. Panics if that is not all there.
    fn load<const T: usize>(&mut self, from: &[u8], stride: usize);

    /// The 32-bit numbers of row `r`, whether integers or the bits of f32, go to `to[r * stride..]`. Panics if there is no
    /// room.
    fn store<const T: usize>(&self, to: &mut [i32], stride: usize);

    /// Sums of four products of signed bytes of `A` with unsigned bytes of `B`, in 32 bits that wrap.
    fn dot_i8_u8<const C: usize, const A: usize, const B: usize>(&mut self);

    /// Sums of two products of bf16, in f32: products of even and of odd numbers are summed apart, each with one rounding per
    /// product, from zero; then the two sums, then `C`. Subnormal numbers, read or computed, are zero.
    fn dot_bf16<const C: usize, const A: usize, const B: usize>(&mut self);
}

/// Rows of each tile, and bytes of each row: what `ldtilecfg` reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C, align(64))]
pub(crate) struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

impl TileConfig {
    /// `(rows, bytes of a row)` of each tile; (0, 0) for one that is not used. Panics where the processor would fault.
    pub(crate) const fn new(shapes: [(usize, usize); NUM_TILES]) -> Self {
        let mut config = Self { palette: 1, start_row: 0, reserved: [0; 14], row_bytes: [0; 16], rows: [0; 16] };
        let mut tile = 0;
        while tile < NUM_TILES {
            let (rows, row_bytes) = shapes[tile];
            assert!(rows <= MAX_ROWS && row_bytes <= MAX_ROW_BYTES && (rows == 0) == (row_bytes == 0));
            config.rows[tile] = rows as u8;
            config.row_bytes[tile] = row_bytes as u16;
            tile += 1;
        }
        config
    }

    const fn rows(&self, tile: usize) -> usize {
        self.rows[tile] as usize
    }

    const fn row_bytes(&self, tile: usize) -> usize {
        self.row_bytes[tile] as usize
    }

    /// Panics unless `len` items hold the rows of a tile, `stride` items apart; a row has `row_len` of them.
    #[inline(always)]
    fn check_room(&self, tile: usize, (row_len, stride): (usize, usize), len: usize) {
        let rows = self.rows(tile);
        assert!(stride <= isize::MAX as usize / (4 * MAX_ROWS), "rows lie {stride} items apart");
        assert!(rows == 0 || (rows - 1) * stride + row_len <= len, "{rows} rows of {row_len} end past {len} items");
    }

    /// Panics unless the shapes of three tiles fit each other.
    #[inline(always)]
    fn check_dot(&self, c: usize, a: usize, b: usize) {
        assert!(c != a && c != b && a != b, "tiles {c}, {a} and {b} are not three");
        let fits = self.rows(a) == self.rows(c)
            && self.row_bytes(b) == self.row_bytes(c)
            && self.row_bytes(a) == 4 * self.rows(b)
            && self.row_bytes(c).is_multiple_of(4);
        assert!(fits, "tiles {c}, {a} and {b} do not fit: {self:?}");
    }
}
