//! Rows of logits of every kind, side by side.

use candle_core::{DType, Device};

use super::{DEVICE, on_both};
use crate::ops::sampling::{Choice, Draw, LogitRow, Penalties, read_logits};
use crate::testing::Numbers;

fn drawn(draw: Draw, num_logprobs: Option<u32>) -> LogitRow {
    LogitRow { choice: Choice::Draw(draw), num_logprobs }
}

/// Kinds and wishes in an order that no launch has them in.
fn rows(vocab_size: usize) -> Vec<LogitRow> {
    let penalties =
        Penalties { repetition: 1.4, frequency: 0.3, presence: -0.2, seen: vec![(3, 2), (0, 0), (99_999, 1)] };
    let greedy = Draw { temperature: 0.0, ..Draw::PLAIN };
    vec![
        drawn(Draw { penalties: Some(penalties.clone()), uniform: 0.9, ..Draw::PLAIN }, None),
        LogitRow { choice: Choice::Known(vocab_size as u32 - 1), num_logprobs: None },
        drawn(greedy.clone(), Some(3)),
        drawn(Draw { uniform: 0.01, top_k: 7, ..Draw::PLAIN }, None),
        LogitRow { choice: Choice::Known(2), num_logprobs: Some(5) },
        drawn(Draw { bias: vec![(4, 3.0), (99_999, 1.0)], forbidden: vec![2, 5], ..greedy.clone() }, Some(0)),
        drawn(Draw { uniform: 0.7, top_p: 0.8, temperature: 0.6, min_p: 0.01, ..Draw::PLAIN }, Some(20)),
        drawn(Draw { penalties: Some(penalties), forbidden: vec![1], ..greedy }, None),
    ]
}

#[test]
fn rows_of_every_kind_are_read_as_on_the_cpu() {
    let mut numbers = Numbers::new(90);
    for vocab_size in [8, 700] {
        let asked = rows(vocab_size);
        for (logits, device_logits, _) in on_both(&numbers.tensor(&[asked.len(), vocab_size])) {
            let expected = read_logits(&logits, &asked).unwrap();
            let found = read_logits(&device_logits, &asked).unwrap();
            for (idx, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.token, expected.token, "row {idx}");
                assert_eq!(found.logprob.is_some(), expected.logprob.is_some(), "row {idx}");
                assert_eq!(found.top.len(), expected.top.len(), "row {idx}");
                let pairs = found.top.iter().zip(&expected.top).map(|(found, expected)| {
                    assert_eq!(found.0, expected.0, "row {idx}");
                    (found.1, expected.1)
                });
                for (found, expected) in pairs.chain(found.logprob.zip(expected.logprob)) {
                    assert!(
                        (found - expected).abs() <= 1e-6 * (1.0 + expected.abs()),
                        "row {idx}: {found}, {expected}"
                    );
                }
            }
            // Each alone, as a part of the whole.
            for (idx, row) in asked.iter().enumerate() {
                let alone = device_logits.narrow(0, idx, 1).unwrap();
                assert_eq!(read_logits(&alone, std::slice::from_ref(row)).unwrap()[0], found[idx], "row {idx}");
            }
        }
    }
}

#[test]
fn rows_without_a_usable_number_give_no_token() {
    let rows = [[f32::NAN, 0.0], [f32::NEG_INFINITY; 2], [0.0, 1.0]].concat();
    let logits = candle_core::Tensor::from_vec(rows, (3, 2), &DEVICE).unwrap();
    for forbidden in [Vec::new(), vec![0]] {
        let asked = vec![drawn(Draw { forbidden, ..Draw::PLAIN }, Some(1)); 3];
        let found = read_logits(&logits, &asked).unwrap();
        assert_eq!(found.iter().map(|row| row.token.is_some()).collect::<Vec<_>>(), [false, false, true]);
        assert!(found[0].logprob.is_none() && found[0].top.is_empty() && found[2].top.len() == 1);
    }
    assert!(read_logits(&logits.narrow(0, 0, 0).unwrap(), &[]).unwrap().is_empty());
    let halves = logits.to_device(&Device::Cpu).unwrap().to_dtype(DType::BF16).unwrap();
    assert!(read_logits(&halves, &vec![drawn(Draw::PLAIN, None); 3]).is_err(), "bf16 is for devices");
}
