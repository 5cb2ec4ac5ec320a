//! Oracle of `rms_norm`: plain loops, f64 sums.

pub(crate) fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    let dim = weight.len().max(1);
    for (x, out) in x.chunks_exact(dim).zip(out.chunks_exact_mut(dim)) {
        let sum: f64 = x.iter().map(|&x| f64::from(x) * f64::from(x)).sum();
        let scale = 1.0 / (sum / dim as f64 + f64::from(eps)).sqrt();
        for (out, (&x, &weight)) in out.iter_mut().zip(x.iter().zip(weight)) {
            *out = (f64::from(x) * scale * f64::from(weight)) as f32;
        }
    }
}
