//! Matrix units of the processor, each kept busy from its registers alone.

use std::hint::black_box;

#[cfg(target_arch = "x86_64")]
use crate::amx::{Amx, MAX_ROW_BYTES, MAX_ROWS, TileConfig, TileUnit, Tiles};
use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, WIDTH};

/// What multiplies and adds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MatrixUnit {
    /// Fused multiply-add of f32 vectors, on the instruction set in use.
    FmaF32,
    /// `vdpbf16ps`: AVX-512 BF16.
    VectorBf16,
    /// `vpdpbusd`: AVX-512 VNNI.
    VectorInt8,
    /// `tdpbf16ps`: AMX.
    TileBf16,
    /// `tdpbsud`: AMX.
    TileInt8,
    /// `mma.sync` of bf16, of a CUDA device.
    TensorBf16,
    /// `mma.sync` of bytes, of a CUDA device.
    TensorInt8,
}

impl MatrixUnit {
    /// The name used in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::FmaF32 => "f32 FMA",
            Self::VectorBf16 => "AVX-512 BF16",
            Self::VectorInt8 => "AVX-512 VNNI int8",
            Self::TileBf16 => "AMX bf16",
            Self::TileInt8 => "AMX int8",
            Self::TensorBf16 => "mma bf16",
            Self::TensorInt8 => "mma int8",
        }
    }

    /// Those of the processor.
    pub(super) fn available() -> Vec<Self> {
        let mut units = vec![Self::FmaF32];
        #[cfg(target_arch = "x86_64")]
        {
            let has_avx512 = is_x86_feature_detected!("avx512f");
            units.extend((has_avx512 && is_x86_feature_detected!("avx512bf16")).then_some(Self::VectorBf16));
            units.extend((has_avx512 && is_x86_feature_detected!("avx512vnni")).then_some(Self::VectorInt8));
            if Amx::detect().is_some() {
                units.extend([Self::TileBf16, Self::TileInt8]);
            }
        }
        units
    }

    /// Operations of one thread, of which the unit did so many; a few milliseconds. The unit is an available one.
    pub(super) fn spin(self) -> f64 {
        match self {
            Self::FmaF32 => dispatch::run(FmaLoop),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the unit is available only with these features.
            Self::VectorBf16 => unsafe { x86::bf16_loop() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: the unit is available only with these features.
            Self::VectorInt8 => unsafe { x86::int8_loop() },
            #[cfg(target_arch = "x86_64")]
            Self::TileBf16 | Self::TileInt8 => {
                let amx = Amx::detect().expect("the unit is available only where tiles are");
                tile_loop(amx, TileLoop { rounds: 100_000, is_bf16: self == Self::TileBf16 })
            }
            _ => unreachable!("the unit is not one of this processor"),
        }
    }
}

const ROUNDS: usize = 500_000;

struct FmaLoop;

impl Kernel for FmaLoop {
    type Output = f64;

    /// Chains enough to hide the latency of two units of the widest machines, few enough to stay in registers.
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> f64 {
        if L::NUM_VECTORS >= 32 { fma_loop::<L, 12>(lanes) } else { fma_loop::<L, 6>(lanes) }
    }
}

