//! Lanes as one AVX-512 register.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::avx2::sum_halves;
use super::{BYTES, Lanes, WIDTH};

/// Proof that the machine has AVX-512 F, BW, VL and VNNI (with AVX2, FMA and F16C). Without VL the compiler keeps vectors
/// whose halves are used in the lower 16 registers, and large tiles spill.
#[derive(Clone, Copy)]
pub(crate) struct Avx512(());

impl Avx512 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
            && is_x86_feature_detected!("avx512vnni")
            && is_x86_feature_detected!("avx2")
            && is_x86_feature_detected!("fma")
            && is_x86_feature_detected!("f16c"))
        .then_some(Self(()))
    }
}

/// One instruction of the set.
macro_rules! op {
    ($call:expr) => {{
        // SAFETY: `self` proves the features (`Avx512::detect`); memory operands are references to as many
        // elements as the operation reads or writes, and the unaligned forms are used.
        unsafe { $call }
    }};
}

impl Lanes for Avx512 {
    type V = __m512;
    type I = __m512i;
    type B = __m512i;

    const NUM_VECTORS: usize = 32;
    const DOTS_ANY_BYTE: bool = true;

    #[inline(always)]
    fn splat(self, value: f32) -> __m512 {
        op!(_mm512_set1_ps(value))
    }

    #[inline(always)]
    fn load(self, from: &[f32; WIDTH]) -> __m512 {
        op!(_mm512_loadu_ps(from.as_ptr()))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; WIDTH]) -> __m512 {
        let halves = op!(_mm256_loadu_si256(from.as_ptr().cast()));
        let words = op!(_mm512_cvtepu16_epi32(halves));
        let bits = op!(_mm512_slli_epi32::<16>(words));
        op!(_mm512_castsi512_ps(bits))
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; WIDTH]) -> __m512 {
        let halves = op!(_mm256_loadu_si256(from.as_ptr().cast()));
        op!(_mm512_cvtph_ps(halves))
    }

    #[inline(always)]
    fn store(self, v: __m512, to: &mut [f32; WIDTH]) {
        op!(_mm512_storeu_ps(to.as_mut_ptr(), v));
    }

    #[inline(always)]
    fn add(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_add_ps(a, b))
    }

    #[inline(always)]
    fn sub(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_sub_ps(a, b))
    }

    #[inline(always)]
    fn mul(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_mul_ps(a, b))
    }

    #[inline(always)]
    fn div(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_div_ps(a, b))
    }

    #[inline(always)]
    fn fma(self, a: __m512, b: __m512, c: __m512) -> __m512 {
        op!(_mm512_fmadd_ps(a, b, c))
    }

    #[inline(always)]
    fn max(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_max_ps(a, b))
    }

    #[inline(always)]
    fn min(self, a: __m512, b: __m512) -> __m512 {
        op!(_mm512_min_ps(a, b))
    }

    #[inline(always)]
    fn round(self, v: __m512) -> __m512 {
        op!(_mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(v))
    }

    #[inline(always)]
    fn scale_by_power(self, v: __m512, n: __m512) -> __m512 {
        let exponent = op!(_mm512_cvtps_epi32(n));
        let bias = op!(_mm512_set1_epi32(127));
        let biased = op!(_mm512_add_epi32(exponent, bias));
        let bits = op!(_mm512_slli_epi32::<23>(biased));
        let power = op!(_mm512_castsi512_ps(bits));
        op!(_mm512_mul_ps(v, power))
    }

    #[inline(always)]
    fn prefetch<T>(self, address: *const T) {
        op!(_mm_prefetch::<_MM_HINT_T0>(address.cast()));
    }

    #[inline(always)]
    fn prefetch_far<T>(self, address: *const T) {
        op!(_mm_prefetch::<_MM_HINT_T1>(address.cast()));
    }

    #[inline(always)]
    fn sum(self, v: __m512) -> f32 {
        let low = op!(_mm512_castps512_ps256(v));
        let wide = op!(_mm512_castps_pd(v));
        let high = op!(_mm512_extractf64x4_pd::<1>(wide));
        let high = op!(_mm256_castpd_ps(high));
        op!(sum_halves(low, high))
    }

    #[inline(always)]
    fn swap<const DISTANCE: usize>(self, v: __m512) -> __m512 {
        match DISTANCE {
            1 => op!(_mm512_permute_ps::<0b10_11_00_01>(v)),
            2 => op!(_mm512_permute_ps::<0b01_00_11_10>(v)),
            4 => op!(_mm512_shuffle_f32x4::<0b10_11_00_01>(v, v)),
            _ => op!(_mm512_shuffle_f32x4::<0b01_00_11_10>(v, v)),
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; WIDTH]) -> __m512 {
        let bytes = op!(_mm_loadu_si128(from.as_ptr().cast()));
        let words = op!(_mm512_cvtepu8_epi32(bytes));
        op!(_mm512_cvtepi32_ps(words))
    }

    #[inline(always)]
    fn splat_int(self, value: i32) -> __m512i {
        op!(_mm512_set1_epi32(value))
    }

    #[inline(always)]
    fn load_int(self, from: &[i32; WIDTH]) -> __m512i {
        op!(_mm512_loadu_si512(from.as_ptr().cast()))
    }

    #[inline(always)]
    fn add_int(self, a: __m512i, b: __m512i) -> __m512i {
        op!(_mm512_add_epi32(a, b))
    }

    #[inline(always)]
    fn sixteenth(self, v: __m512i) -> __m512i {
        op!(_mm512_srai_epi32::<4>(v))
    }

    #[inline(always)]
    fn int_to_float(self, v: __m512i) -> __m512 {
        op!(_mm512_cvtepi32_ps(v))
    }

    #[inline(always)]
    fn store_i8(self, v: __m512, to: &mut [i8; WIDTH]) {
        let words = op!(_mm512_cvtps_epi32(v));
        let bytes = op!(_mm512_cvtepi32_epi8(words));
        op!(_mm_storeu_si128(to.as_mut_ptr().cast(), bytes));
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; BYTES]) -> __m512i {
        op!(_mm512_loadu_si512(from.as_ptr().cast()))
    }

    #[inline(always)]
    fn store_bytes(self, v: __m512i, to: &mut [u8; BYTES]) {
        op!(_mm512_storeu_si512(to.as_mut_ptr().cast(), v));
    }

    #[inline(always)]
    fn low_nibbles(self, v: __m512i) -> __m512i {
        let mask = op!(_mm512_set1_epi8(15));
        op!(_mm512_and_si512(v, mask))
    }

    #[inline(always)]
    fn high_nibbles(self, v: __m512i) -> __m512i {
        let shifted = op!(_mm512_srli_epi16::<4>(v));
        self.low_nibbles(shifted)
    }

    #[inline(always)]
    fn lifted_nibbles(self, v: __m512i) -> __m512i {
        let mask = op!(_mm512_set1_epi8(15 << 4));
        op!(_mm512_and_si512(v, mask))
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], v: __m512i) -> __m512i {
        let table = op!(_mm_loadu_si128(table.as_ptr().cast()));
        let table = op!(_mm512_broadcast_i32x4(table));
        op!(_mm512_shuffle_epi8(table, v))
    }

    #[inline(always)]
    fn dot4(self, acc: __m512i, w: __m512i, x: [i8; 4]) -> __m512i {
        let x = op!(_mm512_set1_epi32(i32::from_le_bytes(x.map(i8::cast_unsigned))));
        op!(_mm512_dpbusd_epi32(acc, w, x))
    }
}
