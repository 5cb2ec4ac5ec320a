//! Noise on router logits, as a function of seed, position, layer and expert.

use candle_core::Tensor;

use crate::error::EngineError;
use crate::forward_input::ForwardInput;
use crate::sampling::rng::philox;

/// In the last word of the counter, where draws of tokens have 0: so that no two draws of a seed are one.
const DOMAIN: u32 = 1;

/// The logits of a layer with noise of standard deviation `sigma` on each.
pub fn noisy(
    logits: &Tensor, /* [num_tokens, num_experts] */
    input: &ForwardInput,
    (moe_idx, sigma): (usize, f32),
) -> Result<Tensor, EngineError> {
    let shape = logits.dims2()?;
    let mut values = kernels::to_host(logits)?.flatten_all()?.to_vec1::<f32>()?;
    for (rows, options) in input.paged.batch.cu_seqlens.windows(2).zip(&input.experts) {
        for row in rows[0] as usize..rows[1] as usize {
            let place = [input.positions[row], moe_idx as u32];
            let logits = &mut values[row * shape.1..(row + 1) * shape.1];
            for (group, logits) in (0..).zip(logits.chunks_mut(4)) {
                let noise = normals(options.noise_seed, place, group);
                logits.iter_mut().zip(noise).for_each(|(logit, noise)| *logit += sigma * noise);
            }
        }
    }
    Ok(Tensor::from_vec(values, shape, logits.device())?)
}

/// Four draws of the standard normal distribution (Box and Muller 1958): of experts `4 * group..4 * group + 4` of a token's
/// layer.
fn normals(seed: u64, [position, layer]: [u32; 2], group: u32) -> [f32; 4] {
    let words = philox([position, layer, group, DOMAIN], [seed as u32, (seed >> 32) as u32]);
    let pair = |first: u32, second: u32| {
        const RANGE: f64 = (1u64 << 32) as f64;
        // Above 0, up to 1.
        let radius = (-2.0 * ((f64::from(first) + 1.0) / RANGE).ln()).sqrt();
        let (sin, cos) = (std::f64::consts::TAU * f64::from(second) / RANGE).sin_cos();
        [(radius * cos) as f32, (radius * sin) as f32]
    };
    let ([a, b], [c, d]) = (pair(words[0], words[1]), pair(words[2], words[3]));
    [a, b, c, d]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_are_normal_and_depend_on_every_part_of_the_key() {
        let draws: Vec<f64> = (0..50_000).flat_map(|position| normals(7, [position, 3], 0)).map(f64::from).collect();
        let moment = |power| draws.iter().map(|draw| draw.powi(power)).sum::<f64>() / draws.len() as f64;
        // Standard errors are 0.002, 0.003, 0.009 and 0.02.
        assert!(moment(1).abs() < 0.01 && (moment(2) - 1.0).abs() < 0.02, "{} {}", moment(1), moment(2));
        assert!(moment(3).abs() < 0.04 && (moment(4) - 3.0).abs() < 0.1, "{} {}", moment(3), moment(4));
        let product = draws.windows(2).map(|pair| pair[0] * pair[1]).sum::<f64>() / draws.len() as f64;
        assert!(product.abs() < 0.01, "{product}");
        let base = normals(7, [0, 3], 0);
        for other in [normals(8, [0, 3], 0), normals(7, [1, 3], 0), normals(7, [0, 4], 0), normals(7, [0, 3], 1)] {
            assert!(base.iter().zip(other).all(|(a, b)| *a != b));
        }
        assert_eq!(base, normals(7, [0, 3], 0));
        assert_ne!(base, normals(7 | 1 << 40, [0, 3], 0), "all of the seed counts");
    }
}
