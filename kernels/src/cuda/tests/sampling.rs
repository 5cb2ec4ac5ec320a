//! Sampling and log-probabilities, beside the rules by their definitions.

use emulator::{Argument, Launch};
use half::bf16;

use super::{GUARD, Number, bits, for_activations, outputs, outputs_in, stored, widened};
use crate::cuda::address::Address;
use crate::ops::argmax::argmax;
use crate::ops::boltzmann::boltzmann;
use crate::ops::sampling::Draw;
use crate::ops::sampling::arguments::{Adjustment, AdjustmentLists, LogprobRow, NONE, SampleRow, VOCAB_THREADS};
use crate::ops::sampling::cpu::Candidate;
use crate::ops::sampling::reference::{self, running, total};
use crate::testing::Numbers;

/// # Safety
/// As [`emulator::launch`].
unsafe fn launch(kernel: &str, blocks: usize, seed: u32, arguments: &[&dyn Argument]) {
    let shape = Launch { grid: [blocks as u32, 1, 1], block: [VOCAB_THREADS as u32, 1, 1], shared_bytes: 0, seed };
    // SAFETY: the caller's.
    unsafe { emulator::launch(kernel, shape, arguments) }.unwrap();
}

/// Draws from all that weighs something.
const PLAIN: SampleRow =
    SampleRow { row: 0, top_k: 0, temperature: 1.0, top_p: 1.0, min_p: 0.0, is_adjusted: 0, uniform: 0.5 };

fn device_sample<T: Number>(logits: &[T], vocab_size: usize, rows: &[SampleRow], seeds: &[u32]) -> Vec<u32> {
    let [out] = outputs_in(seeds, rows.len(), |seed, [out]: [*mut u32; 1]| {
        let mut scratch = vec![u64::MAX; rows.len() * vocab_size + GUARD];
        let (kernel, candidates, size) = (format!("sample_{}", T::NAME), scratch.as_mut_ptr(), vocab_size as u32);
        // SAFETY: the arguments of the kernel, with room for a candidate for each token of each row.
        unsafe { launch(&kernel, rows.len(), seed, &[&logits.as_ptr(), &rows.as_ptr(), &candidates, &out, &size]) };
        assert!(scratch[rows.len() * vocab_size..].iter().all(|&word| word == u64::MAX), "written behind the scratch");
    });
    out
}

/// What may be drawn, in the order in which it is.
fn candidates(logits: &[f32], params: &SampleRow) -> Vec<Candidate> {
    let SampleRow { temperature, top_k, top_p, min_p, uniform, .. } = *params;
    reference::candidates(logits, &Draw { temperature, top_k, top_p, min_p, uniform, ..Draw::PLAIN })
}

fn expected_token(logits: &[f32], params: &SampleRow) -> u32 {
    let Some(best) = argmax(logits) else { return NONE };
    if params.temperature == 0.0 {
        return best as u32;
    }
    let kept = candidates(logits, params);
    let target = params.uniform * total(&kept);
    kept[running(&kept).position(|sum| sum > target).unwrap_or(kept.len() - 1)].0
}

/// Rows of every kind.
fn rows_of_logits(numbers: &mut Numbers, vocab_size: usize) -> Vec<Vec<f32>> {
    let scaled = |numbers: &mut Numbers, scale: f32| -> Vec<f32> {
        numbers.normal(vocab_size).iter().map(|number| number * scale).collect()
    };
    let mut rows = vec![scaled(numbers, 4.0), scaled(numbers, 0.3), vec![-2.5; vocab_size]];
    // Ties, which bf16 has many of.
    rows.push(scaled(numbers, 3.0).iter().map(|number| number.round()).collect());
    // A mask, and one that is far above others.
    let mut masked = scaled(numbers, 30.0);
    masked.iter_mut().step_by(3).for_each(|logit| *logit = f32::NEG_INFINITY);
    masked[vocab_size / 2] = 60.0;
    rows.push(masked);
    rows
}

