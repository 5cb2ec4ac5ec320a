//! The expert layer.

use candle_core::{DType, Tensor};

use super::linear::assert_equal;
use super::{DEVICE, assert_same, moved, on_both};
use crate::cuda::tests::grouped::{choose, experts};
use crate::ops::glu::GluActivation;
use crate::ops::grouped_swiglu::{
    Expert, ExpertActivation, ExpertSlots, ExpertWeights, Experts, grouped_experts, grouped_swiglu,
};
use crate::ops::pointwise::Pointwise;
use crate::ops::route::TopK;
use crate::quant::{Codes, QuantFormat};
use crate::testing::{Numbers, QUANTIZED, tensor};
use crate::weight::WeightFormat;

/// All numbers between the kernels are rounded.
const BF16_TOLERANCE: f32 = 2e-2;

fn on_device(experts: &Experts) -> Experts {
    experts.to_device(&DEVICE).unwrap()
}

/// `[num_tokens, num_experts, hidden, intermediate, k]`; of the tokens with many pairs, some go in parts.
const SHAPES: [[usize; 5]; 4] = [[45, 7, 70, 40, 3], [1, 4, 130, 33, 2], [20, 3, 17, 1, 1], [150, 4, 64, 48, 2]];

#[test]
fn quantized_experts_are_those_of_the_cpu_to_the_bit() {
    let mut numbers = Numbers::new(50);
    let mixed = [QuantFormat::INT4, QUANTIZED[4], QuantFormat::INT8, QUANTIZED[7], QUANTIZED[3]];
    let rotated = [QuantFormat { codes: Codes::Int8Rotated, group: 128 }];
    let formats: [&[QuantFormat]; 4] = [&mixed, &rotated, &mixed[..1], &mixed[1..3]];
    for (formats, [num_tokens, num_experts, hidden, intermediate, k]) in formats.into_iter().zip(SHAPES) {
        let formats: Vec<_> = formats.iter().copied().map(WeightFormat::Quantized).collect();
        let host = Experts::new(experts(&mut numbers, &formats, [num_experts, hidden, intermediate])).unwrap();
        let topk = choose(&mut numbers, num_tokens, num_experts, k);
        let mut x = numbers.with_outliers(num_tokens * hidden);
        if num_tokens > 1 {
            x[7 * hidden] = f32::NAN;
        }
        let spoilt = tensor(&x, &[num_tokens, hidden]);
        let found = grouped_swiglu(&moved(&spoilt), &on_device(&host), &topk).unwrap();
        assert_equal(&found, &grouped_swiglu(&spoilt, &host, &topk).unwrap());
        x.iter_mut().filter(|x| x.is_nan()).for_each(|x| *x = 1.0);
        let [_, (x, device_x, _)] = on_both(&tensor(&x, &[num_tokens, hidden]));
        let found = grouped_swiglu(&device_x, &on_device(&host), &topk).unwrap();
        assert_same(&found, &grouped_swiglu(&x, &host, &topk).unwrap(), (DType::BF16, BF16_TOLERANCE));
    }
}

#[test]
fn experts_that_are_not_quantized() {
    let mut numbers = Numbers::new(51);
    let all = [WeightFormat::Bf16, WeightFormat::F32, WeightFormat::F16, WeightFormat::Quantized(QuantFormat::INT8)];
    let formats: [&[WeightFormat]; 4] = [&all[..1], &all, &all[..3], &all[..1]];
    for (formats, [num_tokens, num_experts, hidden, intermediate, k]) in formats.into_iter().zip(SHAPES) {
        let host = Experts::new(experts(&mut numbers, formats, [num_experts, hidden, intermediate])).unwrap();
        let topk = choose(&mut numbers, num_tokens, num_experts, k);
        for (x, device_x, _) in on_both(&numbers.tensor(&[num_tokens, hidden])) {
            let tolerance = if device_x.dtype() == DType::BF16 { BF16_TOLERANCE } else { 1e-5 };
            let found = grouped_swiglu(&device_x, &on_device(&host), &topk).unwrap();
            assert_same(&found, &grouped_swiglu(&x, &host, &topk).unwrap(), (device_x.dtype(), tolerance));
        }
    }
}

/// What a checkpoint may have: another format for `down` than for `gate_up`, and all kinds of gates.
#[test]
fn matrices_of_an_expert_may_differ() {
    let mut numbers = Numbers::new(52);
    let [num_tokens, num_experts, hidden, intermediate] = [12, 4, 64, 64];
    let formats = [WeightFormat::Bf16, WeightFormat::Quantized(QuantFormat::INT8)];
    for activation in [
        GluActivation::Silu,
        GluActivation::ClampedSwish { alpha: 1.702, limit: 1.5 },
        GluActivation::Pointwise(Pointwise::Tanh),
    ] {
        let [of_gate_up, of_down] =
            formats.map(|format| experts(&mut numbers, &[format], [num_experts, hidden, intermediate]));
        let both = of_gate_up.into_iter().zip(of_down).map(|pair| match pair {
            (Expert::Glu(first), Expert::Glu(second)) => Expert::Glu(ExpertWeights {
                down: second.down,
                activation: match first.activation {
                    ExpertActivation::Gated(_) => ExpertActivation::Gated(activation),
                    ExpertActivation::Plain(_) => ExpertActivation::Plain(Pointwise::Gelu),
                },
                ..first
            }),
            _ => Expert::Identity,
        });
        let host = Experts::new(both.collect()).unwrap();
        let topk = choose(&mut numbers, num_tokens, num_experts, 2);
        for (x, device_x, _) in on_both(&numbers.tensor(&[num_tokens, hidden])) {
            let tolerance = if device_x.dtype() == DType::BF16 { BF16_TOLERANCE } else { 5e-3 };
            let found = grouped_swiglu(&device_x, &on_device(&host), &topk).unwrap();
            assert_same(&found, &grouped_swiglu(&x, &host, &topk).unwrap(), (device_x.dtype(), tolerance));
        }
    }
}

