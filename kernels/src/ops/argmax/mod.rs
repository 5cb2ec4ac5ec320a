//! The place of the largest number of a row, as greedy decoding asks for it.

use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, max};

/// Numbers that are compared without a branch between them.
const CHUNK: usize = 64;

/// Index of the largest number, the first among equals; `None` if none is above minus infinity. NaN counts for nothing.
pub fn argmax(values: &[f32]) -> Option<usize> {
    let largest = dispatch::run(Max { values });
    if largest == f32::NEG_INFINITY {
        return None;
    }
    let holds_it = |chunk: &[f32]| chunk.iter().fold(false, |holds, &value| holds | (value == largest));
    let first = values.chunks(CHUNK).position(holds_it)? * CHUNK;
    values[first..].iter().position(|&value| value == largest).map(|idx| first + idx)
}

struct Max<'a> {
    values: &'a [f32],
}

impl Kernel for Max<'_> {
    type Output = f32;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> f32 {
        max(lanes, self.values)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;

    #[test]
    fn the_first_of_the_largest_is_found() {
        let mut numbers = Numbers::new(1);
        for len in [1, 2, 15, 16, 17, 64, 65, 1000] {
            let mut values = numbers.normal(len);
            let expected = (0..len).reduce(|best, idx| if values[idx] > values[best] { idx } else { best });
            assert_eq!(argmax(&values), expected, "{len} numbers");
            let (first, last) = (len / 3, len - 1);
            (values[first], values[last]) = (9.0, 9.0);
            assert_eq!(argmax(&values), Some(first), "{len} numbers");
            values[first] = f32::NAN;
            assert_eq!(argmax(&values), (first < last).then_some(last).or(argmax(&values[..first])));
        }
    }

    #[test]
    fn infinities_and_nothing() {
        assert_eq!(argmax(&[]), None);
        assert_eq!(argmax(&[f32::NEG_INFINITY; 20]), None);
        assert_eq!(argmax(&[f32::NAN; 20]), None);
        assert_eq!(argmax(&[0.0, f32::INFINITY, 1.0]), Some(1));
        assert_eq!(argmax(&[-0.0, 0.0]), Some(0));
    }
}
