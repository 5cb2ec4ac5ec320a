//! Lanes as an array: the path of last resort, and of other architectures.

use half::{bf16, f16};

use super::{BYTES, Lanes, WIDTH};

/// Needs nothing of the machine.
#[derive(Clone, Copy)]
pub(crate) struct Portable;

#[inline(always)]
fn zip(a: [f32; WIDTH], b: [f32; WIDTH], op: impl Fn(f32, f32) -> f32) -> [f32; WIDTH] {
    std::array::from_fn(|i| op(a[i], b[i]))
}

impl Lanes for Portable {
    type V = [f32; WIDTH];
    type I = [i32; WIDTH];
    type B = [u8; BYTES];

    const NUM_VECTORS: usize = 8;
    const DOTS_ANY_BYTE: bool = true;

    #[inline(always)]
    fn splat(self, value: f32) -> Self::V {
        [value; WIDTH]
    }

    #[inline(always)]
    fn load(self, from: &[f32; WIDTH]) -> Self::V {
        *from
    }

    #[inline(always)]
    fn load_bf16(self, from: &[bf16; WIDTH]) -> Self::V {
        from.map(|value| f32::from_bits(u32::from(value.to_bits()) << 16))
    }

    #[inline(always)]
    fn load_f16(self, from: &[f16; WIDTH]) -> Self::V {
        from.map(f16::to_f32)
    }

    #[inline(always)]
    fn store(self, v: Self::V, to: &mut [f32; WIDTH]) {
        *to = v;
    }

    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| a / b)
    }

    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        std::array::from_fn(|i| a[i].mul_add(b[i], c[i]))
    }

    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        zip(a, b, |a, b| if a < b { a } else { b })
    }

    #[inline(always)]
    fn round(self, v: Self::V) -> Self::V {
        v.map(f32::round_ties_even)
    }

    #[inline(always)]
    fn scale_by_power(self, v: Self::V, n: Self::V) -> Self::V {
        zip(v, n, |v, n| v * f32::from_bits(((n as i32 + 127) as u32) << 23))
    }

    #[inline(always)]
    fn prefetch<T>(self, _address: *const T) {}

    #[inline(always)]
    fn prefetch_far<T>(self, _address: *const T) {}

    #[inline(always)]
    fn sum(self, v: Self::V) -> f32 {
        let mut lanes = v;
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        lanes[0]
    }

    #[inline(always)]
    fn swap<const DISTANCE: usize>(self, v: Self::V) -> Self::V {
        std::array::from_fn(|lane| v[lane ^ DISTANCE])
    }

    #[inline(always)]
    fn load_u8(self, from: &[u8; WIDTH]) -> Self::V {
        from.map(f32::from)
    }

    #[inline(always)]
    fn splat_int(self, value: i32) -> Self::I {
        [value; WIDTH]
    }

    #[inline(always)]
    fn load_int(self, from: &[i32; WIDTH]) -> Self::I {
        *from
    }

    #[inline(always)]
    fn add_int(self, a: Self::I, b: Self::I) -> Self::I {
        std::array::from_fn(|lane| a[lane].wrapping_add(b[lane]))
    }

    #[inline(always)]
    fn sixteenth(self, v: Self::I) -> Self::I {
        v.map(|value| value / 16)
    }

    #[inline(always)]
    fn int_to_float(self, v: Self::I) -> Self::V {
        v.map(|value| value as f32)
    }

    #[inline(always)]
    fn store_i8(self, v: Self::V, to: &mut [i8; WIDTH]) {
        *to = v.map(|value| value.round_ties_even() as i8);
    }

    #[inline(always)]
    fn load_bytes(self, from: &[u8; BYTES]) -> Self::B {
        *from
    }

    #[inline(always)]
    fn store_bytes(self, v: Self::B, to: &mut [u8; BYTES]) {
        *to = v;
    }

    #[inline(always)]
    fn low_nibbles(self, v: Self::B) -> Self::B {
        v.map(|byte| byte & 15)
    }

    #[inline(always)]
    fn high_nibbles(self, v: Self::B) -> Self::B {
        v.map(|byte| byte >> 4)
    }

    #[inline(always)]
    fn lifted_nibbles(self, v: Self::B) -> Self::B {
        v.map(|byte| byte & (15 << 4))
    }

    #[inline(always)]
    fn look_up(self, table: &[u8; 16], v: Self::B) -> Self::B {
        v.map(|index| table[usize::from(index & 15)])
    }

    #[inline(always)]
    fn dot4(self, acc: Self::I, w: Self::B, x: [i8; 4]) -> Self::I {
        std::array::from_fn(|lane| {
            let products = x.iter().zip(&w[4 * lane..4 * lane + 4]).map(|(&x, &w)| i32::from(x) * i32::from(w));
            acc[lane] + products.sum::<i32>()
        })
    }
}
