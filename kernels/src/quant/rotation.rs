//! The Hadamard matrix of 64 columns, by which weights and activations are turned together: it leaves their product alone
//! and shares out an outlier among all numbers of its block, so that the others keep their bits (QuaRot, arXiv 2404.00456).

use crate::dispatch::Kernel;
use crate::lanes::{Lanes, WIDTH};

/// Columns of a block.
pub(crate) const BLOCK: usize = 64;

/// Vectors of a block.
const VECTORS: usize = BLOCK / WIDTH;

/// Turns blocks in place. The matrix is its own inverse.
pub(crate) struct Rotate<'a>(pub(crate) &'a mut [[f32; BLOCK]]);

impl Kernel for Rotate<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        for block in self.0 {
            rotate(lanes, block);
        }
    }
}

/// Sums and differences of numbers 1, 2, … 32 apart; the scale is a power of two.
#[inline(always)]
pub(crate) fn rotate<L: Lanes>(lanes: L, block: &mut [f32; BLOCK]) {
    let (vectors, _) = block.as_chunks_mut::<WIDTH>();
    let mut v = [lanes.splat(0.0); VECTORS];
    for (v, from) in v.iter_mut().zip(vectors.iter()) {
        *v = lanes.load(from);
        *v = within::<L, 1>(lanes, *v);
        *v = within::<L, 2>(lanes, *v);
        *v = within::<L, 4>(lanes, *v);
        *v = within::<L, 8>(lanes, *v);
    }
    let [a, b, c, d] = v;
    let (a, b, c, d) = (lanes.add(a, b), lanes.sub(a, b), lanes.add(c, d), lanes.sub(c, d));
    let scale = lanes.splat(0.125);
    for (v, to) in [lanes.add(a, c), lanes.add(b, d), lanes.sub(a, c), lanes.sub(b, d)].into_iter().zip(vectors) {
        lanes.store(lanes.mul(v, scale), to);
    }
}

/// `a + b` and `a - b` in place of lanes `a` and `b` that lie this far apart.
#[inline(always)]
fn within<L: Lanes, const DISTANCE: usize>(lanes: L, v: L::V) -> L::V {
    let signs = lanes.load(const { &signs(DISTANCE) });
    lanes.fma(v, signs, lanes.swap::<DISTANCE>(v))
}

const fn signs(distance: usize) -> [f32; WIDTH] {
    let mut signs = [1.0; WIDTH];
    let mut lane = 0;
    while lane < WIDTH {
        if lane & distance != 0 {
            signs[lane] = -1.0;
        }
        lane += 1;
    }
    signs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dispatch::Isa;
    use crate::testing::{Numbers, assert_close};

    #[test]
    fn it_is_the_hadamard_matrix_and_its_own_inverse_on_every_path() {
        let mut numbers = Numbers::new(1);
        let x = numbers.with_outliers(2 * BLOCK);
        // Entry (i, j) is negative where `i & j` has an odd number of bits.
        let sign = |i: usize, j: usize| if (i & j).count_ones().is_multiple_of(2) { 0.125 } else { -0.125 };
        let of_block = |block: &[f32], i| (0..BLOCK).map(|j| sign(i, j) * f64::from(block[j])).sum::<f64>() as f32;
        let expected: Vec<f32> =
            x.chunks(BLOCK).flat_map(|block| (0..BLOCK).map(|i| of_block(block, i)).collect::<Vec<_>>()).collect();
        let mut results = Vec::new();
        for isa in Isa::available() {
            let mut turned = x.clone();
            isa.run(Rotate(turned.as_chunks_mut().0));
            assert_close(&turned, &expected, 1e-6);
            results.push(turned.iter().map(|value| value.to_bits()).collect::<Vec<_>>());
            isa.run(Rotate(turned.as_chunks_mut().0));
            assert_close(&turned, &x, 1e-6);
        }
        assert!(results.iter().all(|result| *result == results[0]));
    }
}
