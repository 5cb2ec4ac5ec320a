//! Keys of a tile of positions, from rows in the cache to vectors of 16 positions per element.

use std::ops::Range;

use half::bf16;

use super::tile::TILE;
#[cfg(target_arch = "x86_64")]
use crate::dispatch;
use crate::lanes::{Element, WIDTH};

/// An element that the cache can hold.
pub(super) trait CacheElement: Element {
    fn to_f32(self) -> f32;

    /// Turns the leading elements of 8 rows, as many as whole registers hold, if the machine has the instructions;
    /// `out[i][lane + r]` is element `i` of row `r`. Returns how many elements that were.
    fn transpose_8(rows: &[&[Self]; 8], lane: usize, out: &mut [[f32; WIDTH]]) -> usize;
}

/// `out[v][i][p]` is element `i` of row `16 v + p`, for the rows that are `wanted`; other lanes may hold anything. All rows
/// are of one length.
pub(super) fn transpose<E: CacheElement>(
    rows: &[&[E]; TILE],
    wanted: Range<usize>,
    out: &mut [f32], /* [TILE / WIDTH, key_dim, WIDTH] */
) {
    let key_dim = rows[0].len();
    let (out, _) = out.as_chunks_mut::<WIDTH>();
    let (groups, _) = rows.as_chunks::<8>();
    for (group_idx, group) in groups.iter().enumerate().take(wanted.end.div_ceil(8)).skip(wanted.start / 8) {
        let (vector, lane) = (group_idx / 2, group_idx % 2 * 8);
        let out = &mut out[vector * key_dim..(vector + 1) * key_dim];
        for element in E::transpose_8(group, lane, out)..key_dim {
            for (target, row) in out[element][lane..].iter_mut().zip(group) {
                *target = row[element].to_f32();
            }
        }
    }
}

impl CacheElement for f32 {
    fn to_f32(self) -> f32 {
        self
    }

    fn transpose_8(rows: &[&[Self]; 8], lane: usize, out: &mut [[f32; WIDTH]]) -> usize {
        #[cfg(target_arch = "x86_64")]
        if dispatch::has_avx2() {
            // SAFETY: a set that contains the feature is chosen, so the machine has it.
            return unsafe { avx2::transpose_f32(rows, lane, out) };
        }
        0
    }
}

impl CacheElement for bf16 {
    fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }

    fn transpose_8(rows: &[&[Self]; 8], lane: usize, out: &mut [[f32; WIDTH]]) -> usize {
        #[cfg(target_arch = "x86_64")]
        if dispatch::has_avx2() {
            // SAFETY: a set that contains the feature is chosen, so the machine has it.
            return unsafe { avx2::transpose_bf16(rows, lane, out) };
        }
        0
    }
}

#[cfg(target_arch = "x86_64")]
mod avx2 {
    use std::arch::x86_64::*;

    use half::bf16;

    use crate::lanes::WIDTH;

    #[target_feature(enable = "avx2")]
    pub(super) fn transpose_f32(rows: &[&[f32]; 8], lane: usize, out: &mut [[f32; WIDTH]]) -> usize {
        let num_chunks = rows[0].len() / 8;
        let rows = chunks::<f32, 8>(rows, num_chunks);
        for chunk in 0..num_chunks {
            let mut loaded = [_mm256_setzero_ps(); 8];
            for (loaded, row) in loaded.iter_mut().zip(&rows) {
                // SAFETY: the reference is to 8 floats; the unaligned form is used.
                *loaded = unsafe { _mm256_loadu_ps(row[chunk].as_ptr()) };
            }
            let turned = transpose_8x8(loaded);
            let out = &mut out[chunk * 8..chunk * 8 + 8];
            for i in 0..8 {
                store(turned[i], &mut out[i], lane);
            }
        }
        num_chunks * 8
    }

