//! Parity with the oracle, row invariance to the bit, and refused inputs.

use super::{Expert, ExpertActivation, ExpertBiases, ExpertWeights, GroupedSwiglu, TopK, grouped_swiglu, reference};
use crate::ops::glu::GluActivation;
use crate::ops::pointwise::Pointwise;
use crate::testing::{Numbers, assert_close, bits, tensor, values};
use crate::weight::{PackedWeight, WeightFormat};

fn experts(numbers: &mut Numbers, format: WeightFormat, shape: [usize; 3]) -> Vec<Expert> {
    let [num_experts, hidden_size, intermediate] = shape;
    let mut weight = |rows: usize, cols: usize| {
        let values: Vec<f32> = numbers.normal(rows * cols).iter().map(|value| value / (cols as f32).sqrt()).collect();
        PackedWeight::from_f32(format, rows, cols, &values).unwrap()
    };
    (0..num_experts)
        .map(|_| {
            Expert::Glu(ExpertWeights::swiglu(weight(2 * intermediate, hidden_size), weight(hidden_size, intermediate)))
        })
        .collect()
}

/// Experts of skewed popularity, so that some get many tokens and some none.
fn choose(numbers: &mut Numbers, num_tokens: usize, num_experts: usize, k: usize) -> TopK {
    let mut chosen = Vec::new();
    for _ in 0..num_tokens {
        let first = numbers.below(num_experts) * numbers.below(num_experts) / num_experts;
        chosen.extend((0..k).map(|slot| ((first + slot * slot) % num_experts) as u32));
    }
    TopK { experts: chosen, weights: numbers.normal(num_tokens * k), k }
}

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for [num_tokens, num_experts, hidden_size, intermediate, k] in [
        [0, 4, 8, 8, 2],
        [1, 4, 8, 8, 2],
        [1, 1, 1, 1, 1],
        [33, 5, 35, 19, 3],
        [300, 4, 64, 96, 2],
        [3, 8, 576, 192, 2],
    ] {
        for format in [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16] {
            let experts = experts(&mut numbers, format, [num_experts, hidden_size, intermediate]);
            let topk = choose(&mut numbers, num_tokens, num_experts, k);
            let x = numbers.with_outliers(num_tokens * hidden_size);
            let op = GroupedSwiglu { num_tokens, hidden_size, intermediate, experts: &experts, topk: &topk };
            let y = grouped_swiglu(&tensor(&x, &[num_tokens, hidden_size]), &experts, &topk).unwrap();
            assert_close(&values(&y), &reference::grouped_swiglu(&op, &x), 1e-5);
        }
    }
}

/// The first expert has no gate, the last gives back its input, the others are clamped; all but the last have biases.
fn varied(numbers: &mut Numbers, shape: [usize; 3]) -> Vec<Expert> {
    let [_, hidden_size, intermediate] = shape;
    let mut experts = experts(numbers, WeightFormat::Bf16, shape);
    for expert in &mut experts {
        let Expert::Glu(weights) = expert else { continue };
        weights.biases =
            Some(ExpertBiases { gate_up: numbers.normal(2 * intermediate), down: numbers.normal(hidden_size) });
        weights.activation = ExpertActivation::Gated(GluActivation::ClampedSwish { alpha: 1.702, limit: 1.5 });
    }
    let up: Vec<f32> =
        numbers.normal(intermediate * hidden_size).iter().map(|up| up / (hidden_size as f32).sqrt()).collect();
    if let Expert::Glu(weights) = &mut experts[0] {
        weights.gate_up = PackedWeight::from_f32(WeightFormat::Bf16, intermediate, hidden_size, &up).unwrap();
        weights.biases.as_mut().unwrap().gate_up.truncate(intermediate);
        weights.activation = ExpertActivation::Plain(Pointwise::Relu);
    }
    *experts.last_mut().unwrap() = Expert::Identity;
    experts
}

#[test]
fn identity_biases_and_clamps_agree_with_the_reference() {
    let mut numbers = Numbers::new(5);
    for [num_tokens, num_experts, hidden_size, intermediate, k] in
        [[1, 2, 8, 8, 2], [70, 5, 35, 19, 3], [9, 1, 6, 4, 1]]
    {
        let experts = varied(&mut numbers, [num_experts, hidden_size, intermediate]);
        let topk = choose(&mut numbers, num_tokens, num_experts, k);
        let x = numbers.normal(num_tokens * hidden_size);
        let op = GroupedSwiglu { num_tokens, hidden_size, intermediate, experts: &experts, topk: &topk };
        let y = grouped_swiglu(&tensor(&x, &[num_tokens, hidden_size]), &experts, &topk).unwrap();
        assert_close(&values(&y), &reference::grouped_swiglu(&op, &x), 1e-5);
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(2);
    let plain = experts(&mut numbers, WeightFormat::Bf16, [6, 75, 50]);
    let varied = varied(&mut numbers, [6, 75, 50]);
    check_rows(&mut numbers, &plain);
    check_rows(&mut numbers, &varied);
}

fn check_rows(numbers: &mut Numbers, experts: &[Expert]) {
    let topk = choose(numbers, 150, 6, 3);
    let x = numbers.tensor(&[150, 75]);
    let part = |first: usize, len: usize| {
        let pairs = first * 3..(first + len) * 3;
        let topk = TopK { experts: topk.experts[pairs.clone()].to_vec(), weights: topk.weights[pairs].to_vec(), k: 3 };
        bits(&grouped_swiglu(&x.narrow(0, first, len).unwrap(), experts, &topk).unwrap())
    };
    let alone: Vec<_> = (0..150).map(|row| part(row, 1)).collect();
    for num_tokens in (1..=40).chain([150]) {
        assert_eq!(part(0, num_tokens), alone[..num_tokens].concat(), "{num_tokens} rows");
        assert_eq!(part(150 - num_tokens, num_tokens), alone[150 - num_tokens..].concat(), "{num_tokens} last rows");
    }
}

#[test]
fn a_nan_row_spoils_no_other() {
    let mut numbers = Numbers::new(4);
    let experts = experts(&mut numbers, WeightFormat::F32, [2, 16, 16]);
    let topk = TopK { experts: vec![0; 8], weights: vec![1.0; 8], k: 1 };
    let mut x = numbers.normal(8 * 16);
    x[3 * 16] = f32::NAN;
    let y = values(&grouped_swiglu(&tensor(&x, &[8, 16]), &experts, &topk).unwrap());
    for (row, y) in y.chunks(16).enumerate() {
        assert_eq!(y.iter().any(|value| value.is_nan()), row == 3);
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let mut numbers = Numbers::new(3);
    let experts = experts(&mut numbers, WeightFormat::F32, [2, 8, 4]);
    let topk = |experts: Vec<u32>, k| TopK { weights: vec![1.0; experts.len()], experts, k };
    let x = numbers.tensor(&[2, 8]);
    assert!(grouped_swiglu(&x, &experts, &topk(vec![0, 1], 1)).is_ok());
    assert!(grouped_swiglu(&x, &experts, &topk(vec![0, 2], 1)).is_err());
    assert!(grouped_swiglu(&x, &experts, &topk(vec![0], 1)).is_err());
    assert!(grouped_swiglu(&numbers.tensor(&[2, 9]), &experts, &topk(vec![0, 1], 1)).is_err());
    let Expert::Glu(first) = &experts[0] else { unreachable!("all are gated") };
    let swapped = [Expert::Glu(ExpertWeights::swiglu(first.down.clone(), first.gate_up.clone()))];
    assert!(grouped_swiglu(&x, &swapped, &topk(vec![0, 0], 1)).is_err());
}
