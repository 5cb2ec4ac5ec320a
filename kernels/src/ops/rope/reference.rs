//! Oracle of `rope`: plain loops, f64 products.

use super::{Rope, RopeStyle};

pub(crate) fn rope(op: &Rope<'_>, out: &mut [f32]) {
    let half = op.table.rotary_dim / 2;
    for (head_idx, head) in out.chunks_exact_mut(op.head_dim).enumerate() {
        let (cos, sin) = op.table.angles(op.positions[head_idx / op.num_heads] as usize);
        for i in 0..half {
            let (first, second) = match op.style {
                RopeStyle::Halves => (i, i + half),
                RopeStyle::Pairs => (2 * i, 2 * i + 1),
            };
            let (a, b) = (f64::from(head[first]), f64::from(head[second]));
            let (cos, sin) = (f64::from(cos[i]), f64::from(sin[i]));
            head[first] = (a * cos - b * sin) as f32;
            head[second] = (b * cos + a * sin) as f32;
        }
    }
}
