//! A batch on a device: copied once for all layers of a step, with what attention plans for it.

use std::sync::{Arc, Mutex, PoisonError};

use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::driver::CudaSlice;

use super::address::Address;
use super::memory::upload;
use crate::ops::attention::plan::{Shape, SplitRow, Task};
use crate::paged_batch::BatchLists;

pub(crate) struct DeviceBatch {
    device: CudaDevice,
    /// All lists of the batch, one after the other.
    _numbers: CudaSlice<u32>,
    pub(crate) cu_seqlens: Address,
    pub(crate) context_lens: Address,
    pub(crate) source_lens: Address,
    pub(crate) state_slots: Address,
    pub(crate) block_tables: Address,
    pub(crate) block_offsets: Address,
    plans: Mutex<Vec<(Shape, Arc<DevicePlan>)>>,
}

/// A plan on a device.
pub(crate) struct DevicePlan {
    /// Of each kernel, with their number.
    pub(crate) tasks: Vec<(CudaSlice<Task>, usize)>,
    pub(crate) split_rows: (CudaSlice<SplitRow>, usize),
    pub(crate) num_slots: usize,
}

impl DeviceBatch {
    pub(crate) fn new(batch: &BatchLists, device: &CudaDevice) -> candle_core::Result<Self> {
        let BatchLists { cu_seqlens, context_lens, source_lens, state_slots, block_tables, block_offsets } = batch;
        let lists = [cu_seqlens, context_lens, source_lens, state_slots, block_tables, block_offsets];
        let numbers = upload(device, &lists.map(Vec::as_slice).concat())?;
        let mut next = Address::of(&numbers);
        let [cu_seqlens, context_lens, source_lens, state_slots, block_tables, block_offsets] = lists.map(|list| {
            let start = next;
            next = next.plus(list.len() * size_of::<u32>());
            start
        });
        Ok(Self {
            device: device.clone(),
            _numbers: numbers,
            cu_seqlens,
            context_lens,
            source_lens,
            state_slots,
            block_tables,
            block_offsets,
            plans: Mutex::default(),
        })
    }

    pub(crate) fn is_on(&self, device: &CudaDevice) -> bool {
        self.device.id() == device.id()
    }

    /// What was planned for such heads, or is now.
    pub(crate) fn plan(
        &self,
        shape: Shape,
        make: impl FnOnce(&Shape) -> candle_core::Result<DevicePlan>,
    ) -> candle_core::Result<Arc<DevicePlan>> {
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, plan)) = plans.iter().find(|(of, _)| *of == shape) {
            return Ok(plan.clone());
        }
        let plan = Arc::new(make(&shape)?);
        plans.push((shape, plan.clone()));
        Ok(plan)
    }
}
