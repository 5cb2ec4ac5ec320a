//! Oracle of the product: one element at a time, sums in f64, activations quantized as the contract says.

use super::Layout;
use super::pack::read_stored;
use super::rotation::Rotate;
use crate::dispatch::Isa;
use crate::lanes::Portable;

/// `x · weight[row]` for every row, with `x` rounded to int8 by groups.
pub(crate) fn product(x: &[f32], layout: &Layout, bytes: &[u8], rows: usize) -> Vec<f32> {
    let form = layout.format.row_form();
    let mut x = x.to_vec();
    if form.is_rotated {
        x.resize(layout.padded_cols(), 0.0);
        // Rounded as the product's own, so that no code falls on the other side of a half.
        Isa::Portable(Portable).run(Rotate(x.as_chunks_mut().0));
    }
    let x: Vec<f64> = x.chunks(form.group).flat_map(rounded).collect();
    let mut row = vec![0.0; x.len()];
    (0..rows)
        .map(|row_idx| {
            read_stored(layout, bytes, row_idx, &mut row);
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
