//! Options of rows side by side, the order in which options act, and salts.

use kernels::Groups;
use scheduler::BlockId;

use super::*;
use crate::forward_input::{ChunkRows, Pass};

const NONE: u32 = TopK::NO_EXPERT;

/// Sequences of so many rows, each with its options.
fn input(sequences: &[(usize, ExpertOptions)]) -> ForwardInput {
    let mut input = ForwardInput::default();
    input.clear(Pass::Decoder);
    for &(len, experts) in sequences {
        let tokens = vec![1; len];
        let rows = ChunkRows {
            start: 0,
            tokens: &tokens,
            source_len: 0,
            blocks: &[BlockId(0)],
            window: None,
            state_slot: None,
            experts,
        };
        input.push(rows, 16);
    }
    input
}

fn logits(rows: &[[f32; 4]]) -> Tensor {
    Tensor::from_vec(rows.concat(), (rows.len(), 4), &candle_core::Device::Cpu).unwrap()
}

fn control(options: RoutingOptions) -> RoutingControl {
    RoutingControl::new(options, [4].into_iter())
}

fn route(control: &mut RoutingControl, input: &ForwardInput, rows: &[[f32; 4]], spec: &RouterSpec) -> TopK {
    let router = Router { spec, is_free: &[false; 4], moe_idx: 0 };
    control.route(input, &logits(rows), router).unwrap().into_host().unwrap()
}

fn plain() -> ExpertOptions {
    ExpertOptions::default()
}

/// Softmax of these is 1/2, 1/4, 1/8, 1/8.
fn halves() -> [f32; 4] {
    [0.5f32, 0.25, 0.125, 0.125].map(f32::ln)
}

#[test]
fn nothing_changes_where_all_is_off() {
    let spec = RouterSpec { renormalize: Some(0.0), ..RouterSpec::new(Scoring::Softmax, 3) };
    let rows = [halves(), [0.1, 0.7, f32::NAN, -3.0]];
    let found = route(&mut control(RoutingOptions::default()), &input(&[(1, plain()), (1, plain())]), &rows, &spec);
    let expected = kernels::route(&logits(&rows), &spec).unwrap();
    assert_eq!(found.experts, expected.experts);
    assert_eq!(format!("{:?}", found.weights), format!("{:?}", expected.weights));
}

