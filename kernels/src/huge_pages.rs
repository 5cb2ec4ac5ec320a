//! Backs the memory of owned weights by huge pages: a product of one row reads each weight once, and with pages of 4 KiB
//! it waits for address translation at every one.

use std::mem::MaybeUninit;

use crate::weight::PackedWeight;

/// Owned weights up to so far apart are taken as one range: what lies between them is the allocator's.
const MAX_GAP: usize = 256 << 10;

/// The memory of weights that will be read as long as the process lives.
#[derive(Debug, Default)]
pub struct HugePages {
    /// Addresses, first and behind the last.
    ranges: Vec<(usize, usize)>,
}

impl HugePages {
    /// Notes a weight. One in a mapped file stays in the page cache's own pages, one on a device has none.
    pub fn add(&mut self, weight: &PackedWeight) {
        if weight.is_owned() && weight.device().is_cpu() {
            let bytes = weight.as_bytes();
            let start = bytes.as_ptr() as usize;
            self.ranges.push((start, start + bytes.len()));
        }
    }

    /// Has the system gather what was noted into huge pages, in parallel on the compute threads; gives the bytes that it
    /// did this for. That is 0 where it has no such call (before Linux 6.1), has none to give, or is set to `never`.
    /// The contents stay as they are; a weight that was dropped meanwhile does no harm.
    pub fn gather(self) -> usize {
        #[cfg(target_os = "linux")]
        if linux::are_allowed() {
            return linux::gather(&joined(self.ranges));
        }
        0
    }
}

/// Asks for huge pages under memory that nobody wrote yet. Direct reads into them are cheaper too: there is less to pin.
pub(crate) fn wish_for<T>(fresh: &mut [MaybeUninit<T>]) {
    #[cfg(target_os = "linux")]
    linux::wish_for(fresh.as_ptr() as usize, size_of_val(fresh));
    #[cfg(not(target_os = "linux"))]
    let _ = fresh;
}

/// Sorted, and joined where little lies between.
#[cfg_attr(not(target_os = "linux"), expect(dead_code, reason = "only Linux gathers"))]
fn joined(mut ranges: Vec<(usize, usize)>) -> Vec<(usize, usize)> {
    ranges.sort_unstable();
    let mut joined: Vec<(usize, usize)> = Vec::new();
    for (start, end) in ranges {
        match joined.last_mut() {
            Some(last) if start <= last.1 + MAX_GAP => last.1 = last.1.max(end),
            _ => joined.push((start, end)),
        }
    }
    joined
}

#[cfg(target_os = "linux")]
mod linux {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use crate::pool;

    /// On x86-64, and on ARM with pages of 4 KiB.
    const HUGE: usize = 2 << 20;
    const SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

    pub(super) fn are_allowed() -> bool {
        std::fs::read_to_string(SETTING).is_ok_and(|setting| !setting.contains("[never]"))
    }

    /// For the whole huge pages in memory of the caller's.
    pub(super) fn wish_for(start: usize, len: usize) {
        let (first, end) = (start.next_multiple_of(HUGE), (start + len) / HUGE * HUGE);
        if first < end {
            // SAFETY: the range is the caller's; the call says how its pages are to be made, never what is in them. A
            // refusal leaves small ones.
            let _ = unsafe { libc::madvise(first as *mut libc::c_void, end - first, libc::MADV_HUGEPAGE) };
        }
    }

    pub(super) fn gather(ranges: &[(usize, usize)]) -> usize {
        let whole =
            |&(start, end): &(usize, usize)| (start.next_multiple_of(HUGE)..=end.saturating_sub(HUGE)).step_by(HUGE);
        let pages: Vec<usize> = ranges.iter().flat_map(whole).collect();
        let num_gathered = AtomicUsize::new(0);
        pool::parallel_for(pages.len(), |idx| {
            // SAFETY: the call changes which physical pages hold the bytes, never the bytes; an address that is not mapped
            // is refused.
            let refused = unsafe { libc::madvise(pages[idx] as *mut libc::c_void, HUGE, libc::MADV_COLLAPSE) };
            num_gathered.fetch_add(usize::from(refused == 0), Ordering::Relaxed);
        });
        num_gathered.into_inner() * HUGE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::weight::WeightFormat;

    #[test]
    fn neighbours_are_joined_and_strangers_are_not() {
        let far = 10 * MAX_GAP;
        let ranges = vec![(far, far + 5), (0, 10), (20, 30), (5, 12), (30 + MAX_GAP, 31 + MAX_GAP)];
        assert_eq!(joined(ranges), [(0, 31 + MAX_GAP), (far, far + 5)]);
    }

    #[test]
    fn gathered_weights_keep_their_numbers() {
        let values: Vec<f32> = (0..2048 * 1024).map(|i| (i % 1009) as f32).collect();
        let weights: Vec<_> =
            (0..3).map(|_| PackedWeight::from_f32(WeightFormat::F32, 2048, 1024, &values).unwrap()).collect();
        let mut pages = HugePages::default();
        weights.iter().for_each(|weight| pages.add(weight));
        let gathered = pages.gather();
        // Each has 8 MiB, of which three pages are whole wherever it starts.
        #[cfg(target_os = "linux")]
        if gathered > 0 {
            assert!((9 << 21..=12 << 21).contains(&gathered), "{gathered}");
            let rollup = std::fs::read_to_string("/proc/self/smaps_rollup").unwrap();
            let line = rollup.lines().find_map(|line| line.strip_prefix("AnonHugePages:")).unwrap();
            let kib: usize = line.trim().trim_end_matches(" kB").parse().unwrap();
            assert!(kib << 10 >= gathered, "the system counts {kib} KiB");
        }
        weights.iter().for_each(|weight| assert!(weight.to_f32() == values));
    }
}
