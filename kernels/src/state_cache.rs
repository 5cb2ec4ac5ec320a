//! Bytes of one recurrent site: what each running sequence carries from row to row, and what is kept of that.

use memmap2::MmapMut;

use crate::error::{KernelError, Result};
use crate::memory::view_mut;

const OP: &str = "state cache";

/// One state of `width` f32 per slot. The memory is zero, and committed when first written.
pub struct StateCache {
    width: usize,
    num_slots: usize,
    memory: MmapMut,
}

impl StateCache {
    /// Fails if a size is zero or the system has no address space for them.
    pub fn new(width: usize, num_slots: usize) -> Result<Self> {
        let bytes = width.checked_mul(num_slots).and_then(|count| count.checked_mul(size_of::<f32>()));
        let Some(bytes) = bytes.filter(|&bytes| bytes > 0 && bytes <= isize::MAX as usize) else {
            let reason = format!("no cache of {num_slots} states of {width} numbers");
            return Err(KernelError::Invalid { op: OP, reason });
        };
        let memory = MmapMut::map_anon(bytes).map_err(|source| KernelError::Memory { op: OP, bytes, source })?;
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
        let start = from as usize * width;
        self.states_mut().copy_within(start..start + width, to as usize * width);
        Ok(())
    }

    /// All states, one after the other.
    pub(crate) fn states_mut(&mut self) -> &mut [f32] {
        view_mut(&mut self.memory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_zero_and_sizes_are_checked() {
        let mut cache = StateCache::new(3, 2).unwrap();
        assert_eq!(cache.states_mut(), [0.0; 6]);
        assert!(StateCache::new(0, 2).is_err());
        assert!(StateCache::new(usize::MAX, 2).is_err());
    }

    #[test]
    fn a_copy_is_the_whole_state_and_nothing_else() {
        let mut cache = StateCache::new(2, 3).unwrap();
        cache.states_mut().copy_from_slice(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
        cache.copy(2, 0).unwrap();
        cache.copy(1, 1).unwrap();
        assert_eq!(cache.states_mut(), [5.0, 6.0, 3.0, 4.0, 5.0, 6.0]);
        assert!(cache.copy(0, 3).is_err() && cache.copy(u32::MAX, 0).is_err());
    }
}
