//! Parity with the oracle, row invariance to the bit, and refused inputs.

use super::{
    Expert, ExpertActivation, ExpertBiases, ExpertPass, ExpertSlots, ExpertWeights, Experts, GroupedSwiglu, Sizes,
    TopK, grouped_experts, grouped_swiglu, reference,
};
use crate::error::KernelError;
use crate::ops::glu::GluActivation;
use crate::ops::pointwise::Pointwise;
use crate::testing::{Numbers, QUANTIZED, assert_close, bits, tensor, values};
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

fn layer(experts: Vec<Expert>) -> Experts {
    Experts::new(experts).unwrap()
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
            let experts = layer(experts(&mut numbers, format, [num_experts, hidden_size, intermediate]));
            let topk = choose(&mut numbers, num_tokens, num_experts, k);
            let x = numbers.with_outliers(num_tokens * hidden_size);
            let sizes = Sizes { hidden: hidden_size, intermediate };
            let op = GroupedSwiglu { num_tokens, sizes, experts: &experts, chosen: (&topk).into() };
            let y = grouped_swiglu(&tensor(&x, &[num_tokens, hidden_size]), &experts, &topk).unwrap();
            assert_close(&values(&y), &reference::grouped_swiglu(&op, &topk, &x), 1e-5);
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
        let experts = layer(varied(&mut numbers, [num_experts, hidden_size, intermediate]));
        let topk = choose(&mut numbers, num_tokens, num_experts, k);
        let x = numbers.normal(num_tokens * hidden_size);
        let sizes = Sizes { hidden: hidden_size, intermediate };
        let op = GroupedSwiglu { num_tokens, sizes, experts: &experts, chosen: (&topk).into() };
        let y = grouped_swiglu(&tensor(&x, &[num_tokens, hidden_size]), &experts, &topk).unwrap();
        assert_close(&values(&y), &reference::grouped_swiglu(&op, &topk, &x), 1e-5);
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let mut numbers = Numbers::new(2);
    let plain = layer(experts(&mut numbers, WeightFormat::Bf16, [6, 75, 50]));
    let varied = layer(varied(&mut numbers, [6, 75, 50]));
    check_rows(&mut numbers, &plain);
    check_rows(&mut numbers, &varied);
}

fn check_rows(numbers: &mut Numbers, experts: &Experts) {
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
    let experts = layer(experts(&mut numbers, WeightFormat::F32, [2, 16, 16]));
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
    let experts = layer(experts(&mut numbers, WeightFormat::F32, [2, 8, 4]));
    let topk = |experts: Vec<u32>, k| TopK { weights: vec![1.0; experts.len()], experts, k };
    let x = numbers.tensor(&[2, 8]);
    assert!(grouped_swiglu(&x, &experts, &topk(vec![0, 1], 1)).is_ok());
    assert!(grouped_swiglu(&x, &experts, &topk(vec![0, 2], 1)).is_err());
    assert!(grouped_swiglu(&x, &experts, &topk(vec![0], 1)).is_err());
    assert!(grouped_swiglu(&numbers.tensor(&[2, 9]), &experts, &topk(vec![0, 1], 1)).is_err());
    let Expert::Glu(first) = &experts[0] else { unreachable!("all are gated") };
    let swapped = Expert::Glu(ExpertWeights::swiglu(first.down.clone(), first.gate_up.clone()));
    assert!(Experts::new(vec![swapped]).is_err());
    let [mut of_one_size, of_another] =
        [[1, 8, 4], [1, 8, 6]].map(|shape| self::experts(&mut numbers, WeightFormat::F32, shape));
    of_one_size.extend(of_another);
    assert!(Experts::new(of_one_size).is_err());
    assert!(Experts::new(Vec::new()).unwrap().device().is_cpu());
}

/// Gives all experts that a part needs in random groups, in random order.
fn supply(numbers: &mut Numbers, pass: &mut ExpertPass<'_>, experts: &[Expert]) -> Result<(), KernelError> {
    let mut left: Vec<usize> = pass.needed().map(|(expert, _)| expert).collect();
    while !left.is_empty() {
        let here: Vec<usize> =
            (0..=numbers.below(left.len())).map(|_| left.swap_remove(numbers.below(left.len()))).collect();
        let here: Vec<_> =
            here.iter().map(|&idx| (idx, experts[idx].glu().expect("identities are not needed"))).collect();
        pass.compute(&here)?;
    }
    Ok(())
}

