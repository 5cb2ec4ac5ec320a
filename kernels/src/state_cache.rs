//! Bytes of one recurrent site: what each running sequence carries from row to row.

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
}
