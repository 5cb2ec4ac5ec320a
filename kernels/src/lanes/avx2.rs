//! Lanes as two AVX registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{BYTES, Lanes, WIDTH};

/// Proof that the machine has AVX2, FMA and F16C.
#[derive(Clone, Copy)]
pub(crate) struct Avx2(());

impl Avx2 {
    pub(crate) fn detect() -> Option<Self> {
        (is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") && is_x86_feature_detected!("f16c"))
            .then_some(Self(()))
    }
}

/// One instruction of the set.
macro_rules! op {
    ($call:expr) => {{
        // SAFETY: `self` proves the features (`Avx2::detect`); memory operands are references to as many elements
        // as the operation reads or writes, and the unaligned forms are used.
        unsafe { $call }
    }};
}

/// The two halves of 16 elements.
#[inline(always)]
fn split<T>(from: &[T; WIDTH]) -> (&[T; 8], &[T; 8]) {
    let (low, high) = from.split_at(8);
    (low.try_into().expect("8 of 16"), high.try_into().expect("8 of 16"))
}

/// The order of [`Lanes::sum`]: lanes 8 apart, then 4, 2 and 1.
#[inline]
#[target_feature(enable = "avx")]
pub(super) fn sum_halves(low: __m256, high: __m256) -> f32 {
    let eight = _mm256_add_ps(low, high);
    let four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps::<1>(eight));
    let two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    let one = _mm_add_ss(two, _mm_shuffle_ps::<1>(two, two));
    _mm_cvtss_f32(one)
}

#[inline]
#[target_feature(enable = "avx2")]
fn widen_bf16(halves: __m128i) -> __m256 {
    _mm256_castsi256_ps(_mm256_slli_epi32::<16>(_mm256_cvtepu16_epi32(halves)))
}

#[inline]
#[target_feature(enable = "avx2")]
fn scale_by_power(v: __m256, n: __m256) -> __m256 {
    let biased = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
    _mm256_mul_ps(v, _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased)))
}

/// Bytes of a lane apart as 16-bit numbers, so that no sum of two products is cut off: odd ones and even ones.
#[inline]
#[target_feature(enable = "avx2")]
fn dot4(acc: __m256i, w: __m256i, x: [i8; 4]) -> __m256i {
    let x = _mm256_set1_epi32(i32::from_le_bytes(x.map(i8::cast_unsigned)));
    let (x_even, x_odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x));
    let (w_even, w_odd) = (_mm256_and_si256(w, _mm256_set1_epi16(0xff)), _mm256_srli_epi16::<8>(w));
    let sums = _mm256_add_epi32(_mm256_madd_epi16(w_even, x_even), _mm256_madd_epi16(w_odd, x_odd));
    _mm256_add_epi32(acc, sums)
}

/// Four products at a time in 16 bits, which hold `4 * 63 * 127`.
#[inline]
#[target_feature(enable = "avx2")]
fn dot8_small(acc: __m256i, w: [__m256i; 2], x: [[i8; 4]; 2]) -> __m256i {
    let [first, second] = x.map(|x| i32::from_le_bytes(x.map(i8::cast_unsigned)));
    let first = _mm256_maddubs_epi16(w[0], _mm256_set1_epi32(first));
    let second = _mm256_maddubs_epi16(w[1], _mm256_set1_epi32(second));
    _mm256_add_epi32(acc, _mm256_madd_epi16(_mm256_add_epi16(first, second), _mm256_set1_epi16(1)))
}

/// To 16 bytes.
#[inline]
#[target_feature(enable = "avx2")]
fn to_i8(low: __m256, high: __m256) -> __m128i {
    let words = _mm256_packs_epi32(_mm256_cvtps_epi32(low), _mm256_cvtps_epi32(high));
    // The packing goes within halves of 128 bits.
    let words = _mm256_permute4x64_epi64::<0b11_01_10_00>(words);
    _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256::<1>(words))
}

#[inline]
#[target_feature(enable = "avx2")]
fn high_nibbles(v: __m256i) -> __m256i {
    _mm256_and_si256(_mm256_srli_epi16::<4>(v), _mm256_set1_epi8(15))
}

impl Lanes for Avx2 {
    type V = (__m256, __m256);
    type I = (__m256i, __m256i);
    type B = (__m256i, __m256i);