fn check_draws<T: Number>() {
    let mut numbers = Numbers::new(11);
    let params = [
        PLAIN,
        SampleRow { temperature: 0.0, ..PLAIN },
        SampleRow { temperature: 0.6, top_k: 1, ..PLAIN },
        SampleRow { temperature: 1.7, top_k: 40, ..PLAIN },
        SampleRow { top_p: 0.9, ..PLAIN },
        SampleRow { temperature: 2.0, top_p: 1e-9, ..PLAIN },
        SampleRow { min_p: 0.05, ..PLAIN },
        SampleRow { temperature: 0.8, top_k: 20, top_p: 0.95, min_p: 0.01, ..PLAIN },
        SampleRow { top_k: 1400, top_p: 0.999, ..PLAIN },
        SampleRow { temperature: 1e-42, ..PLAIN },
    ];
    for vocab_size in [1, 2, 41, 512, 1301] {
        let rows: Vec<Vec<T>> = rows_of_logits(&mut numbers, vocab_size).iter().map(|logits| stored(logits)).collect();
        for (idx, params) in params.iter().enumerate() {
            let mut uniform = || numbers.below(1 << 53) as f64 / (1u64 << 53) as f64;
            let wanted: Vec<SampleRow> =
                (0..rows.len() as u32).map(|row| SampleRow { row, uniform: uniform(), ..*params }).collect();
            let found = device_sample(&rows.concat(), vocab_size, &wanted, &[idx as u32]);
            let expected: Vec<u32> =
                rows.iter().zip(&wanted).map(|(logits, wanted)| expected_token(&widened(logits), wanted)).collect();
            assert_eq!(found, expected, "{wanted:?} of {vocab_size}");
        }
    }
}

#[test]
fn tokens_are_those_of_the_cpu() {
    for_activations!(check_draws);
}

#[test]
fn a_token_does_not_depend_on_order_or_company() {
    let mut numbers = Numbers::new(12);
    let vocab_size = 1009;
    let logits = rows_of_logits(&mut numbers, vocab_size).concat();
    // Of rows with ties and without; some are not asked for, others often.
    let mut rows: Vec<SampleRow> =
        (0..10).map(|idx| SampleRow { row: [3, 3, 1, 3, 4][idx % 5], top_k: 20 + 31 * idx as u32, ..PLAIN }).collect();
    rows.iter_mut().for_each(|row| row.uniform = numbers.below(1000) as f64 / 1000.0);
    rows[4].top_p = 0.9;
    rows[8].top_k = 0;
    let found = device_sample(&logits, vocab_size, &rows, &[0, 1, 2, 3]);
    for (row, found) in rows.iter().zip(found) {
        assert_eq!(device_sample(&logits, vocab_size, &[*row], &[5]), [found]);
    }
}

/// Sums of whole numbers have no roundings.
#[test]
fn a_draw_at_the_end_of_a_token_is_the_next_one() {
    let logits = [1.5f32; 640];
    let params = [PLAIN, SampleRow { top_p: 0.5, ..PLAIN }, SampleRow { top_k: 160, ..PLAIN }];
    let rows = params.map(|params| SampleRow { uniform: 0.25, ..params });
    assert_eq!(device_sample(&logits, 640, &rows, &[0]), [160, 80, 40]);
}

/// Where the random number lies between two tokens, it is one of these two.
#[test]
fn a_draw_between_two_tokens_is_one_of_them() {
    let mut numbers = Numbers::new(13);
    let vocab_size = 2000;
    let logits: Vec<f32> = numbers.normal(vocab_size);
    for params in [PLAIN, SampleRow { top_p: 0.97, ..PLAIN }, SampleRow { top_k: 1200, ..PLAIN }] {
        let kept = candidates(&logits, &params);
        let sums: Vec<f64> = running(&kept).collect();
        let places: Vec<usize> = (0..8).map(|_| numbers.below(kept.len() - 1)).collect();
        let rows: Vec<SampleRow> =
            places.iter().map(|&place| SampleRow { uniform: sums[place] / total(&kept), ..params }).collect();
        for (place, found) in places.into_iter().zip(device_sample(&logits, vocab_size, &rows, &[0])) {
            assert!([kept[place].0, kept[place + 1].0].contains(&found), "{found} at {place} of {params:?}");
        }
        // Near the end, and at the beginning.
        let ends = [0.0, 1.0 - f64::EPSILON / 2.0].map(|uniform| SampleRow { uniform, ..params });
        assert_eq!(device_sample(&logits, vocab_size, &ends, &[0]), [kept[0].0, kept.last().unwrap().0]);
    }
}

