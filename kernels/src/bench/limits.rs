//! What the processors of this machine can do at most: bytes read from memory per second, and operations of each matrix unit.

use std::sync::Barrier;
use std::thread;
use std::time::Instant;

use memmap2::{Advice, MmapMut};

use super::peaks::MatrixUnit;
use crate::dispatch::{self, Kernel};
use crate::error::{KernelError, Result};
use crate::lanes::{Lanes, WIDTH};
use crate::memory::{view, view_mut};

/// Best values seen in a run.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Bytes per second that one thread reads; not on a device.
    pub read_bandwidth_1: Option<f64>,
    /// Bytes per second that all threads read, or all of a device.
    pub read_bandwidth: f64,
    /// Units of this machine, all threads together.
    pub peaks: Vec<Peak>,
}

/// The most that a unit was seen to do.
#[derive(Debug, Clone, Copy)]
pub struct Peak {
    pub unit: MatrixUnit,
    /// Multiplications and additions per second.
    pub operations_per_second: f64,
}

impl Limits {
    /// The fastest of some units that this machine has; f32 vectors are always among them.
    pub(super) fn peak(&self, units: &[MatrixUnit]) -> f64 {
        let among = |peak: &&Peak| peak.unit == MatrixUnit::FmaF32 || units.contains(&peak.unit);
        self.peaks.iter().filter(among).map(|peak| peak.operations_per_second).fold(0.0, f64::max)
    }
}

/// What all threads read between two looks at the clock: about as long as a process runs uninterrupted.
const SLICE_BYTES: usize = 32 << 20;

/// Measures again and again, and keeps the best: neighbours on a shared machine come and go.
pub(super) struct LimitProbe {
    memory: MmapMut,
    threads: usize,
    best: Limits,
}

impl LimitProbe {
    /// Takes the memory that is read. Fails if the system has none.
    pub(super) fn new(bytes: usize, threads: usize) -> Result<Self> {
        let bytes = bytes / (threads * BLOCK_BYTES) * (threads * BLOCK_BYTES);
        let mut memory =
            MmapMut::map_anon(bytes).map_err(|source| KernelError::Memory { op: "read test", bytes, source })?;
        // Small pages measure the page walk instead. A system that has no large ones refuses, and is measured as it is.
        #[cfg(target_os = "linux")]
        drop(memory.advise(Advice::HugePage));
        // Each thread touches first what it reads, so that the memory is near it.
        thread::scope(|scope| {
            for part in memory.chunks_mut(bytes / threads) {
                scope.spawn(move || view_mut::<f32>(part).fill(1.0));
            }
        });
        let units = MatrixUnit::available();
        let peaks = units.into_iter().map(|unit| Peak { unit, operations_per_second: 0.0 }).collect();
        Ok(Self { memory, threads, best: Limits { read_bandwidth_1: None, read_bandwidth: 0.0, peaks } })
    }

    /// Several passes over everything.
    pub(super) fn measure(&mut self) {
        const PASSES: usize = 5;
        for _ in 0..PASSES {
            let found = self.read(1);
            self.best.read_bandwidth_1 = Some(self.best.read_bandwidth_1.map_or(found, |best| best.max(found)));
            self.measure_again();
        }
    }

    /// One short pass of all threads.
    pub(super) fn measure_again(&mut self) {
        self.best.read_bandwidth = self.best.read_bandwidth.max(self.read(self.threads));
        for peak in &mut self.best.peaks {
            let found = per_second(self.threads, |_| peak.unit.spin());
            peak.operations_per_second = peak.operations_per_second.max(found);
        }
    }

    /// The best so far.
    pub(super) fn best(&self) -> &Limits {
        &self.best
    }

    /// The fastest of all slices of the memory: one that no other process interrupted, on a machine that is shared.
    fn read(&self, threads: usize) -> f64 {
        let part = self.memory.len() / threads;
        let slice = (SLICE_BYTES / threads).next_multiple_of(BLOCK_BYTES).min(part);
        let read = |first: usize| {
            per_second(threads, |thread_idx| {
                let start = thread_idx * part + first;
                let values = view::<f32>(&self.memory[start..start + slice]);
                dispatch::run(Read { blocks: values.as_chunks().0 });
                slice as f64
            })
        };
        (0..=part - slice).step_by(slice).map(read).fold(0.0, f64::max)
    }
}

/// What all threads do in the time from the first one's start to the last one's end.
fn per_second(threads: usize, work: impl Fn(usize) -> f64 + Sync) -> f64 {
    let barrier = Barrier::new(threads);
    let timed = |thread_idx| {
        barrier.wait();
        let start = Instant::now();
        let done = work(thread_idx);
        (start, Instant::now(), done)
    };
    let outcomes: Vec<_> = thread::scope(|scope| {
        let handles: Vec<_> = (0..threads).map(|thread_idx| scope.spawn(move || timed(thread_idx))).collect();
        handles.into_iter().map(|handle| handle.join().expect("the work does not panic")).collect()
    });
    let start = outcomes.iter().map(|outcome| outcome.0).min().expect("there is a thread");
    let end = outcomes.iter().map(|outcome| outcome.1).max().expect("there is a thread");
    outcomes.iter().map(|outcome| outcome.2).sum::<f64>() / (end - start).as_secs_f64()
}

const VECTORS: usize = 8;
const BLOCK: usize = VECTORS * WIDTH;
const BLOCK_BYTES: usize = BLOCK * size_of::<f32>();

struct Read<'a> {
    blocks: &'a [[f32; BLOCK]],
}

impl Kernel for Read<'_> {
    type Output = ();

    /// Adds up everything, a good way ahead of which lines are asked for.
    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) {
        const AHEAD: usize = 8192 / size_of::<f32>();
        let mut sums = [lanes.splat(0.0); VECTORS];
        for block in self.blocks {
            for (vector, sum) in block.as_chunks::<WIDTH>().0.iter().zip(&mut sums) {
                lanes.prefetch(vector.as_ptr().wrapping_add(AHEAD));
                *sum = lanes.add(*sum, lanes.load(vector));
            }
        }
        std::hint::black_box(sums.map(|sum| lanes.sum(sum)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn limits_are_positive_and_only_rise() {
        let mut probe = LimitProbe::new(8 << 20, 2).unwrap();
        probe.measure();
        let first = probe.best().clone();
        assert!(first.read_bandwidth > 1e8 && first.read_bandwidth_1.unwrap() > 1e8, "{first:?}");
        assert!(first.peaks.iter().all(|peak| peak.operations_per_second > 1e8), "{first:?}");
        probe.measure_again();
        assert!(probe.best().read_bandwidth >= first.read_bandwidth);
        assert!(probe.best().peak(&[]) <= probe.best().peak(&[MatrixUnit::VectorInt8, MatrixUnit::TileInt8]));
    }
}