    const NUM_VECTORS: usize = 8;
    const DOTS_ANY_BYTE: bool = false;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        let v = op!(_mm256_set1_ps(value));
        (v, v)
    }

    #[inline(always)]
    fn load(self, from: &[f32; WIDTH]) -> Self::V {
        let (low, high) = split(from);
        (op!(_mm256_loadu_ps(low.as_ptr())), op!(_mm256_loadu_ps(high.as_ptr())))
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; WIDTH]) -> Self::V {
        let (low, high) = split(from);
        let low = op!(_mm_loadu_si128(low.as_ptr().cast()));
        let high = op!(_mm_loadu_si128(high.as_ptr().cast()));
        (op!(widen_bf16(low)), op!(widen_bf16(high)))
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; WIDTH]) -> Self::V {
        let (low, high) = split(from);
        let low = op!(_mm_loadu_si128(low.as_ptr().cast()));
        let high = op!(_mm_loadu_si128(high.as_ptr().cast()));
        (op!(_mm256_cvtph_ps(low)), op!(_mm256_cvtph_ps(high)))
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; WIDTH]) {
        let (low, high) = to.split_at_mut(8);
        let (low, high): (&mut [f32; 8], &mut [f32; 8]) =
            (low.try_into().expect("8 of 16"), high.try_into().expect("8 of 16"));
        op!(_mm256_storeu_ps(low.as_mut_ptr(), v.0));
        op!(_mm256_storeu_ps(high.as_mut_ptr(), v.1));
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        (op!(_mm256_add_ps(a.0, b.0)), op!(_mm256_add_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        (op!(_mm256_sub_ps(a.0, b.0)), op!(_mm256_sub_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        (op!(_mm256_mul_ps(a.0, b.0)), op!(_mm256_mul_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        (op!(_mm256_div_ps(a.0, b.0)), op!(_mm256_div_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        (op!(_mm256_fmadd_ps(a.0, b.0, c.0)), op!(_mm256_fmadd_ps(a.1, b.1, c.1)))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        (op!(_mm256_max_ps(a.0, b.0)), op!(_mm256_max_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        (op!(_mm256_min_ps(a.0, b.0)), op!(_mm256_min_ps(a.1, b.1)))
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        const NEAREST: i32 = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        (op!(_mm256_round_ps::<NEAREST>(v.0)), op!(_mm256_round_ps::<NEAREST>(v.1)))
    }

    #[inline(always)]
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V {
        (op!(scale_by_power(v.0, n.0)), op!(scale_by_power(v.1, n.1)))
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
    fn sum(self, v: Self::V) -> f32 {
        op!(sum_halves(v.0, v.1))
    }

    #[inline(always)]
    fn swap<const DISTANCE: usize>(self, v: Self::V) -> Self::V {
        match DISTANCE {
            1 => (op!(_mm256_permute_ps::<0b10_11_00_01>(v.0)), op!(_mm256_permute_ps::<0b10_11_00_01>(v.1))),
            2 => (op!(_mm256_permute_ps::<0b01_00_11_10>(v.0)), op!(_mm256_permute_ps::<0b01_00_11_10>(v.1))),
            4 => (op!(_mm256_permute2f128_ps::<1>(v.0, v.0)), op!(_mm256_permute2f128_ps::<1>(v.1, v.1))),
            _ => (v.1, v.0),
        }
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; WIDTH]) -> Self::V {
        let bytes = op!(_mm_loadu_si128(from.as_ptr().cast()));
        let low = op!(_mm256_cvtepu8_epi32(bytes));
        let high = op!(_mm_srli_si128::<8>(bytes));
        let high = op!(_mm256_cvtepu8_epi32(high));
        (op!(_mm256_cvtepi32_ps(low)), op!(_mm256_cvtepi32_ps(high)))
    }

    #[inline(always)]
    fn splat_int(self, value: i32) -> Self::I {
        let v = op!(_mm256_set1_epi32(value));
        (v, v)
    }

    #[inline(always)]
    fn load_int(self, from: &[i32; WIDTH]) -> Self::I {
        let (low, high) = from.split_at(WIDTH / 2);
        (op!(_mm256_loadu_si256(low.as_ptr().cast())), op!(_mm256_loadu_si256(high.as_ptr().cast())))
    }

    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        (op!(_mm256_add_epi32(a.0, b.0)), op!(_mm256_add_epi32(a.1, b.1)))
    }

    #[inline(always)]
    fn sixteenth(self, v: Self::I) -> Self::I {
        (op!(_mm256_srai_epi32::<4>(v.0)), op!(_mm256_srai_epi32::<4>(v.1)))
    }

    #[inline(always)]
    fn int_to_float(self, v: Self::I) -> Self::V {
        (op!(_mm256_cvtepi32_ps(v.0)), op!(_mm256_cvtepi32_ps(v.1)))
    }

    #[inline(always)]
    fn store_i8(self, v: Self::V, to: &mut [i8; WIDTH]) {
        let bytes = op!(to_i8(v.0, v.1));
        op!(_mm_storeu_si128(to.as_mut_ptr().cast(), bytes));
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; BYTES]) -> Self::B {
        let (low, high) = from.split_at(BYTES / 2);
        (op!(_mm256_loadu_si256(low.as_ptr().cast())), op!(_mm256_loadu_si256(high.as_ptr().cast())))
    }

    #[inline(always)]
    fn store_bytes(self, v: Self::B, to: &mut [u8; BYTES]) {
        let (low, high) = to.split_at_mut(BYTES / 2);
        op!(_mm256_storeu_si256(low.as_mut_ptr().cast(), v.0));
        op!(_mm256_storeu_si256(high.as_mut_ptr().cast(), v.1));
    }

    #[inline(always)]
    fn low_nibbles(self, v: Self::B) -> Self::B {
        let mask = op!(_mm256_set1_epi8(15));
        (op!(_mm256_and_si256(v.0, mask)), op!(_mm256_and_si256(v.1, mask)))
    }

    #[inline(always)]
    fn high_nibbles(self, v: Self::B) -> Self::B {
        (op!(high_nibbles(v.0)), op!(high_nibbles(v.1)))
    }

    #[inline(always)]
    fn lifted_nibbles(self, v: Self::B) -> Self::B {
        let mask = op!(_mm256_set1_epi8(15 << 4));
        (op!(_mm256_and_si256(v.0, mask)), op!(_mm256_and_si256(v.1, mask)))
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], v: Self::B) -> Self::B {
        let table = op!(_mm_loadu_si128(table.as_ptr().cast()));
        let table = op!(_mm256_broadcastsi128_si256(table));
        (op!(_mm256_shuffle_epi8(table, v.0)), op!(_mm256_shuffle_epi8(table, v.1)))
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, w: Self::B, x: [i8; 4]) -> Self::I {
        (op!(dot4(acc.0, w.0, x)), op!(dot4(acc.1, w.1, x)))
    }

    #[inline(always)]
    fn dot8_small(self, acc: Self::I, w: [Self::B; 2], x: [[i8; 4]; 2]) -> Self::I {
        (op!(dot8_small(acc.0, [w[0].0, w[1].0], x)), op!(dot8_small(acc.1, [w[0].1, w[1].1], x)))
    }
}