#[test]
fn weights_have_the_bits_of_the_cpu() {
    // Segments are full where every token weighs something, so candidates lie in the order of their tokens.
    let vocab_size = 4096;
    let mut numbers = Numbers::new(14);
    let logits: Vec<f32> = numbers.normal(vocab_size).iter().map(|number| number * 4.0).collect();
    let max = logits[argmax(&logits).unwrap()];
    for temperature in [0.5, 0.7, 1.0, 1.9] {
        let mut scratch = vec![0u64; vocab_size];
        let (rows, mut out) = ([SampleRow { temperature, ..PLAIN }], [0u32]);
        let (candidates, token, size) = (scratch.as_mut_ptr(), out.as_mut_ptr(), vocab_size as u32);
        let arguments: [&dyn Argument; 5] = [&logits.as_ptr(), &rows.as_ptr(), &candidates, &token, &size];
        // SAFETY: the arguments of the kernel, with room for a candidate for each token.
        unsafe { launch("sample_float", 1, 1, &arguments) };
        let weights = boltzmann(&logits, max, temperature);
        let of_cpu = |(token, weight): (usize, &f32)| (token as u64) << 32 | u64::from(weight.to_bits());
        assert!(scratch == weights.iter().enumerate().map(of_cpu).collect::<Vec<_>>(), "at {temperature}");
    }
}

#[test]
fn real_vocabularies_are_drawn_from() {
    let mut numbers = Numbers::new(15);
    let vocab_size = 151_936;
    let logits: Vec<bf16> = stored(&numbers.normal(vocab_size).iter().map(|number| number * 2.5).collect::<Vec<_>>());
    let rows = [
        SampleRow { uniform: 0.71, ..PLAIN },
        SampleRow { top_k: 50, top_p: 0.9, temperature: 0.8, uniform: 0.44, ..PLAIN },
        SampleRow { top_p: 0.95, uniform: 0.97, ..PLAIN },
    ];
    let expected = rows.map(|row| expected_token(&widened(&logits), &row));
    assert_eq!(device_sample(&logits, vocab_size, &rows, &[4]), expected);
}

#[test]
fn rows_without_a_usable_number_give_no_token() {
    let (nan, infinite, nothing) = (f32::NAN, f32::INFINITY, f32::NEG_INFINITY);
    let logits = [[0.0, nan, 1.0], [0.0, 1.0, infinite], [nothing; 3], [infinite, nothing, infinite]].concat();
    for temperature in [0.0, 1.0] {
        let row = |row, is_adjusted| SampleRow { row, is_adjusted, temperature, uniform: 0.9, ..PLAIN };
        let rows = [row(0, 0), row(1, 0), row(2, 0), row(3, 0), row(0, 1), row(1, 1), row(2, 1), row(3, 1)];
        let last = if temperature == 0.0 { 0 } else { 2 };
        let expected = [NONE, NONE, NONE, NONE, NONE, 2, NONE, last];
        assert_eq!(device_sample(&logits, 3, &rows, &[0, 1]), expected);
    }
}

/// What one row is adjusted by.
struct Wanted {
    row: usize,
    biases: Vec<(u32, f32)>,
    forbidden: Vec<u32>,
    /// Tokens with their number in the output.
    seen: Vec<(u32, u32)>,
    penalties: [f32; 3],
    allowed: Option<Vec<bool>>,
}

impl Wanted {
    fn nothing(row: usize) -> Self {
        let (biases, forbidden, seen) = (Vec::new(), Vec::new(), Vec::new());
        Self { row, biases, forbidden, seen, penalties: [1.0, 0.0, 0.0], allowed: None }
    }

    fn expected(&self, logits: &[f32]) -> Vec<f32> {
        let mut logits = logits.to_vec();
        if let Some(allowed) = &self.allowed {
            logits
                .iter_mut()
                .zip(allowed)
                .filter(|(_, allowed)| !**allowed)
                .for_each(|(logit, _)| *logit = -f32::INFINITY);
        }
        for &(token, bias) in &self.biases {
            logits.get_mut(token as usize).into_iter().for_each(|logit| *logit += bias);
        }
        for &token in &self.forbidden {
            logits.get_mut(token as usize).into_iter().for_each(|logit| *logit = f32::NEG_INFINITY);
        }
        let [repetition, frequency, presence] = self.penalties;
        for &(token, output_count) in &self.seen {
            let Some(logit) = logits.get_mut(token as usize) else { continue };
            *logit = if *logit > 0.0 { *logit / repetition } else { *logit * repetition };
            if output_count > 0 {
                *logit -= frequency * output_count as f32 + presence;
            }
        }
        logits
    }
}

fn device_adjust<T: Number>(logits: &[T], vocab_size: usize, wanted: &[Wanted]) -> Vec<f32> {
    let [out] = outputs(wanted.len() * vocab_size, |seed, [out]: [*mut f32; 1]| {
        adjust(logits.as_ptr(), out, vocab_size, wanted, seed);
    });
    out
}

