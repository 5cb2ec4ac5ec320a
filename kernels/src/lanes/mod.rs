//! Sixteen lanes of f32 or i32: one source of arithmetic that gives the same bits on every instruction set.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod dot;
mod math;
mod portable;
#[cfg(test)]
mod tests;

use half::{bf16, f16};

use crate::memory::Plain;

#[cfg(target_arch = "x86_64")]
pub(crate) use avx2::Avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) use avx512::Avx512;
pub(crate) use dot::{dot_tile, dot_tile_streamed};
pub(crate) use math::{exp_scaled, exp_sum, max, silu_mul, softmax, sum_of_squares};
pub(crate) use portable::Portable;

/// Lanes of a vector on every instruction set; what makes reduction orders equal everywhere.
pub(crate) const WIDTH: usize = 16;
/// Bytes of a vector of bytes: four for each lane.
pub(crate) const BYTES: usize = 4 * WIDTH;

/// Arithmetic on 16 lanes. A value of the type proves that the machine has the instructions.
pub(crate) trait Lanes: Copy {
    type V: Copy;
    /// An i32 per lane.
    type I: Copy;
    /// Four bytes per lane.
    type B: Copy;

    /// Vectors that fit the register file; tiles are sized by it.
    const NUM_VECTORS: usize;
    /// Whether [`Self::dot8_small`] costs no less than [`Self::dot4`] twice.
    const DOTS_ANY_BYTE: bool;

    fn splat(self, value: f32) -> Self::V;
    fn load(self, from: &[f32; WIDTH]) -> Self::V;
    fn load_bf16(self, from: &[bf16; WIDTH]) -> Self::V;
    fn load_f16(self, from: &[f16; WIDTH]) -> Self::V;
    fn store(self, v: Self::V, to: &mut [f32; WIDTH]);
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c`, rounded once.
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// The larger; `b` if either is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// The smaller; `b` if either is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// To the nearest integer, ties to even.
    fn round(self, v: Self::V) -> Self::V;
    /// `v * 2^n` for integers `n` in -126..=127.
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V;
    /// Asks for the cache line of an address, which need not be mapped.
    fn prefetch<T>(self, address: *const T);
    /// The same into the second-level cache. For what is read from memory once: more lines can be on their way there than to
    /// the first level, which has too few places to hide the way from memory.
    fn prefetch_far<T>(self, address: *const T);
    /// Adds lanes 8 apart, then 4, 2 and 1 apart.
    fn sum(self, v: Self::V) -> f32;

    /// The vector with lanes this far apart in each other's place: 1, 2, 4 or 8.
    fn swap<const DISTANCE: usize>(self, v: Self::V) -> Self::V;
    fn load_u8(self, from: &[u8; WIDTH]) -> Self::V;

    fn splat_int(self, value: i32) -> Self::I;
    fn load_int(self, from: &[i32; WIDTH]) -> Self::I;
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I;
    /// Of multiples of 16 the 16th part.
    fn sixteenth(self, v: Self::I) -> Self::I;
    /// To the nearest f32, which is exact below 2^24.
    fn int_to_float(self, v: Self::I) -> Self::V;
    /// To the nearest integers, ties to even, for numbers within ±127.
    fn store_i8(self, v: Self::V, to: &mut [i8; WIDTH]);
    fn load_bytes(self, from: &[u8; BYTES]) -> Self::B;
    fn store_bytes(self, v: Self::B, to: &mut [u8; BYTES]);
    /// Of each byte the lower four bits.
    fn low_nibbles(self, v: Self::B) -> Self::B;
    /// Of each byte the upper four bits.
    fn high_nibbles(self, v: Self::B) -> Self::B;
    /// The same times 16: where they are.
    fn lifted_nibbles(self, v: Self::B) -> Self::B;
    /// Entry `v[i]` of the table for each byte, all below 16.
    fn look_up(self, table: &[u8; 16], v: Self::B) -> Self::B;
    /// Adds to each lane its four unsigned bytes of `w` times the four signed ones of `x`, exactly.
    fn dot4(self, acc: Self::I, w: Self::B, x: [i8; 4]) -> Self::I;
    /// [`Self::dot4`] of the first and of the second, where the bytes of `w` are below 64 and those of `x` within ±127.
    #[inline(always)]
    fn dot8_small(self, acc: Self::I, w: [Self::B; 2], x: [[i8; 4]; 2]) -> Self::I {
        self.dot4(self.dot4(acc, w[0], x[0]), w[1], x[1])
    }
}

/// A number that is widened to f32 when loaded.
pub(crate) trait Element: Plain {
    const ZERO: Self;

    fn load<L: Lanes>(lanes: L, from: &[Self; WIDTH]) -> L::V;
}

impl Element for f32 {
    const ZERO: Self = 0.0;

    #[inline(always)]
    fn load<L: Lanes>(lanes: L, from: &[Self; WIDTH]) -> L::V {
        lanes.load(from)
    }
}

impl Element for bf16 {
    const ZERO: Self = Self::ZERO;

    #[inline(always)]
    fn load<L: Lanes>(lanes: L, from: &[Self; WIDTH]) -> L::V {
        lanes.load_bf16(from)
    }
}

impl Element for f16 {
    const ZERO: Self = Self::ZERO;

    #[inline(always)]
    fn load<L: Lanes>(lanes: L, from: &[Self; WIDTH]) -> L::V {
        lanes.load_f16(from)
    }
}

/// Loads fewer than 16 elements, zeros behind them.
#[inline(always)]
pub(crate) fn load_tail<L: Lanes, E: Element>(lanes: L, from: &[E]) -> L::V {
    let mut padded = [E::ZERO; WIDTH];
    padded[..from.len()].copy_from_slice(from);
    E::load(lanes, &padded)
}

/// Stores as many lanes as the target is long, at most 16.
#[inline(always)]
pub(crate) fn store_tail<L: Lanes>(lanes: L, v: L::V, to: &mut [f32]) {
    let mut padded = [0.0; WIDTH];
    lanes.store(v, &mut padded);
    to.copy_from_slice(&padded[..to.len()]);
}
