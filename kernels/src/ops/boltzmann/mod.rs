//! What the tokens of a row weigh at a temperature, as sampling asks for it.

use crate::dispatch::{self, Kernel};
use crate::lanes::{Lanes, exp_scaled};

/// `e^((logit - max) / temperature)` of each logit, in f32 to about 1 ulp for what is near the largest, and relative to the exponent
/// for the rest. What weighs less than 10⁻³⁷ weighs 0, as does minus infinity.
///
/// `max` is the largest logit, and may be infinite: then those that equal it weigh 1, others nothing. `temperature` is above 0.
pub fn boltzmann(logits: &[f32], max: f32, temperature: f32) -> Vec<f32> {
    if max.is_infinite() {
        return logits.iter().map(|&logit| if logit == max { 1.0 } else { 0.0 }).collect();
    }
    let mut weights = logits.to_vec();
    // The inverse of a number near 0 is infinite, which times 0 is none.
    dispatch::run(Weigh { values: &mut weights, max, factor: temperature.recip().min(f32::MAX) });
    weights
}

/// Below this the exponential is only a bound.
const LEAST: f32 = 1e-37;

struct Weigh<'a> {
    values: &'a mut [f32],
    max: f32,
    factor: f32,
}

impl Kernel for Weigh<'_> {
    type Output = ();

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        exp_scaled(lanes, self.values, self.max, self.factor);
        for value in self.values {
            *value = if *value < LEAST { 0.0 } else { *value };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Numbers;

    #[test]
    fn weights_are_those_of_f64() {
        let mut numbers = Numbers::new(3);
        for (len, temperature) in [(0, 1.0), (1, 1.0), (15, 0.7), (17, 2.0), (1000, 0.05), (1000, 1e-42), (33, 1e30)] {
            let mut logits: Vec<f32> = numbers.normal(len).into_iter().map(|number| 8.0 * number).collect();
            if len > 20 {
                (logits[3], logits[len - 1]) = (f32::NEG_INFINITY, -1e30);
            }
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let weights = boltzmann(&logits, max, temperature);
            assert_eq!(weights.len(), len);
            for (&logit, weight) in logits.iter().zip(weights) {
                let exponent = (f64::from(logit) - f64::from(max)) / f64::from(temperature);
                let expected = exponent.exp();
                let tolerance = 3e-7 * (1.0 + exponent.abs().min(100.0)) * expected + 1.1e-37;
                assert!((f64::from(weight) - expected).abs() <= tolerance, "{logit} of {max}: {weight}, {expected}");
                assert!(weight > 0.0 || expected < 1.1e-37);
            }
        }
    }

    #[test]
    fn the_best_weigh_one_and_nothing_weighs_nothing() {
        let infinite = [1.0, f32::INFINITY, f32::NEG_INFINITY, f32::INFINITY];
        assert_eq!(boltzmann(&infinite, f32::INFINITY, 0.7), [0.0, 1.0, 0.0, 1.0]);
        assert_eq!(boltzmann(&[-3.0, -3.0, f32::NEG_INFINITY], -3.0, f32::MIN_POSITIVE / 8.0), [1.0, 1.0, 0.0]);
        assert_eq!(boltzmann(&[f32::MAX, f32::MIN], f32::MAX, 1.0), [1.0, 0.0]);
    }
}