    /// Turns pairs of elements as one, then widens either half of each.
    #[target_feature(enable = "avx2")]
    pub(super) fn transpose_bf16(rows: &[&[bf16]; 8], lane: usize, out: &mut [[f32; WIDTH]]) -> usize {
        let num_chunks = rows[0].len() / 16;
        let rows = chunks::<bf16, 16>(rows, num_chunks);
        let upper = _mm256_set1_epi32(0xffff_0000_u32.cast_signed());
        for chunk in 0..num_chunks {
            let mut loaded = [_mm256_setzero_ps(); 8];
            for (loaded, row) in loaded.iter_mut().zip(&rows) {
                // SAFETY: the reference is to 16 elements of 16 bits; the unaligned form is used.
                *loaded = unsafe { _mm256_loadu_ps(row[chunk].as_ptr().cast()) };
            }
            let turned = transpose_8x8(loaded);
            let out = &mut out[chunk * 16..chunk * 16 + 16];
            for i in 0..8 {
                let pairs = _mm256_castps_si256(turned[i]);
                store(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(pairs)), &mut out[2 * i], lane);
                store(_mm256_castsi256_ps(_mm256_and_si256(pairs, upper)), &mut out[2 * i + 1], lane);
            }
        }
        num_chunks * 16
    }

    /// The first `len` whole chunks of each row.
    #[inline(always)]
    fn chunks<'a, T, const N: usize>(rows: &[&'a [T]; 8], len: usize) -> [&'a [[T; N]]; 8] {
        let mut chunks: [&[[T; N]]; 8] = [&[]; 8];
        for (chunks, row) in chunks.iter_mut().zip(rows) {
            *chunks = &row.as_chunks::<N>().0[..len];
        }
        chunks
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn store(vector: __m256, out: &mut [f32; WIDTH], lane: usize) {
        let half: &mut [f32; 8] = out[lane..].first_chunk_mut().expect("a half of the vector");
        // SAFETY: the reference is to 8 floats; the unaligned form is used.
        unsafe { _mm256_storeu_ps(half.as_mut_ptr(), vector) }
    }

    #[inline]
    #[target_feature(enable = "avx2")]
    fn transpose_8x8(r: [__m256; 8]) -> [__m256; 8] {
        // Within the halves of each register: pairs of rows, then fours.
        let mut pairs = r;
        for i in 0..4 {
            pairs[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
            pairs[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
        }
        let mut fours = pairs;
        for i in 0..2 {
            let [a, b, c, d] = [pairs[4 * i], pairs[4 * i + 1], pairs[4 * i + 2], pairs[4 * i + 3]];
            fours[4 * i] = _mm256_shuffle_ps::<0x44>(a, c);
            fours[4 * i + 1] = _mm256_shuffle_ps::<0xee>(a, c);
            fours[4 * i + 2] = _mm256_shuffle_ps::<0x44>(b, d);
            fours[4 * i + 3] = _mm256_shuffle_ps::<0xee>(b, d);
        }
        let mut turned = fours;
        for i in 0..4 {
            turned[i] = _mm256_permute2f128_ps::<0x20>(fours[i], fours[i + 4]);
            turned[i + 4] = _mm256_permute2f128_ps::<0x31>(fours[i], fours[i + 4]);
        }
        turned
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;

    fn check<E: CacheElement>(from_f32: fn(f32) -> E) {
        let mut numbers = Numbers::new(1);
        for key_dim in [1, 5, 8, 16, 24, 64, 112, 576] {
            let rows: Vec<Vec<E>> =
                (0..TILE).map(|_| numbers.normal(key_dim).into_iter().map(from_f32).collect()).collect();
            let rows: [&[E]; TILE] = std::array::from_fn(|row| rows[row].as_slice());
            for wanted in [0..1, 7..8, 8..9, 5..17, 0..63, 0..TILE] {
                let mut out = vec![0.0; TILE * key_dim];
                transpose(&rows, wanted.clone(), &mut out);
                for (row_idx, row) in rows.iter().enumerate().filter(|(row_idx, _)| wanted.contains(row_idx)) {
                    for (i, value) in row.iter().enumerate() {
                        let found = out[(row_idx / WIDTH * key_dim + i) * WIDTH + row_idx % WIDTH];
                        assert_eq!(found, value.to_f32(), "element {i} of row {row_idx} of {key_dim}");
                    }
                }
            }
        }
    }

    #[test]
    fn every_element_finds_its_place() {
        check::<f32>(|value| value);
        check(bf16::from_f32);
    }
}
