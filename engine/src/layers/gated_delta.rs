//! Gated DeltaNet: linear attention over a state of fixed size, in place of attention over all positions.

use candle_core::Tensor;
use kernels::{DeltaSpec, DeltaWeights, Pointwise};

use super::linear::{Bias, Linear};
use super::norm::Norm;
use crate::error::EngineError;
use crate::models::{CacheSite, ForwardContext};
use crate::weights::Role;
use crate::weights::loader::Loader;

#[derive(Debug)]
pub struct GatedDelta {
    /// To queries, keys and values of all heads, `[num_channels, hidden_size]`.
    qkv: Linear,
    /// To the output's gate, `[num_value_heads * value_dim, hidden_size]`.
    z: Linear,
    /// To the two gates of the state, `[2 * num_value_heads, hidden_size]`.
    gates: Linear,
    weights: DeltaWeights,
    /// Over each head of the output.
    norm: Norm,
    out: Linear,
    site: usize,
}

/// Sizes of the layer.
#[derive(Clone, Copy, Debug)]
pub struct GatedDeltaConfig {
    pub hidden_size: usize,
    pub heads: DeltaSpec,
    pub norm_eps: f64,
}

impl GatedDelta {
    /// The tensors under `{prefix}.`; its states live in cache site `site`.
    pub fn load(loader: &Loader, prefix: &str, config: GatedDeltaConfig, site: usize) -> Result<Self, EngineError> {
        let GatedDeltaConfig { hidden_size, heads, norm_eps } = config;
        let DeltaSpec { num_value_heads, value_dim, conv_kernel, .. } = heads;
        let name = |part: &str| format!("{prefix}.{part}");
        let values = num_value_heads * value_dim;
        let conv = loader.floats(&name("conv1d.weight"), &[heads.num_channels(), 1, conv_kernel])?;
        let a_log = loader.floats(&name("A_log"), &[num_value_heads])?;
        let dt_bias = loader.floats(&name("dt_bias"), &[num_value_heads])?;
        let weights = DeltaWeights::new(heads, conv, &a_log, dt_bias)?;
        let (qkv_rows, z_rows) = projection_rows(&heads);
        let qkvz_shape = [heads.num_channels() + values, hidden_size];
        let qkvz = Linear::load_picked(loader, (&name("in_proj_qkvz"), Role::Layer), qkvz_shape, &[qkv_rows, z_rows])?;
        let ba_shape = [2 * num_value_heads, hidden_size];
        let ba = Linear::load_picked(loader, (&name("in_proj_ba"), Role::Router), ba_shape, &[gate_rows(&heads)])?;
        let (Ok([qkv, z]), Ok([gates])) = (<[Linear; 2]>::try_from(qkvz), <[Linear; 1]>::try_from(ba)) else {
            unreachable!("as many maps as were picked")
        };
        let norm = Norm::load(loader, &name("norm"), value_dim, norm_eps)?;
        let out = Linear::load(loader, &name("out_proj"), hidden_size, values, Bias::No)?;
        Ok(Self { qkv, z, gates, weights, norm, out, site })
    }

    pub fn cache_site(&self) -> CacheSite {
        CacheSite::Recurrent { width: self.weights.spec().state_width() }
    }

    /// `x`: `[num_tokens, hidden_size]`, normalised.
    pub fn forward(&self, x: &Tensor, context: &mut ForwardContext) -> Result<Tensor, EngineError> {
        let DeltaSpec { num_value_heads, value_dim, .. } = self.weights.spec();
        let (qkv, gates) = (self.qkv.forward(x)?, self.gates.forward(x)?);
        let states = context.arena.states_mut(self.site);
        let recalled = kernels::gated_delta(&qkv, &gates, &self.weights, states, &context.input.paged.batch)?;
        let (num_tokens, width) = recalled.dims2()?;
        let heads = recalled.reshape((num_tokens, num_value_heads, value_dim))?;
        let normed = self.norm.forward(&heads)?.reshape((num_tokens, width))?;
        let gate = kernels::pointwise(&self.z.forward(x)?, Pointwise::Silu)?;
        self.out.forward(&(normed * gate)?)
    }
}

/// Rows of `in_proj_qkvz` in the order of the kernel. Stored are, for each key head: its query, its key, the values of
/// its value heads, their gates.
fn projection_rows(heads: &DeltaSpec) -> (Vec<usize>, Vec<usize>) {
    let values = heads.num_value_heads / heads.num_key_heads * heads.value_dim;
    let group = 2 * heads.key_dim + 2 * values;
    let part = |start: usize, len: usize| {
        (0..heads.num_key_heads).flat_map(move |head| head * group + start..head * group + start + len)
    };
    let (query, key) = (part(0, heads.key_dim), part(heads.key_dim, heads.key_dim));
    let value = part(2 * heads.key_dim, values);
    (query.chain(key).chain(value).collect(), part(2 * heads.key_dim + values, values).collect())
}

/// Rows of `in_proj_ba` in the order of the kernel: stored are, for each key head, `b` of its value heads, then `a`.
fn gate_rows(heads: &DeltaSpec) -> Vec<usize> {
    let per_key = heads.num_value_heads / heads.num_key_heads;
    let part = |start: usize| {
        (0..heads.num_key_heads).flat_map(move |head| {
            let first = 2 * head * per_key + start;
            first..first + per_key
        })
    };
    part(0).chain(part(per_key)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_sorted_by_part_and_not_by_key_head() {
        let heads = DeltaSpec {
            num_key_heads: 2,
            num_value_heads: 4,
            key_dim: 1,
            value_dim: 1,
            conv_kernel: 4,
            activation: Pointwise::Silu,
        };
        let (qkv, z) = projection_rows(&heads);
        assert_eq!((qkv, z), (vec![0, 6, 1, 7, 2, 3, 8, 9], vec![4, 5, 10, 11]));
        assert_eq!(gate_rows(&heads), [0, 1, 4, 5, 2, 3, 6, 7]);
    }
}
