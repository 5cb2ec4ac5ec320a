//! Parity with the oracle for every kind of router, known cases, row invariance to the bit, and refused specs.

use super::{GroupScore, Groups, RouterSpec, Scoring, reference, route};
use crate::testing::{Numbers, assert_close, tensor, values};

fn spec(top_k: usize, scoring: Scoring) -> RouterSpec {
    RouterSpec::new(scoring, top_k)
}

/// Routers as published, over 64 experts.
fn published(numbers: &mut Numbers) -> Vec<RouterSpec> {
    let groups = |score, masked| Some(Groups { num: 8, top: 3, score, masked });
    vec![
        spec(2, Scoring::SoftmaxTopK),
        RouterSpec { renormalize: Some(0.0), ..spec(8, Scoring::Softmax) },
        RouterSpec { renormalize: Some(0.0), min_sum: 0.5, ..spec(8, Scoring::Softmax) },
        RouterSpec { groups: groups(GroupScore::Max, 0.0), scale: 16.0, ..spec(6, Scoring::Softmax) },
        RouterSpec {
            bias: Some(numbers.normal(64)),
            groups: groups(GroupScore::TopTwoSum, f32::NEG_INFINITY),
            renormalize: Some(1e-20),
            scale: 2.5,
            ..spec(8, Scoring::Sigmoid)
        },
        spec(64, Scoring::Softmax),
    ]
}

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for spec in published(&mut numbers) {
        for num_tokens in [0, 1, 7, 100] {
            let logits = numbers.normal(num_tokens * 64);
            let topk = route(&tensor(&logits, &[num_tokens, 64]), &spec).unwrap();
            assert_eq!((topk.k, topk.experts.len()), (spec.top_k, num_tokens * spec.top_k));
            for (token, logits) in logits.chunks_exact(64).enumerate() {
                let (mut experts, mut weights) = (vec![0; spec.top_k], vec![0.0; spec.top_k]);
                reference::route_row(logits, &spec, &mut experts, &mut weights);
                let slots = token * spec.top_k..(token + 1) * spec.top_k;
                assert_eq!(topk.experts[slots.clone()], experts, "{spec:?}");
                assert_close(&topk.weights[slots], &weights, 1e-5);
            }
        }
    }
}

#[test]
fn ties_go_to_the_lower_expert_and_order_is_by_score() {
    let logits = tensor(&[1.0, 3.0, 3.0, 2.0, 3.0], &[1, 5]);
    for scoring in [Scoring::Softmax, Scoring::SoftmaxTopK, Scoring::Sigmoid] {
        assert_eq!(route(&logits, &spec(4, scoring)).unwrap().experts, [1, 2, 4, 3]);
    }
}

#[test]
fn the_bias_moves_the_choice_but_not_the_weight() {
    let biased = RouterSpec { bias: Some(vec![0.0, 10.0, 0.0]), ..spec(1, Scoring::Sigmoid) };
    let topk = route(&tensor(&[5.0, 0.0, -5.0], &[1, 3]), &biased).unwrap();
    assert_eq!((topk.experts, topk.weights), (vec![1], vec![0.5]));
}

#[test]
fn a_nan_spoils_its_own_token_only() {
    let mut logits = vec![0.5; 16];
    logits[2] = f32::NAN;
    for scoring in [Scoring::Softmax, Scoring::SoftmaxTopK, Scoring::Sigmoid] {
        let topk = route(&tensor(&logits, &[2, 8]), &spec(8, scoring)).unwrap();
        assert!(topk.experts.iter().all(|&expert| expert < 8));
        assert!(topk.weights[..8].iter().any(|weight| weight.is_nan()));
        assert!(topk.weights[8..].iter().all(|weight| !weight.is_nan()));
    }
}

#[test]
fn a_token_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(2);
    for spec in published(&mut numbers) {
        let logits = numbers.tensor(&[300, 64]);
        let whole = route(&logits, &spec).unwrap();
        for token in 0..300 {
            let alone = route(&tensor(&values(&logits.get(token).unwrap()), &[1, 64]), &spec).unwrap();
            let slots = token * spec.top_k..(token + 1) * spec.top_k;
            assert_eq!(alone.experts, whole.experts[slots.clone()]);
            assert_eq!(alone.weights, whole.weights[slots]);
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let logits = Numbers::new(3).tensor(&[2, 8]);
    let groups = |num, top| Some(Groups { num, top, score: GroupScore::Max, masked: 0.0 });
    let refused = [
        spec(0, Scoring::Softmax),
        spec(9, Scoring::Softmax),
        RouterSpec { bias: Some(vec![0.0; 7]), ..spec(2, Scoring::Sigmoid) },
        RouterSpec { groups: groups(3, 1), ..spec(2, Scoring::Softmax) },
        RouterSpec { groups: groups(4, 5), ..spec(2, Scoring::Softmax) },
        RouterSpec { groups: groups(4, 1), ..spec(3, Scoring::Softmax) },
        RouterSpec { groups: groups(0, 0), ..spec(3, Scoring::Softmax) },
    ];
    for spec in refused {
        assert!(route(&logits, &spec).is_err(), "{spec:?}");
    }
}
