//! A run of the benchmark: what it may use, and the rows so far.

use std::time::{Duration, Instant};

use candle_core::{DType, Device, Tensor};

#[cfg(feature = "cuda")]
use super::device_limits::DeviceProbe;
use super::limits::{LimitProbe, Limits};
use super::{BenchOptions, BenchReport, Bound, MatrixUnit, OpRow};
use crate::device::{device_name, open_device};
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
/// What is launched on a device before somebody waits for it, and at most.
const DEVICE_SECONDS: f64 = 2e-3;
const MOST_AT_ONCE: f64 = 64.0;

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

/// What measures the limits.
enum Probe {
    Host(LimitProbe),
    #[cfg(feature = "cuda")]
    Device(DeviceProbe),
}

impl Probe {
    fn new(device: &Device, bytes: usize, threads: usize) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            return Ok(Self::Device(DeviceProbe::new(device, bytes)?));
        }
        debug_assert!(device.is_cpu());
        let mut probe = LimitProbe::new(bytes, threads)?;
        probe.measure();
        Ok(Self::Host(probe))
    }

    fn measure_again(&mut self) -> Result<()> {
        match self {
            Self::Host(probe) => {
                probe.measure_again();
                Ok(())
            }
            #[cfg(feature = "cuda")]
            Self::Device(probe) => probe.measure(),
        }
    }

    fn best(&self) -> &Limits {
        match self {
            Self::Host(probe) => probe.best(),
            #[cfg(feature = "cuda")]
            Self::Device(probe) => probe.best(),
        }
    }
}

struct Timed {
    work: Work,
    seconds: f64,
}

pub(super) struct Session<'a> {
    options: &'a BenchOptions,
    progress: &'a mut dyn FnMut(&str),
    device: Device,
    probe: Probe,
    threads: usize,
    rows: Vec<Timed>,
    left_out: Vec<String>,
}

impl<'a> Session<'a> {
    pub(super) fn new(options: &'a BenchOptions, threads: usize, progress: &'a mut dyn FnMut(&str)) -> Result<Self> {
        progress("limits of this machine");
        let device = open_device(options.device)?;
        let probe = Probe::new(&device, options.memory_bytes.min(ROTATION_BYTES), threads)?;
        Ok(Self { options, progress, device, probe, threads, rows: Vec::new(), left_out: Vec::new() })
    }

    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// What models compute in there.
    pub(super) fn activation_dtype(&self) -> DType {
        if self.device.is_cpu() { DType::F32 } else { DType::BF16 }
    }

    /// Activations between -0.5 and 0.5.
    pub(super) fn activations(&self, dims: &[usize]) -> Result<Tensor> {
        Ok(self.floats(dims)?.to_dtype(self.activation_dtype())?)
    }

    /// The same in f32.
    pub(super) fn floats(&self, dims: &[usize]) -> Result<Tensor> {
        Ok(Tensor::from_vec(numbers(dims.iter().product()), dims, &self.device)?)
    }

    /// Whether the op is asked for.
    pub(super) fn wants(&self, op: &str) -> bool {
        self.options.ops.is_empty() || self.options.ops.iter().any(|name| name == op)
    }

    /// Announces what comes next, and looks at the machine once more.
    pub(super) fn begin(&mut self, what: &str) -> Result<()> {
        (self.progress)(what);
        self.probe.measure_again()
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
        let mut num_calls = 0;
        let mut seconds_of = |count: usize| -> Result<f64> {
            self.device.synchronize()?;
            let start = Instant::now();
            for _ in 0..count {
                num_calls += 1;
                call(num_calls)?;
            }
            self.device.synchronize()?;
            Ok(start.elapsed().as_secs_f64() / count as f64)
        };
        // A device computes while the next call is prepared: several are timed as one there.
        let at_once = match self.device.is_cpu() {
            true => 1,
            false => (DEVICE_SECONDS / seconds_of(1)?).clamp(1.0, MOST_AT_ONCE) as usize,
        };
        let begin = Instant::now();
        let mut times = Vec::new();
        loop {
            times.push(seconds_of(at_once)?);
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
        self.probe.measure_again()?;
        let limits = self.probe.best().clone();
        let rows = self.rows.into_iter().map(|timed| timed.row(&limits)).collect();
        let device = device_name(&self.device)?;
        Ok(BenchReport { isa: dispatch::isa(), device, threads: self.threads, limits, rows, left_out: self.left_out })
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