#[test]
fn each_request_leaves_out_what_it_wants() {
    let top_p = |top_p| ExpertOptions { top_p, ..plain() };
    let input = input(&[
        (2, plain()),
        (1, top_p(0.49)),
        (1, top_p(0.74)),
        (1, ExpertOptions { max_experts: Some(1), ..plain() }),
    ]);
    let rows = [halves(); 5];
    let chosen = |spec: &RouterSpec| route(&mut control(RoutingOptions::default()), &input, &rows, spec);
    let rounded = |topk: &TopK| topk.weights.iter().map(|weight| (weight * 1e4).round() / 1e4).collect::<Vec<f32>>();
    let raw = chosen(&RouterSpec::new(Scoring::Softmax, 3));
    // The chosen three have 0.875: half of that is less than the first, three quarters less than the first two.
    assert_eq!(raw.experts, [0, 1, 2, 0, 1, 2, 0, NONE, NONE, 0, 1, NONE, 0, NONE, NONE]);
    assert_eq!(rounded(&raw)[6..], [0.5, 0.0, 0.0, 0.5, 0.25, 0.0, 0.5, 0.0, 0.0]);
    let whole = chosen(&RouterSpec { renormalize: Some(0.0), ..RouterSpec::new(Scoring::Softmax, 4) });
    assert_eq!(whole.experts[8..], [0, NONE, NONE, NONE, 0, 1, NONE, NONE, 0, NONE, NONE, NONE]);
    assert_eq!(rounded(&whole)[8..], [1.0, 0.0, 0.0, 0.0, 0.6667, 0.3333, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
    assert_eq!(rounded(&whole)[..4], [0.5, 0.25, 0.125, 0.125], "the row of no options stays");
    let of_chosen = chosen(&RouterSpec::new(Scoring::SoftmaxTopK, 4));
    assert_eq!((&of_chosen.experts, &rounded(&of_chosen)[12..14]), (&whole.experts, &[0.6667, 0.3333][..]));
}

#[test]
fn noise_follows_seed_and_position_and_nothing_else() {
    let options = RoutingOptions { noise: 0.5, ..RoutingOptions::default() };
    let seeded = |noise_seed| ExpertOptions { noise_seed, ..plain() };
    let spec = RouterSpec::new(Scoring::Softmax, 4);
    let of = |sequences: &[(usize, ExpertOptions)], first: usize| {
        let num_rows = sequences.iter().map(|(len, _)| len).sum();
        let topk = route(&mut control(options), &input(sequences), &vec![halves(); num_rows], &spec);
        (topk.experts[4 * first..4 * first + 8].to_vec(), topk.weights[4 * first..4 * first + 8].to_vec())
    };
    let alone = of(&[(2, seeded(5))], 0);
    assert_eq!(of(&[(3, seeded(9)), (2, seeded(5)), (1, seeded(5))], 3), alone);
    assert_ne!(alone.1[..4], alone.1[4..], "positions differ");
    assert_ne!(of(&[(2, seeded(6))], 0), alone);
}

#[test]
fn what_was_left_out_takes_no_capacity_and_cuts_are_counted_by_sequence() {
    let capacity = Some(Capacity { factor: 1.0, overflow: Overflow::Drop });
    let mut control = control(RoutingOptions { capacity, ..RoutingOptions::default() });
    let spec = RouterSpec::new(Scoring::Softmax, 2);
    let one = ExpertOptions { max_experts: Some(1), ..plain() };
    // Eight choices, two for each expert; three rows want the first expert, and two of them the second.
    let (first, other) = (halves(), [0.0, 0.0, 2.0, 1.0]);
    let found =
        route(&mut control, &input(&[(1, one), (2, plain()), (1, plain())]), &[first, first, first, other], &spec);
    assert_eq!(found.experts, [0, NONE, 0, 1, NONE, 1, 2, 3]);
    let cut = |num_dropped| CutChoices { num_dropped, num_scaled: 0 };
    assert_eq!(control.take_cut(), [cut(0), cut(1), cut(0)]);
    assert_eq!(control.take_cut(), []);
}

#[test]
fn the_choice_avoids_who_had_too_much_but_weights_stay() {
    let mut control = control(RoutingOptions { overload_decay: 1.0, ..RoutingOptions::default() });
    let spec = RouterSpec { groups: None::<Groups>, ..RouterSpec::new(Scoring::Softmax, 1) };
    let input = input(&[(16, plain())]);
    let mut steps = (0..40).map(|_| route(&mut control, &input, &[halves(); 16], &spec));
    assert_eq!(steps.next().unwrap().experts, [0; 16]);
    let other = steps.find(|topk| topk.experts[0] != 0).expect("another expert has its turn");
    assert_eq!((other.experts[0], (other.weights[0] * 1e4).round()), (1, 2500.0));
}

#[test]
fn salts_tell_options_apart() {
    let salt = [7; 32];
    let options = [
        plain(),
        ExpertOptions { top_p: 0.5, ..plain() },
        ExpertOptions { top_p: 0.6, ..plain() },
        ExpertOptions { max_experts: Some(1), ..plain() },
        ExpertOptions { max_experts: Some(2), ..plain() },
        ExpertOptions { noise_seed: 1, ..plain() },
        ExpertOptions { top_p: 0.5, noise_seed: 1, ..plain() },
    ];
    let salts: Vec<[u8; 32]> = options.iter().flat_map(|options| [options.salt(salt), options.salt([8; 32])]).collect();
    assert_eq!(salts[..2], [salt, [8; 32]], "without options nothing is added");
    for (idx, found) in salts.iter().enumerate() {
        assert!(!salts[..idx].contains(found), "{idx}");
    }
}