fn slots(experts: &[Expert], intermediate: usize) -> ExpertSlots {
    let formats = experts.iter().map(|expert| expert.glu().map(|expert| expert.gate_up.format())).collect();
    ExpertSlots { formats, intermediate }
}

#[test]
fn experts_may_come_in_any_groups_and_order() {
    let mut numbers = Numbers::new(6);
    let quantized = QUANTIZED.map(WeightFormat::Quantized);
    let formats = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16].into_iter().chain(quantized);
    for format in formats {
        let experts = layer(experts(&mut numbers, format, [7, 70, 40]));
        check_groups(&mut numbers, &experts, [90, 70, 40]);
    }
    let varied = layer(varied(&mut numbers, [7, 35, 19]));
    check_groups(&mut numbers, &varied, [1, 35, 19]);
    check_groups(&mut numbers, &varied, [200, 35, 19]);
    // Neighbours of other formats in one layer.
    let mut mixed = experts(&mut numbers, WeightFormat::F32, [5, 64, 32]);
    mixed.extend(experts(&mut numbers, quantized[0], [3, 64, 32]));
    let mixed = layer(mixed);
    check_groups(&mut numbers, &mixed, [50, 64, 32]);
    check_groups(&mut numbers, &mixed, [0, 64, 32]);
}

fn check_groups(numbers: &mut Numbers, experts: &Experts, [num_tokens, hidden_size, intermediate]: [usize; 3]) {
    let topk = choose(numbers, num_tokens, experts.len(), 3);
    let x = numbers.tensor(&[num_tokens, hidden_size]);
    let whole = bits(&grouped_swiglu(&x, experts, &topk).unwrap());
    for _ in 0..4 {
        let apart = grouped_experts(&x, &slots(experts, intermediate), &topk, |pass| supply(numbers, pass, experts));
        assert_eq!(bits(&apart.unwrap()), whole);
    }
}

/// So wide that the tokens go in parts, and the rows of a part in several.
#[test]
fn long_inputs_go_in_parts() {
    let mut numbers = Numbers::new(7);
    let [num_tokens, hidden_size, intermediate, k] = [700, 16_384, 3, 8];
    let experts = layer(experts(&mut numbers, WeightFormat::Bf16, [9, hidden_size, intermediate]));
    let topk = choose(&mut numbers, num_tokens, 9, k);
    let x = numbers.tensor(&[num_tokens, hidden_size]);
    let mut num_parts = 0;
    let apart = grouped_experts(&x, &slots(&experts, intermediate), &topk, |pass| {
        num_parts += 1;
        supply(&mut numbers, pass, &experts)
    });
    assert_eq!(num_parts, 2);
    assert!(bits(&apart.unwrap()) == bits(&grouped_swiglu(&x, &experts, &topk).unwrap()));
}

#[test]
fn an_expert_that_cannot_be_had_spoils_the_tokens_that_chose_it() {
    let mut numbers = Numbers::new(8);
    let experts = layer(experts(&mut numbers, WeightFormat::F32, [4, 16, 8]));
    let topk = choose(&mut numbers, 40, 4, 2);
    let x = numbers.tensor(&[40, 16]);
    let whole = values(&grouped_swiglu(&x, &experts, &topk).unwrap());
    let broken = grouped_experts(&x, &slots(&experts, 8), &topk, |pass| {
        pass.fail(2);
        let needed: Vec<usize> = pass.needed().map(|(expert, _)| expert).collect();
        let others = needed.into_iter().filter(|&expert| expert != 2);
        let here: Vec<_> = others.map(|idx| (idx, experts[idx].glu().unwrap())).collect();
        pass.compute(&here)
    });
    for (token, (broken, whole)) in values(&broken.unwrap()).chunks(16).zip(whole.chunks(16)).enumerate() {
        let chose_it = topk.experts[2 * token..2 * token + 2].contains(&2);
        assert!(if chose_it { broken.iter().all(|value| value.is_nan()) } else { broken == whole }, "token {token}");
    }
}

