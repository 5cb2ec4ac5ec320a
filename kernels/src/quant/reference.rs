//! Oracle of the product: one element at a time, sums in f64, activations quantized as the contract says.

use super::Layout;
use super::pack::read_row;

/// `x · weight[row]` for every row, with `x` rounded to int8 by groups.
pub(crate) fn product(x: &[f32], layout: &Layout, bytes: &[u8], rows: usize) -> Vec<f32> {
    let x: Vec<f64> = x.chunks(layout.format.group()).flat_map(rounded).collect();
    let mut row = vec![0.0; layout.cols];
    (0..rows)
        .map(|row_idx| {
            read_row(layout, bytes, row_idx, &mut row);
            x.iter().zip(&row).map(|(x, &w)| x * f64::from(w)).sum::<f64>() as f32
        })
        .collect()
}

fn rounded(group: &[f32]) -> Vec<f64> {
    let largest = group.iter().fold(0f32, |largest, x| largest.max(x.abs()));
    let scale = if largest == 0.0 { 0.0 } else { largest / 127.0 };
    let inverse = if largest == 0.0 { 0.0 } else { 127.0 / largest };
    group.iter().map(|x| f64::from((x * inverse).round_ties_even()) * f64::from(scale)).collect()
}
