//! Parity with the oracle in both styles, row invariance to the bit, and refused inputs.

use super::{Rope, RopeStyle, RopeTable, reference, rope};
use crate::testing::{Numbers, assert_close, bits, tensor, values};

fn table(max_positions: usize, rotary_dim: usize) -> RopeTable {
    let half = rotary_dim / 2;
    let angle = |i: usize| (i / half) as f64 * 10_000f64.powf(-((i % half) as f64) / half as f64);
    let cos = (0..max_positions * half).map(|i| angle(i).cos() as f32).collect();
    let sin = (0..max_positions * half).map(|i| angle(i).sin() as f32).collect();
    RopeTable::new(cos, sin, rotary_dim).unwrap()
}

#[test]
fn agrees_with_the_reference() {
    let mut numbers = Numbers::new(1);
    for [num_tokens, num_heads, head_dim, rotary_dim] in
        [[0, 2, 8, 8], [1, 1, 2, 2], [5, 3, 24, 16], [40, 9, 64, 64], [33, 1, 64, 64]]
    {
        let table = table(300, rotary_dim);
        let positions: Vec<u32> = (0..num_tokens).map(|_| numbers.below(300) as u32).collect();
        for style in [RopeStyle::Halves, RopeStyle::Pairs] {
            let x = numbers.with_outliers(num_tokens * num_heads * head_dim);
            let mut expected = x.clone();
            let op = Rope { table: &table, positions: &positions, style, num_heads, head_dim };
            reference::rope(&op, &mut expected);
            let y = rope(&tensor(&x, &[num_tokens, num_heads, head_dim]), &table, &positions, style).unwrap();
            assert_close(&values(&y), &expected, 1e-6);
        }
    }
}

#[test]
fn known_pairs_turn() {
    let table = RopeTable::new(vec![1.0, 1.0, 0.0, -1.0], vec![0.0, 0.0, 1.0, 0.0], 4).unwrap();
    let x = tensor(&[1.0, 2.0, 3.0, 4.0, 5.0], &[1, 1, 5]);
    let halves = rope(&x, &table, &[1], RopeStyle::Halves).unwrap();
    assert_eq!(values(&halves), [-3.0, -2.0, 1.0, -4.0, 5.0]);
    let pairs = rope(&x, &table, &[1], RopeStyle::Pairs).unwrap();
    assert_eq!(values(&pairs), [-2.0, 1.0, -3.0, -4.0, 5.0]);
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let table = table(100, 64);
    let x = Numbers::new(2).tensor(&[100, 16, 64]);
    let positions: Vec<u32> = (0..100).rev().collect();
    for style in [RopeStyle::Halves, RopeStyle::Pairs] {
        let whole = bits(&rope(&x, &table, &positions, style).unwrap());
        for row in 0..100 {
            let alone = rope(&x.narrow(0, row, 1).unwrap(), &table, &positions[row..row + 1], style).unwrap();
            assert_eq!(bits(&alone), whole[row * 1024..(row + 1) * 1024]);
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let table = table(10, 8);
    let x = Numbers::new(3).tensor(&[2, 1, 8]);
    assert!(rope(&x, &table, &[0], RopeStyle::Halves).is_err());
    let error = rope(&x, &table, &[0, 10], RopeStyle::Halves).unwrap_err();
    assert_eq!(error.to_string(), "rope: position is 10, it must be below 10");
    assert!(rope(&Numbers::new(3).tensor(&[2, 1, 6]), &table, &[0, 1], RopeStyle::Halves).is_err());
    assert!(RopeTable::new(vec![0.0; 3], vec![0.0; 3], 4).is_err());
    assert!(RopeTable::new(vec![0.0; 4], vec![0.0; 3], 4).is_err());
    assert!(RopeTable::new(vec![0.0; 3], vec![0.0; 3], 3).is_err());
}
