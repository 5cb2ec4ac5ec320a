//! A run of the benchmark: what it may use, and the rows so far.

use std::time::{Duration, Instant};

use candle_core::{Device, Tensor};

use super::limits::{LimitProbe, Limits};
use super::{BenchOptions, BenchReport, Bound, MatrixUnit, OpRow};
use crate::dispatch;
use crate::error::Result;

/// What an op rotates over comes to so much, memory permitting: more than any cache holds.
const ROTATION_BYTES: usize = 1 << 30;
/// A row is repeated so long, and at least so often.
const ROW_TIME: Duration = Duration::from_millis(100);
const MIN_CALLS: usize = 5;
/// Rows that take long are repeated less.
const SLOW_ROW_TIME: Duration = Duration::from_millis(800);
const MIN_SLOW_CALLS: usize = 3;

/// What one call of an op does, for its floor.
pub(super) struct Work {
    pub(super) op: &'static str,
    pub(super) shape: String,
    pub(super) format: &'static str,
    pub(super) num_tokens: usize,
    /// Read from memory.
    pub(super) bytes: usize,
    /// Multiplications, each with its addition.
    pub(super) multiplications: usize,
    /// What could do them, f32 vectors apart.
    pub(super) units: &'static [MatrixUnit],
}

struct Timed {
    work: Work,
    seconds: f64,
}

pub(super) struct Session<'a> {
    options: &'a BenchOptions,
    progress: &'a mut dyn FnMut(&str),
    probe: LimitProbe,
    threads: usize,
    rows: Vec<Timed>,
    left_out: Vec<String>,
}

impl<'a> Session<'a> {
    pub(super) fn new(options: &'a BenchOptions, threads: usize, progress: &'a mut dyn FnMut(&str)) -> Result<Self> {
        progress("limits of this machine");
        let mut probe = LimitProbe::new(options.memory_bytes.min(ROTATION_BYTES), threads)?;
        probe.measure();
        Ok(Self { options, progress, probe, threads, rows: Vec::new(), left_out: Vec::new() })
    }

    /// Whether the op is asked for.
    pub(super) fn wants(&self, op: &str) -> bool {
        self.options.ops.is_empty() || self.options.ops.iter().any(|name| name == op)
    }

    /// Announces what comes next, and looks at the machine once more.
    pub(super) fn begin(&mut self, what: &str) {
        (self.progress)(what);
        self.probe.measure_again();
    }

    /// How many things of so many bytes to rotate over; `None`, and a note, if even one is too large.
    pub(super) fn num_copies(&mut self, what: &str, bytes: usize) -> Option<usize> {
        if bytes > self.options.memory_bytes {
            self.left_out.push(what.to_owned());
            return None;
        }
        Some(ROTATION_BYTES.min(self.options.memory_bytes).div_ceil(bytes.max(1)).max(1))
    }

    /// Times calls; each is given its number, to take other data than the call before.
    pub(super) fn time(&mut self, work: Work, mut call: impl FnMut(usize) -> Result<()>) -> Result<()> {
        call(0)?;
        let begin = Instant::now();
        let mut times = Vec::new();
        loop {
            let start = Instant::now();
            call(times.len() + 1)?;
            times.push(start.elapsed().as_secs_f64());
            let (elapsed, calls) = (begin.elapsed(), times.len());
            if calls >= MIN_CALLS && elapsed >= ROW_TIME || calls >= MIN_SLOW_CALLS && elapsed >= SLOW_ROW_TIME {
                break;
            }
        }
        times.sort_unstable_by(f64::total_cmp);
        self.rows.push(Timed { work, seconds: times[times.len() / 2] });
        Ok(())
    }

    /// Floors follow from the best limits of the whole run.
    pub(super) fn finish(mut self) -> Result<BenchReport> {
        self.probe.measure_again();
        let limits = self.probe.best().clone();
        let rows = self.rows.into_iter().map(|timed| timed.row(&limits)).collect();
        let (isa, threads) = (dispatch::isa(), self.threads);
        Ok(BenchReport { isa, threads, limits, rows, left_out: self.left_out })
    }
}

impl Timed {
    fn row(self, limits: &Limits) -> OpRow {
        let Work { op, shape, format, num_tokens, bytes, multiplications, units } = self.work;
        let (bytes, operations) = (bytes as f64, 2.0 * multiplications as f64);
        let (memory, compute) = (bytes / limits.read_bandwidth, operations / limits.peak(units));
        let bound = if memory >= compute { Bound::Memory } else { Bound::Compute };
        let (seconds, floor_seconds) = (self.seconds, memory.max(compute));
        OpRow { op, shape, format, num_tokens, seconds, bytes, operations, floor_seconds, bound }
    }
}

/// Numbers between -0.5 and 0.5 that have no short period.
pub(super) fn numbers(len: usize) -> Vec<f32> {
    let mut state = 1u32;
    let next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 24) as f32 - 0.5
    };
    std::iter::repeat_with(next).take(len).collect()
}

pub(super) fn tensor(dims: &[usize]) -> Result<Tensor> {
    Ok(Tensor::from_vec(numbers(dims.iter().product()), dims, &Device::Cpu)?)
}