#[test]
fn refuses_experts_that_were_not_announced() {
    let mut numbers = Numbers::new(9);
    let [plain, other] = [WeightFormat::F32, WeightFormat::Bf16].map(|format| experts(&mut numbers, format, [2, 8, 4]));
    let topk = TopK { experts: vec![0, 1], weights: vec![1.0; 2], k: 1 };
    let x = numbers.tensor(&[2, 8]);
    let run = |supply: &dyn Fn(&mut ExpertPass<'_>) -> Result<(), KernelError>| {
        grouped_experts(&x, &slots(&plain, 4), &topk, supply).map(drop).map_err(|error| error.to_string())
    };
    let [first, second] = [0, 1].map(|idx| (idx, plain[idx].glu().unwrap()));
    assert_eq!(run(&|pass| pass.compute(&[first, second])), Ok(()));
    assert!(run(&|pass| pass.compute(&[first])).unwrap_err().contains("expert 1 was not supplied"));
    assert!(run(&|pass| pass.compute(&[first, first])).unwrap_err().contains("expert 0 came twice"));
    let strange = (1, other[1].glu().unwrap());
    assert!(run(&|pass| pass.compute(&[first, strange])).unwrap_err().contains("bf16"));
    assert!(run(&|pass| pass.compute(&[(2, first.1)])).is_err());
}

/// A third of the slots are empty, of some tokens all.
fn empty_some(numbers: &mut Numbers, topk: &mut TopK) {
    for slots in topk.experts.chunks_mut(topk.k) {
        let all = numbers.below(8) == 0;
        slots.iter_mut().filter(|_| all || numbers.below(3) == 0).for_each(|expert| *expert = TopK::NO_EXPERT);
    }
}

#[test]
fn empty_slots_give_nothing() {
    let mut numbers = Numbers::new(10);
    for [num_tokens, num_experts, hidden_size, intermediate, k] in
        [[1, 2, 8, 8, 2], [70, 5, 35, 19, 3], [300, 4, 64, 96, 2]]
    {
        let experts = layer(varied(&mut numbers, [num_experts, hidden_size, intermediate]));
        let mut topk = choose(&mut numbers, num_tokens, num_experts, k);
        empty_some(&mut numbers, &mut topk);
        // What is in an empty slot beside the expert does not matter.
        let empty = topk.weights.iter_mut().zip(&topk.experts).filter(|(_, expert)| **expert == TopK::NO_EXPERT);
        empty.for_each(|(weight, _)| *weight = f32::NAN);
        let x = numbers.normal(num_tokens * hidden_size);
        let sizes = Sizes { hidden: hidden_size, intermediate };
        let op = GroupedSwiglu { num_tokens, sizes, experts: &experts, chosen: (&topk).into() };
        let input = tensor(&x, &[num_tokens, hidden_size]);
        let y = grouped_swiglu(&input, &experts, &topk).unwrap();
        assert_close(&values(&y), &reference::grouped_swiglu(&op, &topk, &x), 1e-5);
        let slots = slots(&experts, intermediate);
        let apart = grouped_experts(&input, &slots, &topk, |pass| supply(&mut numbers, pass, &experts));
        assert_eq!(bits(&apart.unwrap()), bits(&y));
    }
}

#[test]
fn a_token_with_an_empty_slot_is_one_that_never_had_it() {
    let mut numbers = Numbers::new(11);
    for format in [WeightFormat::Bf16, WeightFormat::Quantized(QUANTIZED[0])] {
        let experts = layer(experts(&mut numbers, format, [6, 64, 32]));
        let full = choose(&mut numbers, 40, 6, 3);
        let x = numbers.tensor(&[40, 64]);
        let mut emptied = full.clone();
        emptied.experts.iter_mut().skip(2).step_by(3).for_each(|expert| *expert = TopK::NO_EXPERT);
        let first_two = |values: &[u32]| values.chunks(3).flat_map(|slots| slots[..2].to_vec()).collect::<Vec<u32>>();
        let weights: Vec<u32> = full.weights.iter().map(|weight| weight.to_bits()).collect();
        let weights = first_two(&weights).into_iter().map(f32::from_bits).collect();
        let shorter = TopK { experts: first_two(&full.experts), weights, k: 2 };
        let y = bits(&grouped_swiglu(&x, &experts, &emptied).unwrap());
        assert_eq!(y, bits(&grouped_swiglu(&x, &experts, &shorter).unwrap()));
        // Experts of empty slots alone are not asked for.
        let mut needed = Vec::new();
        let only = TopK { experts: vec![4, TopK::NO_EXPERT], weights: vec![1.0; 2], k: 2 };
        let row = x.narrow(0, 0, 1).unwrap();
        grouped_experts(&row, &slots(&experts, 32), &only, |pass| {
            needed.extend(pass.needed());
            supply(&mut numbers, pass, &experts)
        })
        .unwrap();
        assert_eq!(needed, [(4, 1)]);
    }
}
