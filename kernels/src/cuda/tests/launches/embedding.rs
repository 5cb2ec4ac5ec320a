//! Rows of tables.

use candle_core::DType;

use super::DEVICE;
use super::linear::assert_equal;
use crate::ops::embedding::{embedding, embedding_as};
use crate::testing::{Numbers, QUANTIZED};
use crate::weight::{PackedWeight, WeightFormat};

#[test]
fn embeddings_are_the_rows_of_the_table() {
    let mut numbers = Numbers::new(60);
    let dense = [WeightFormat::F32, WeightFormat::F16, WeightFormat::Bf16];
    for format in dense.into_iter().chain(QUANTIZED.map(WeightFormat::Quantized)) {
        for [rows, cols] in [[40, 63], [17, 128], [1, 1100]] {
            let host = PackedWeight::from_f32(format, rows, cols, &numbers.normal(rows * cols)).unwrap();
            let table = host.to_device(&DEVICE).unwrap();
            let last = rows as u32 - 1;
            for ids in [vec![last], vec![0, last, last / 2, last, 0], Vec::new()] {
                let expected = embedding(&ids, &host).unwrap();
                if ids.is_empty() {
                    assert_eq!(embedding(&ids, &table).unwrap().dims(), [0, cols]);
                    continue;
                }
                assert_equal(&embedding(&ids, &table).unwrap(), &expected);
                let found = embedding_as(&ids, &table, DType::BF16).unwrap();
                assert_equal(&found, &expected.to_dtype(DType::BF16).unwrap());
            }
            assert!(embedding(&[last + 1], &table).is_err());
            assert!(embedding_as(&[0], &table, DType::F16).is_err());
        }
    }
}
