//! `gated_delta` on a CUDA device: convolution, what the recurrence reads beside it, what is kept, recurrence.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, DeviceRepr};
use candle_core::op::BackpropOp;
use candle_core::{Storage, Tensor};

use super::arguments::{COLUMNS, CONV_ROWS, Delta, Sequences, recurrence};
use super::{DeltaWeights, OP};
use crate::cuda::ROW_THREADS;
use crate::cuda::device::{Argument, Launch, launch};
use crate::cuda::memory::{Address, Operand, activations, name_of, output, scratch, upload};
use crate::error::{KernelError, Result};
use crate::paged_batch::PagedBatch;
use crate::state_cache::StateCache;

// SAFETY: numbers.
unsafe impl DeviceRepr for Delta {}
// SAFETY: addresses and a number; what lies behind it no kernel reads.
unsafe impl DeviceRepr for Sequences {}

/// The weights on the device that had them last. A copy has none.
#[derive(Debug, Default)]
pub(super) struct OnDevice(Mutex<Option<Arc<Copied>>>);

impl Clone for OnDevice {
    fn clone(&self) -> Self {
        Self::default()
    }
}

#[derive(Debug)]
struct Copied {
    device: CudaDevice,
    /// `conv`, `decay` and `dt_bias`, one after the other.
    numbers: CudaSlice<f32>,
}

impl DeltaWeights {
    fn on_device(&self, device: &CudaDevice) -> candle_core::Result<Arc<Copied>> {
        let mut latest = self.on_device.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(found) = latest.as_ref().filter(|found| found.device.id() == device.id()) {
            return Ok(found.clone());
        }
        let numbers = upload(device, &[&self.conv[..], &self.decay, &self.dt_bias].concat())?;
        let made = Arc::new(Copied { device: device.clone(), numbers });
        *latest = Some(made.clone());
        Ok(made)
    }
}

/// Of checked inputs.
pub(super) fn gated_delta(
    qkv: Operand<'_>,
    gates: Operand<'_>,
    weights: &DeltaWeights,
    states: &mut StateCache,
    batch: &PagedBatch,
) -> Result<Tensor> {
    let (spec, dtype, device) = (weights.spec, qkv.0.dtype(), qkv.0.device());
    if gates.0.dtype() != dtype {
        return Err(KernelError::DType { op: OP, what: "gates", got: gates.0.dtype(), expected: dtype });
    }
    let Some((recurrence, recurrence_threads)) = recurrence(spec.key_dim) else {
        let reason = format!("keys have {} elements, 256 at most on a device", spec.key_dim);
        return Err(KernelError::Invalid { op: OP, reason });
    };
    let (num_tokens, num_seqs, heads) = (qkv.1.dims()[0], batch.num_seqs(), spec.num_value_heads);
    let (copied, on_device) = (weights.on_device(device)?, batch.on_device(device)?);
    let conv = Address::of(&copied.numbers);
    let decay = conv.plus(size_of_val(&*weights.conv));
    let dt_bias = decay.plus(size_of_val(&*weights.decay));
    let sequences = Sequences {
        cu_seqlens: on_device.cu_seqlens,
        context_lens: on_device.context_lens,
        source_lens: on_device.source_lens,
        state_slots: on_device.state_slots,
        num_seqs: num_seqs as u32,
    };
    let delta = Delta::from(spec);
    let (qkv, gates, states) = (activations(qkv)?, activations(gates)?, states.address()?);
    let convolved_memory = scratch::<f32>(device, num_tokens * spec.num_channels())?;
    let scales_memory = scratch::<f32>(device, num_tokens * 2 * (spec.num_key_heads + heads))?;
    let (convolved, scales) = (Address::of(&convolved_memory), Address::of(&scales_memory));
    let width = heads * spec.value_dim;
    let (out, target) = output(device, dtype, num_tokens * width)?;

    let named = |kernel: &str| Ok::<_, candle_core::Error>(format!("{kernel}_{}", name_of(dtype)?));
    let channel_blocks = spec.num_channels().div_ceil(ROW_THREADS);
    let shape = |grid, threads| Launch { grid, threads, shared_bytes: 0 };
    // Without rows nothing is convolved, and sequences keep what they have.
    let of_rows = shape([channel_blocks, num_tokens.div_ceil(CONV_ROWS), 1], ROW_THREADS);
    let kernel = named("gated_delta_convolve")?;
    // SAFETY: the arguments of the kernel; the batch was checked to have these rows, and states that there are.
    unsafe { launch(device, &kernel, of_rows, &[&qkv, &conv, &states, &convolved, &delta, &sequences]) }?;
    let kernel = named("gated_delta_scales")?;
    let arguments: [&dyn Argument; 6] = [&convolved, &gates, &decay, &dt_bias, &scales, &delta];
    // SAFETY: the arguments of the kernel, with rows of the convolution and as many of the gates.
    unsafe { launch(device, &kernel, Launch::rows(num_tokens, ROW_THREADS), &arguments) }?;
    let kernel = named("gated_delta_keep_inputs")?;
    let of_sequences = shape([channel_blocks, num_seqs, 1], ROW_THREADS);
    // SAFETY: the arguments of the kernel, behind the convolution, which reads what this one writes.
    unsafe { launch(device, &kernel, of_sequences, &[&qkv, &states, &delta, &sequences]) }?;
    let of_columns = shape([spec.value_dim.div_ceil(COLUMNS), heads, num_seqs], recurrence_threads);
    // SAFETY: the arguments of the kernel, whose keys are no wider; no two sequences have the same state.
    unsafe {
        launch(device, &named(recurrence)?, of_columns, &[&convolved, &scales, &states, &target, &delta, &sequences])
    }?;
    let dims = (num_tokens, width);
    Ok(Tensor::from_storage(Storage::Cuda(out), dims, BackpropOp::none(), false))
}