#[test]
fn a_token_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(53);
    for format in [WeightFormat::Bf16, WeightFormat::Quantized(QuantFormat::INT4)] {
        let layer = on_device(&Experts::new(experts(&mut numbers, &[format], [4, 64, 32])).unwrap());
        let topk = choose(&mut numbers, 150, 4, 2);
        for (_, x, _) in on_both(&numbers.tensor(&[150, 64])) {
            let all = grouped_swiglu(&x, &layer, &topk).unwrap();
            for (first, len) in [(0, 1), (3, 1), (90, 1), (77, 20), (149, 1)] {
                let pairs = first * 2..(first + len) * 2;
                let (experts, weights) = (topk.experts[pairs.clone()].to_vec(), topk.weights[pairs].to_vec());
                let part = x.narrow(0, first, len).unwrap();
                let found = grouped_swiglu(&part, &layer, &TopK { experts, weights, k: 2 }).unwrap();
                assert_equal(&found, &all.narrow(0, first, len).unwrap());
            }
        }
    }
}

/// Layers without experts that compute, and tokens without experts.
#[test]
fn nothing_to_compute() {
    let mut numbers = Numbers::new(54);
    let x = numbers.tensor(&[3, 24]);
    let identities = Experts::new(vec![Expert::Identity; 2]).unwrap();
    let topk = TopK { experts: vec![1, TopK::NO_EXPERT, 0], weights: vec![0.5, f32::NAN, 2.0], k: 1 };
    let expected = grouped_swiglu(&x, &identities, &topk).unwrap();
    assert_equal(&grouped_swiglu(&moved(&x), &on_device(&identities), &topk).unwrap(), &expected);
    let none = Experts::new(Vec::new()).unwrap();
    let topk = TopK { experts: vec![TopK::NO_EXPERT; 3], weights: vec![1.0; 3], k: 1 };
    let zeros = x.zeros_like().unwrap();
    assert_equal(&grouped_swiglu(&moved(&x), &on_device(&none), &topk).unwrap(), &zeros);
    let layer = on_device(&Experts::new(experts(&mut numbers, &[WeightFormat::Bf16], [3, 24, 16])).unwrap());
    assert_equal(&grouped_swiglu(&moved(&x), &layer, &topk).unwrap(), &zeros);
    let topk = TopK { experts: Vec::new(), weights: Vec::new(), k: 0 };
    assert_equal(&grouped_swiglu(&moved(&x), &layer, &topk).unwrap(), &zeros);
    let no_rows = moved(&x).narrow(0, 0, 0).unwrap();
    let topk = TopK { k: 2, ..topk };
    assert_eq!(grouped_swiglu(&no_rows, &layer, &topk).unwrap().dims(), [0, 24]);
}

/// Rows from an odd place on.
#[test]
fn inputs_may_begin_anywhere() {
    let mut numbers = Numbers::new(55);
    let host = Experts::new(experts(&mut numbers, &[WeightFormat::Bf16], [3, 24, 16])).unwrap();
    let topk = choose(&mut numbers, 5, 3, 2);
    for (x, device_x, _) in on_both(&numbers.tensor(&[5 * 24 + 1])) {
        let part = |x: &Tensor| x.narrow(0, 1, 5 * 24).unwrap().reshape((5, 24)).unwrap();
        let found = grouped_swiglu(&part(&device_x), &on_device(&host), &topk).unwrap();
        let expected = grouped_swiglu(&part(&x), &host, &topk).unwrap();
        assert_same(&found, &expected, (device_x.dtype(), BF16_TOLERANCE));
    }
}

#[test]
fn refuses_what_is_elsewhere() {
    let mut numbers = Numbers::new(56);
    let host = Experts::new(experts(&mut numbers, &[WeightFormat::F32], [3, 16, 8])).unwrap();
    let (there, x) = (on_device(&host), numbers.tensor(&[2, 16]));
    let topk = TopK { experts: vec![0, 1], weights: vec![1.0; 2], k: 1 };
    let message = |result: crate::Result<Tensor>| result.unwrap_err().to_string();
    let expected = "grouped_swiglu: an expert is on another device";
    assert_eq!(message(grouped_swiglu(&moved(&x), &host, &topk)), expected);
    assert_eq!(message(grouped_swiglu(&x, &there, &topk)), expected);
    assert!(there.to_device(there.device()).unwrap().device().same_device(&DEVICE));
    // Weights that are there already need no second way.
    assert!(Experts::new(there.to_vec()).unwrap().device().same_device(&DEVICE));
    assert!(
        Experts::new([&host[..1], &there[1..]].concat()).unwrap_err().to_string().contains("gate_up is on another")
    );
    let slots = ExpertSlots { formats: vec![Some(WeightFormat::F32); 2], intermediate: 8 };
    let on_pass = |x: &Tensor| {
        grouped_experts(x, &slots, &topk, |pass| {
            let Expert::Glu(first) = &there[0] else { panic!("not an identity") };
            pass.compute(&[(0, first)])
        })
    };
    assert_eq!(message(on_pass(&moved(&x))), "grouped_swiglu: x is not on the device that the op computes on");
    assert_eq!(message(on_pass(&x)), "grouped_swiglu: gate_up is on another device");
}