fn adjust<T: Number>(logits: *const T, out: *mut f32, vocab_size: usize, wanted: &[Wanted], seed: u32) {
    let (mut adjustments, mut masks) = (Vec::new(), Vec::new());
    let (mut biases, mut forbidden, mut seen) = (Vec::new(), Vec::new(), Vec::new());
    for row in wanted {
        let part = |before: usize, own: usize| [before as u32, own as u32];
        let parts = [
            part(biases.len(), row.biases.len()),
            part(forbidden.len(), row.forbidden.len()),
            part(seen.len(), row.seen.len()),
        ];
        let mask = row.allowed.as_ref().map_or(NONE, |_| (masks.len() / vocab_size.div_ceil(32)) as u32);
        for word in row.allowed.iter().flat_map(|allowed| allowed.chunks(32)) {
            masks.push((0..word.len()).fold(0u32, |bits, bit| bits | u32::from(word[bit]) << bit));
        }
        adjustments.push(Adjustment { row: row.row as u32, mask, parts, penalties: row.penalties });
        biases.extend_from_slice(&row.biases);
        forbidden.extend_from_slice(&row.forbidden);
        seen.extend_from_slice(&row.seen);
    }
    let (bias_tokens, biases): (Vec<u32>, Vec<f32>) = biases.into_iter().unzip();
    let (seen, output_counts): (Vec<u32>, Vec<u32>) = seen.into_iter().unzip();
    let lists = AdjustmentLists {
        bias_tokens: Address::of_host(bias_tokens.as_ptr()),
        biases: Address::of_host(biases.as_ptr()),
        forbidden: Address::of_host(forbidden.as_ptr()),
        seen: Address::of_host(seen.as_ptr()),
        output_counts: Address::of_host(output_counts.as_ptr()),
        masks: Address::of_host(masks.as_ptr()),
    };
    let (kernel, size) = (format!("adjust_logits_{}", T::NAME), vocab_size as u32);
    // SAFETY: the arguments of the kernel; the parts are those of the lists.
    unsafe { launch(&kernel, wanted.len(), seed, &[&logits, &out, &adjustments.as_ptr(), &lists, &size]) };
}

fn check_adjustments<T: Number>() {
    let mut numbers = Numbers::new(16);
    for vocab_size in [1, 40, 1500] {
        let logits: Vec<T> = stored(&numbers.normal(4 * vocab_size));
        let token = |numbers: &mut Numbers| numbers.below(vocab_size + 2) as u32;
        let mut full = Wanted { penalties: [1.3, 0.37, -0.61], ..Wanted::nothing(1) };
        let mut tokens: Vec<u32> = (0..700).map(|_| token(&mut numbers)).collect();
        full.forbidden = tokens[..5].to_vec();
        tokens.sort_unstable();
        tokens.dedup();
        full.biases = tokens.iter().map(|&token| (token, (token % 7) as f32 * 0.3 - 1.0)).collect();
        full.seen = tokens.iter().rev().map(|&token| (token, token % 4)).collect();
        let allowed = (0..vocab_size).map(|_| numbers.below(3) > 0).collect();
        let boosted = Wanted { seen: vec![(0, 0)], penalties: [1e-39, 0.0, 0.0], ..Wanted::nothing(2) };
        let masked = Wanted { allowed: Some(allowed), biases: full.biases.clone(), ..Wanted::nothing(0) };
        let denied = Wanted { allowed: Some(vec![false; vocab_size]), ..Wanted::nothing(0) };
        let wanted = [masked, full, boosted, Wanted::nothing(3), denied];
        let found = device_adjust(&logits, vocab_size, &wanted);
        for (wanted, found) in wanted.iter().zip(found.chunks(vocab_size)) {
            let row = widened(&logits[wanted.row * vocab_size..][..vocab_size]);
            assert_eq!(bits(found), bits(&wanted.expected(&row)), "row {} of {vocab_size}", wanted.row);
        }
        if T::NAME == "float" {
            // In place, where what one row writes behind its own is the next one's.
            let rows = widened(&logits);
            let [changed] = outputs(rows.len(), |seed, [out]: [*mut f32; 1]| {
                // SAFETY: the output has as many numbers.
                unsafe { out.copy_from_nonoverlapping(rows.as_ptr(), rows.len()) };
                adjust(out.cast_const(), out, vocab_size, &wanted[..4], seed);
            });
            assert_eq!(bits(&changed), bits(&found[..rows.len()]));
        }
    }
}

#[test]
fn logits_are_adjusted_as_on_the_cpu() {
    for_activations!(check_adjustments);
}

