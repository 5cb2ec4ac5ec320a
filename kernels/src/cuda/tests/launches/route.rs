//! Routers.

use candle_core::DType;

use super::moved;
use crate::ops::route::{GroupScore, Groups, RouterSpec, Scoring, route};
use crate::testing::{Numbers, assert_close};

#[test]
fn routers() {
    let mut numbers = Numbers::new(1);
    let logits = numbers.tensor(&[5, 32]);
    let groups = Some(Groups { num: 4, top: 2, score: GroupScore::TopTwoSum, masked: f32::NEG_INFINITY });
    let specs = [
        RouterSpec::new(Scoring::SoftmaxTopK, 2),
        RouterSpec { scale: 16.0, min_sum: 0.5, ..RouterSpec::new(Scoring::Softmax, 3) },
        RouterSpec {
            bias: Some(numbers.normal(32)),
            groups,
            renormalize: Some(0.25),
            ..RouterSpec::new(Scoring::Sigmoid, 4)
        },
        RouterSpec::new(Scoring::SparseMixer { jitter: 0.5 }, 2),
    ];
    for spec in specs {
        let (found, expected) = (route(&moved(&logits), &spec).unwrap(), route(&logits, &spec).unwrap());
        assert_eq!((found.k, found.experts), (expected.k, expected.experts), "{spec:?}");
        assert_close(&found.weights, &expected.weights, 2e-6);
    }
}

#[test]
fn logits_are_f32() {
    let logits = moved(&Numbers::new(2).tensor(&[2, 8]).to_dtype(DType::BF16).unwrap());
    assert!(route(&logits, &RouterSpec::new(Scoring::Softmax, 2)).is_err());
}

#[test]
fn nobody_chooses() {
    let logits = moved(&Numbers::new(3).tensor(&[1, 8])).narrow(0, 0, 0).unwrap();
    let found = route(&logits, &RouterSpec::new(Scoring::Softmax, 2)).unwrap();
    assert!(found.experts.is_empty() && found.weights.is_empty());
}
