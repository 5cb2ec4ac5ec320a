//! Routers.

use emulator::Launch;

use super::{ROW_THREADS, outputs};
use crate::ops::route::device_router::DeviceRouter;
use crate::ops::route::{GroupScore, Groups, RouterSpec, Scoring, route};
use crate::testing::{Numbers, tensor};

fn device_route(logits: &[f32], num_experts: usize, spec: &RouterSpec) -> (Vec<u32>, Vec<f32>) {
    let num_tokens = logits.len() / num_experts;
    let len = num_tokens * spec.top_k;
    let bias = spec.bias.as_ref().map_or(std::ptr::null(), |bias| bias.as_ptr());
    let run = |seed, experts: *mut u32, weights: *mut f32| {
        let shape = Launch {
            grid: [num_tokens as u32, 1, 1],
            block: [ROW_THREADS as u32, 1, 1],
            shared_bytes: 9 * num_experts,
            seed,
        };
        let router = DeviceRouter::new(spec, num_experts);
        // SAFETY: the arguments of the kernel; the bias is as long as there are experts.
        let done = unsafe { emulator::launch("route", shape, &[&logits.as_ptr(), &bias, &experts, &weights, &router]) };
        done.unwrap();
    };
    // Whichever of the two is not looked at goes where there is room for it.
    let [experts] = outputs(len, |seed, [out]: [*mut u32; 1]| run(seed, out, vec![0f32; len].as_mut_ptr()));
    let [weights] = outputs(len, |seed, [out]: [*mut f32; 1]| run(seed, vec![0u32; len].as_mut_ptr(), out));
    (experts, weights)
}

#[test]
fn routers_choose_as_on_the_cpu() {
    const TOKENS: usize = 6;
    let mut numbers = Numbers::new(8);
    for num_experts in [8, 64, 384] {
        let spec = |top_k, scoring| RouterSpec::new(scoring, top_k);
        let groups = |score, masked| Some(Groups { num: 4, top: 2, score, masked });
        let specs = [
            spec(2, Scoring::SoftmaxTopK),
            spec(num_experts.min(16), Scoring::Softmax),
            RouterSpec { renormalize: Some(0.0), min_sum: 0.5, ..spec(4, Scoring::Softmax) },
            RouterSpec { groups: groups(GroupScore::Max, 0.0), scale: 16.0, ..spec(3, Scoring::Softmax) },
            RouterSpec {
                bias: Some(numbers.normal(num_experts)),
                groups: groups(GroupScore::TopTwoSum, f32::NEG_INFINITY),
                renormalize: Some(1e-20),
                scale: 2.5,
                ..spec(4, Scoring::Sigmoid)
            },
            spec(2, Scoring::SparseMixer { jitter: 0.01 }),
            spec(2, Scoring::SparseMixer { jitter: 0.5 }),
        ];
        for spec in specs {
            let mut logits = numbers.normal(TOKENS * num_experts);
            // Ties, and one token that a NaN spoils.
            logits[..num_experts].fill(0.5);
            logits[num_experts + 3] = f32::NAN;
            let expected = route(&tensor(&logits, &[TOKENS, num_experts]), &spec).unwrap();
            let (experts, weights) = device_route(&logits, num_experts, &spec);
            assert_eq!(experts, expected.experts, "{spec:?} of {num_experts}");
            for (found, expected) in weights.chunks(spec.top_k).zip(expected.weights.chunks(spec.top_k)) {
                let is_close =
                    |(a, b): (&f32, &f32)| (a - b).abs() <= 2e-6 * b.abs().max(1e-3) || a.is_nan() && b.is_nan();
                assert!(found.iter().zip(expected).all(is_close), "{spec:?}: {found:?}, expected {expected:?}");
            }
            let (alone, _) = device_route(&logits[5 * num_experts..6 * num_experts], num_experts, &spec);
            assert_eq!(alone, experts[5 * spec.top_k..6 * spec.top_k]);
        }
    }
}
