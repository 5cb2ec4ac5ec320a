//! Bytes of one recurrent site: what each running sequence carries from row to row, and what is kept of that.

use candle_core::Device;

use crate::error::{KernelError, Result};
use crate::memory::view_mut;
use crate::slabs::Slabs;

const OP: &str = "state cache";

/// One state of `width` f32 per slot. The memory is zero; on the CPU it is committed when first written.
pub struct StateCache {
    width: usize,
    num_slots: usize,
    /// One.
    memory: Slabs,
}

impl StateCache {
    /// On the CPU. Fails if a size is zero or the system has no address space for them.
    pub fn new(width: usize, num_slots: usize) -> Result<Self> {
        Self::on(&Device::Cpu, width, num_slots)
    }

    /// On a device. Fails as [`Self::new`], or if the device has no memory for them.
    pub fn on(device: &Device, width: usize, num_slots: usize) -> Result<Self> {
        let bytes = width.checked_mul(num_slots).and_then(|count| count.checked_mul(size_of::<f32>()));
        let Some(bytes) = bytes.filter(|&bytes| bytes > 0 && bytes <= isize::MAX as usize) else {
            let reason = format!("no cache of {num_slots} states of {width} numbers");
            return Err(KernelError::Invalid { op: OP, reason });
        };
        let mut memory = Slabs::on(OP, device)?;
        memory.add(OP, bytes)?;
        Ok(Self { width, num_slots, memory })
    }

    /// Numbers of a state.
    pub fn width(&self) -> usize {
        self.width
    }

    pub fn num_slots(&self) -> usize {
        self.num_slots
    }

    /// Makes the state at `to` that at `from`. Fails if there is no such slot.
    pub fn copy(&mut self, from: u32, to: u32) -> Result<()> {
        let (width, num_slots) = (self.width, self.num_slots);
        if from.max(to) as usize >= num_slots {
            let reason = format!("state {from} copied to {to}, there are {num_slots}");
            return Err(KernelError::Invalid { op: OP, reason });
        }
        let state_bytes = width * size_of::<f32>();
        let start = from as usize * state_bytes;
        self.memory.copy_within(0, start..start + state_bytes, to as usize * state_bytes)
    }

    pub(crate) fn is_on(&self, device: &Device) -> bool {
        self.memory.is_on(device)
    }

    /// All states, one after the other. Panics unless they are on the CPU.
    pub(crate) fn states_mut(&mut self) -> &mut [f32] {
        view_mut(&mut self.memory.host_mut()[0])
    }

    /// All states as they are now.
    #[cfg(test)]
    pub(crate) fn read(&self) -> Vec<f32> {
        let bytes = self.memory.bytes(0, 0..self.width * self.num_slots * size_of::<f32>()).unwrap();
        bytes.as_chunks().0.iter().map(|bytes| f32::from_ne_bytes(*bytes)).collect()
    }

    #[cfg(test)]
    pub(crate) fn fill(&mut self, states: &[f32]) {
        let fill = |all: &mut [u8]| {
            all.as_chunks_mut().0.iter_mut().zip(states).for_each(|(bytes, value)| *bytes = value.to_ne_bytes());
        };
        self.memory.fill(0, 0..size_of_val(states), fill).unwrap();
    }

    /// Where the first state is on a CUDA device.
    #[cfg(feature = "cuda")]
    pub(crate) fn address(&mut self) -> candle_core::Result<crate::cuda::address::Address> {
        self.memory.address()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_zero_and_sizes_are_checked() {
        let cache = StateCache::new(3, 2).unwrap();
        assert_eq!(cache.read(), [0.0; 6]);
        assert!(StateCache::new(0, 2).is_err());
        assert!(StateCache::new(usize::MAX, 2).is_err());
    }

    #[test]
    fn a_copy_is_the_whole_state_and_nothing_else() {
        let mut cache = StateCache::new(2, 3).unwrap();
        cache.fill(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        cache.copy(2, 0).unwrap();
        cache.copy(1, 1).unwrap();
        assert_eq!(cache.read(), [5.0, 6.0, 3.0, 4.0, 5.0, 6.0]);
        assert!(cache.copy(0, 3).is_err() && cache.copy(u32::MAX, 0).is_err());
    }
}
