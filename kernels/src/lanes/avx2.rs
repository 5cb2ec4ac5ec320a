//! Lanes as two AVX registers.

use std::arch::x86_64::*;

use half::{bf16, f16};

use super::{Lanes, WIDTH};

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
        // SAFETY: `self` proves the features (`Avx2::detect`); memory operands are references to 8 elements of f32
        // or 16 bits, and the unaligned forms are used.
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

impl Lanes for Avx2 {
    type V = (__m256, __m256);

    const NUM_VECTORS: usize = 8;

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
    fn sum(self, v: Self::V) -> f32 {
        op!(sum_halves(v.0, v.1))
    }
}
