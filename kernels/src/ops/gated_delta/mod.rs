//! Gated DeltaNet (Yang, Kautz, Hatamizadeh, 2024): a linear attention whose state is corrected by what it got wrong.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod arguments;
mod cpu;
#[cfg(feature = "cuda")]
mod cuda;
#[cfg(test)]
mod reference;
#[cfg(test)]
mod tests;

use candle_core::{Device, Storage, Tensor};

use super::pointwise::Pointwise;
use crate::check::{self, Input, f32_slice};
use crate::error::{KernelError, Result};
use crate::lanes::WIDTH;
use crate::paged_batch::PagedBatch;
use crate::state_cache::StateCache;

const OP: &str = "gated_delta";

/// Heads of a layer. Value head `h` reads key head `h / (num_value_heads / num_key_heads)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeltaSpec {
    pub num_key_heads: usize,
    /// A multiple of `num_key_heads`.
    pub num_value_heads: usize,
    pub key_dim: usize,
    pub value_dim: usize,
    /// Inputs that the short convolution looks at, the row's own included.
    pub conv_kernel: usize,
    /// On what the convolution gives; SiLU in the published models.
    pub activation: Pointwise,
}

impl DeltaSpec {
    /// Of queries, keys and values together: what the convolution runs over.
    pub fn num_channels(&self) -> usize {
        2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim
    }

    /// Numbers that a sequence carries: the convolution's last inputs `[conv_kernel - 1, num_channels]`, then a matrix
    /// `[key_dim, value_dim]` per value head, its rows padded to whole vectors.
    pub fn state_width(&self) -> usize {
        self.conv_width() + self.num_value_heads * self.head_width()
    }

    fn conv_width(&self) -> usize {
        (self.conv_kernel - 1) * self.num_channels()
    }

    fn head_width(&self) -> usize {
        self.key_dim * self.row_width()
    }

    fn row_width(&self) -> usize {
        self.value_dim.next_multiple_of(WIDTH)
    }
}

/// The small weights of a layer.
#[derive(Debug, Clone)]
pub struct DeltaWeights {
    spec: DeltaSpec,
    /// The latest input's weight last; `[num_channels, conv_kernel]`
    conv: Vec<f32>,
    /// `-exp(A_log)`, `[num_value_heads]`
    decay: Vec<f32>,
    /// `[num_value_heads]`
    dt_bias: Vec<f32>,
    #[cfg(feature = "cuda")]
    on_device: cuda::OnDevice,
}

impl DeltaWeights {
    /// Fails if a size is zero, the heads do not divide, or a length does not fit.
    pub fn new(
        spec: DeltaSpec,
        conv: Vec<f32>,    /* [num_channels, conv_kernel] */
        a_log: &[f32],     /* [num_value_heads] */
        dt_bias: Vec<f32>, /* [num_value_heads] */
    ) -> Result<Self> {
        let DeltaSpec { num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel, .. } = spec;
        let sizes = [num_key_heads, num_value_heads, key_dim, value_dim, conv_kernel];
        if sizes.contains(&0) || !num_value_heads.is_multiple_of(num_key_heads) {
            return Err(KernelError::Invalid { op: OP, reason: format!("impossible heads: {spec:?}") });
        }
        check::length(OP, "length of conv", conv.len(), spec.num_channels() * conv_kernel)?;
        check::length(OP, "length of a_log", a_log.len(), num_value_heads)?;
        check::length(OP, "length of dt_bias", dt_bias.len(), num_value_heads)?;
        let decay = a_log.iter().map(|a_log| -a_log.exp()).collect();
        Ok(Self {
            spec,
            conv,
            decay,
            dt_bias,
            #[cfg(feature = "cuda")]
            on_device: cuda::OnDevice::default(),
        })
    }

    pub fn spec(&self) -> DeltaSpec {
        self.spec
    }
}

/// Convolution, activation, normalised queries and keys, and per value head, with `S [key_dim, value_dim]`:
///
/// ```text
/// S = exp(decay * softplus(a + dt_bias)) * S
/// S = S + k (sigmoid(b) * (v - Sᵀ k))ᵀ
/// o = Sᵀ q
/// ```
///
/// The rows of a sequence run one after the other from its state, zero at its first position, and leave the state behind:
/// cut anywhere, they give the same bits. Fails before anything is changed if the shapes do not fit, the operands are
/// not on one device, the batch names a state that does not exist or names one twice, or on a CUDA device if keys have
/// more than 256 elements.
pub fn gated_delta(
    qkv: &Tensor,   /* [num_tokens, num_channels]: queries of all key heads, their keys, then the values */
    gates: &Tensor, /* [num_tokens, 2 * num_value_heads]: b of all value heads, then a */
    weights: &DeltaWeights,
    states: &mut StateCache, /* width state_width */
    batch: &PagedBatch,
) -> Result<Tensor /* [num_tokens, num_value_heads * value_dim] */> {
    let spec = weights.spec;
    let [num_tokens, _] = Input { op: OP, what: "qkv", tensor: qkv }.dims("[num_tokens, num_channels]")?;
    Input { op: OP, what: "qkv", tensor: qkv }.has_dims(&[num_tokens, spec.num_channels()])?;
    Input { op: OP, what: "gates", tensor: gates }.has_dims(&[num_tokens, 2 * spec.num_value_heads])?;
    check::length(OP, "width of the state", states.width(), spec.state_width())?;
    batch.check_rows(OP, num_tokens)?;
    check_slots(&batch.state_slots, batch.num_seqs(), states.num_slots())?;
    if !states.is_on(qkv.device()) {
        return Err(KernelError::OtherDevice { op: OP, what: "states" });
    }
    if !gates.device().same_device(qkv.device()) {
        return Err(KernelError::OtherDevice { op: OP, what: "gates" });
    }
    let (qkv, qkv_layout) = qkv.storage_and_layout();
    let (gates, gates_layout) = gates.storage_and_layout();
    #[cfg(feature = "cuda")]
    if let (Storage::Cuda(qkv), Storage::Cuda(gates)) = (&*qkv, &*gates) {
        return cuda::gated_delta((qkv, qkv_layout), (gates, gates_layout), weights, states, batch);
    }
    let (Storage::Cpu(qkv), Storage::Cpu(gates)) = (&*qkv, &*gates) else {
        return Err(KernelError::Device { op: OP, what: "qkv or gates" });
    };
    let rows = Rows { qkv: f32_slice(qkv, qkv_layout)?, gates: f32_slice(gates, gates_layout)?, weights, batch };
    let out = cpu::gated_delta(&rows, states.states_mut());
    Ok(Tensor::from_vec(out, (num_tokens, spec.num_value_heads * spec.value_dim), &Device::Cpu)?)
}

/// Checked inputs of one call.
struct Rows<'a> {
    qkv: &'a [f32],
    gates: &'a [f32],
    weights: &'a DeltaWeights,
    batch: &'a PagedBatch,
}

fn check_slots(slots: &[u32], num_seqs: usize, num_slots: usize) -> Result<()> {
    check::length(OP, "number of state slots", slots.len(), num_seqs)?;
    let mut sorted = slots.to_vec();
    sorted.sort_unstable();
    if let Some(&last) = sorted.last() {
        check::below(OP, "state slot", last as usize, num_slots)?;
    }
    if sorted.windows(2).any(|pair| pair[0] == pair[1]) {
        return Err(KernelError::Invalid { op: OP, reason: format!("two sequences share a state: {slots:?}") });
    }
    Ok(())
}