#[test]
fn a_row_that_is_unsound_stays_so() {
    for logits in [[0.0, f32::NAN], [f32::INFINITY, 0.0]] {
        let forbids_all = Wanted { forbidden: vec![0, 1], allowed: Some(vec![false; 2]), ..Wanted::nothing(0) };
        assert!(device_adjust(&logits, 2, &[forbids_all])[0].is_nan());
    }
}

/// Log-probabilities of tokens, with as many of the most likely ones of each row, and these.
fn device_logprobs<T: Number>(
    logits: &[T],
    vocab_size: usize,
    tokens: &[u32],
    num_top: &[u32],
) -> (Vec<f32>, Vec<u32>, Vec<f32>) {
    let max_top = 8u32;
    let rows: Vec<LogprobRow> =
        num_top.iter().enumerate().map(|(row, &num_top)| LogprobRow { row: row as u32, num_top }).collect();
    let (len, top_len) = (rows.len(), rows.len() * max_top as usize);
    let run = |seed, logprobs: *mut f32, top_tokens: *mut u32, top_logprobs: *mut f32| {
        let (kernel, size) = (format!("log_softmax_top_{}", T::NAME), vocab_size as u32);
        let inputs: [&dyn Argument; 3] = [&logits.as_ptr(), &rows.as_ptr(), &tokens.as_ptr()];
        let arguments = [&inputs[..], &[&logprobs, &top_tokens, &top_logprobs, &size, &max_top]].concat();
        // SAFETY: the arguments of the kernel; no row wants more than the most.
        unsafe { launch(&kernel, len, seed, &arguments) };
    };
    // Whichever are not looked at go where there is room for them.
    let (floats, words) = (|len| vec![0f32; len], || vec![0u32; top_len]);
    let [logprobs] = outputs_in(&[0, 1], len, |seed, [out]: [*mut f32; 1]| {
        run(seed, out, words().as_mut_ptr(), floats(top_len).as_mut_ptr());
    });
    let [top_tokens] = outputs_in(&[0, 2], top_len, |seed, [out]: [*mut u32; 1]| {
        run(seed, floats(len).as_mut_ptr(), out, floats(top_len).as_mut_ptr());
    });
    let [top_logprobs] = outputs_in(&[0, 3], top_len, |seed, [out]: [*mut f32; 1]| {
        run(seed, floats(len).as_mut_ptr(), words().as_mut_ptr(), out);
    });
    (logprobs, top_tokens, top_logprobs)
}

#[track_caller]
fn assert_logprob(found: f32, logits: &[f32], token: u32) {
    let max = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let sum: f64 = logits.iter().map(|&logit| (f64::from(logit) - max).exp()).sum();
    let expected = (f64::from(logits[token as usize]) - (max + sum.ln())) as f32;
    let is_close = (found - expected).abs() <= 3e-7 * (1.0 + expected.abs());
    let is_same = found == expected || found.is_nan() && expected.is_nan();
    assert!(is_close || is_same, "{found}, expected {expected}, token {token}");
}

fn check_logprobs<T: Number>() {
    let mut numbers = Numbers::new(17);
    for vocab_size in [1, 5, 600, 4099] {
        let mut rows = rows_of_logits(&mut numbers, vocab_size);
        (rows[1][0], rows[1][vocab_size / 2]) = (-0.0, 0.0);
        rows.push(vec![f32::NEG_INFINITY; vocab_size]);
        let logits: Vec<T> = stored(&rows.concat());
        let exact = widened(&logits);
        let mut tokens: Vec<u32> = rows.iter().map(|_| numbers.below(vocab_size) as u32).collect();
        tokens[2] = NONE;
        let num_top = [8, 3, 5, 8, 1, 0];
        let (logprobs, top_tokens, top_logprobs) = device_logprobs(&logits, vocab_size, &tokens, &num_top);
        for (row, logits) in exact.chunks(vocab_size).enumerate() {
            if tokens[row] == NONE {
                assert!(logprobs[row].is_nan());
            } else {
                assert_logprob(logprobs[row], logits, tokens[row]);
            }
            let mut ids: Vec<u32> = (0..vocab_size as u32).collect();
            ids.sort_unstable_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]).then(a.cmp(&b)));
            ids.truncate(num_top[row] as usize);
            let found = &top_tokens[row * 8..][..8];
            assert_eq!(found[..ids.len()], ids, "row {row} of {vocab_size}");
            assert!(found[ids.len()..].iter().all(|&token| token == 0xdead_beef));
            for (&token, &found) in ids.iter().zip(&top_logprobs[row * 8..]) {
                assert_logprob(found, logits, token);
            }
        }
    }
}

#[test]
fn logprobs_are_those_of_the_cpu() {
    for_activations!(check_logprobs);
}