#[inline(always)]
fn fma_loop<L: Lanes, const CHAINS: usize>(lanes: L) -> f64 {
    // Starts that the compiler cannot know to be equal, or it would compute one chain only.
    let mut sums: [L::V; CHAINS] = std::array::from_fn(|chain| lanes.splat(black_box(chain as f32)));
    let factor = lanes.splat(black_box(0.5));
    for _ in 0..ROUNDS {
        for sum in &mut sums {
            *sum = lanes.fma(*sum, factor, factor);
        }
    }
    black_box(sums.map(|sum| lanes.sum(sum)));
    (ROUNDS * CHAINS * WIDTH * 2) as f64
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    //! Loops over instructions that [`Lanes`](crate::lanes::Lanes) do not have.

    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::ROUNDS;

    const CHAINS: usize = 12;

    #[target_feature(enable = "avx512f,avx512bf16")]
    pub(super) fn bf16_loop() -> f64 {
        let mut sums: [__m512; CHAINS] = std::array::from_fn(|chain| _mm512_set1_ps(black_box(chain as f32)));
        let ones = _mm512_cvtne2ps_pbh(_mm512_set1_ps(black_box(1.0)), _mm512_set1_ps(black_box(1.0)));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, ones, ones);
            }
        }
        black_box(sums.map(|sum| _mm512_reduce_add_ps(sum)));
        (ROUNDS * CHAINS * 32 * 2) as f64
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    pub(super) fn int8_loop() -> f64 {
        let mut sums: [__m512i; CHAINS] = std::array::from_fn(|chain| _mm512_set1_epi32(black_box(chain as i32)));
        let ones = _mm512_set1_epi8(black_box(1));
        for _ in 0..ROUNDS {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, ones, ones);
            }
        }
        black_box(sums.map(|sum| _mm512_reduce_add_epi32(sum)));
        (ROUNDS * CHAINS * 64 * 2) as f64
    }
}

#[cfg(target_arch = "x86_64")]
#[derive(Clone, Copy)]
struct TileLoop {
    rounds: usize,
    is_bf16: bool,
}

/// Four products of full tiles a round: two inputs with two weights, as a kernel has them. Panics if the sums are wrong.
#[cfg(target_arch = "x86_64")]
fn tile_loop<U: TileUnit>(unit: U, TileLoop { rounds, is_bf16 }: TileLoop) -> f64 {
    const FULL: TileConfig = TileConfig::new([(MAX_ROWS, MAX_ROW_BYTES); 8]);
    const INNER: usize = MAX_ROW_BYTES / 4;
    // 1.0 as bf16, or ones and zeros as bytes.
    let bytes: Vec<u8> = if is_bf16 { [0x80, 0x3f] } else { [1, 0] }.repeat(MAX_ROWS * MAX_ROW_BYTES / 2);
    let mut tiles = unit.configure(&FULL);
    tiles.load::<4>(&bytes, MAX_ROW_BYTES);
    tiles.load::<5>(&bytes, MAX_ROW_BYTES);
    tiles.load::<6>(&bytes, MAX_ROW_BYTES);
    tiles.load::<7>(&bytes, MAX_ROW_BYTES);
    tiles.zero::<0>();
    tiles.zero::<1>();
    tiles.zero::<2>();
    tiles.zero::<3>();
    for _ in 0..rounds {
        if is_bf16 {
            tiles.dot_bf16::<0, 4, 6>();
            tiles.dot_bf16::<1, 4, 7>();
            tiles.dot_bf16::<2, 5, 6>();
            tiles.dot_bf16::<3, 5, 7>();
        } else {
            tiles.dot_i8_u8::<0, 4, 6>();
            tiles.dot_i8_u8::<1, 4, 7>();
            tiles.dot_i8_u8::<2, 5, 6>();
            tiles.dot_i8_u8::<3, 5, 7>();
        }
    }
    let mut sums = [0; MAX_ROWS * INNER];
    tiles.store::<3>(&mut sums, INNER);
    let expected = 2 * rounds * INNER;
    let found = if is_bf16 { f64::from(f32::from_bits(i32::cast_unsigned(sums[17]))) } else { f64::from(sums[17]) };
    assert_eq!(found, expected as f64, "tiles multiply wrong");
    let per_product = MAX_ROWS * INNER * MAX_ROW_BYTES * 2 / if is_bf16 { 2 } else { 1 };
    (rounds * 4 * per_product) as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_unit_of_this_machine_spins() {
        for unit in MatrixUnit::available() {
            assert!(unit.spin() > 1e6, "{}", unit.name());
        }
    }

    #[cfg(target_arch = "x86_64")]
    #[test]
    fn tile_loops_sum_right_and_count_their_operations() {
        for (is_bf16, expected) in [(false, 3.0 * 4.0 * 32768.0), (true, 3.0 * 4.0 * 16384.0)] {
            assert_eq!(tile_loop(crate::amx::Emulation, TileLoop { rounds: 3, is_bf16 }), expected);
        }
    }
}
