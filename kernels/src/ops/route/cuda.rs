//! A block for each token.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::cudarc::driver::DeviceRepr;

use super::device_router::DeviceRouter;
use super::{DeviceChoices, RouterSpec};
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Launch, launch};
use crate::cuda::kept::{Copied, upload_kept};
use crate::cuda::memory::{Address, Operand, floats, scratch};

/// Dynamic shared memory of an expert: its score, its rank and whether it was taken.
const EXPERT_BYTES: usize = 9;

// SAFETY: the structure of the kernel, of plain numbers.
unsafe impl DeviceRepr for DeviceRouter {}

/// `logits`: `[num_tokens, num_experts]`
pub(super) fn choose(logits: Operand<'_>, spec: &RouterSpec) -> candle_core::Result<DeviceChoices> {
    let device = logits.0.device();
    let [num_tokens, num_experts] = [logits.1.dims()[0], logits.1.dims()[1]];
    let len = num_tokens * spec.top_k;
    let chosen = scratch::<u32>(device, 2 * len)?;
    let bias = spec.bias.as_ref().map(|bias| upload_kept(device, bias)).transpose()?;
    let bias_start = bias.as_ref().map_or(Address::NULL, Copied::start);
    let shape = Launch { shared_bytes: EXPERT_BYTES * num_experts, ..Launch::rows(num_tokens, ROW_THREADS) };
    let experts = Address::of(&chosen);
    let weights = experts.plus(len * size_of::<u32>());
    let router = DeviceRouter::new(spec, num_experts);
    // SAFETY: the arguments of the kernel; the bias is as long as there are experts.
    unsafe { launch(device, "route", shape, &[&floats(logits)?, &bias_start, &experts, &weights, &router]) }?;
    Ok(DeviceChoices { device: device.clone(), words: Arc::new(chosen), num_tokens, k: spec.top_k, num_experts })
}
