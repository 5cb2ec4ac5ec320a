//! Speed of the hot ops at layer shapes of published models, beside what this machine can do at most, measured in the
//! same run.
//!
//! `limits` measures the machine (`peaks` has its matrix units), `device_limits` a CUDA device, `session` times a case, and the cases are in `weights`
//! (ops with a weight), `elementwise` (ops over rows), `attention` and `recurrent`; `models` holds the shapes.

mod attention;
#[cfg(feature = "cuda")]
mod device_limits;
mod elementwise;
mod limits;
mod models;
mod peaks;
mod recurrent;
mod session;
#[cfg(test)]
mod tests;
mod weights;

pub use limits::{Limits, Peak};
pub use peaks::MatrixUnit;

use self::session::Session;
use crate::device::DeviceChoice;
use crate::error::{KernelError, Result};
use crate::pool;

/// Names of the ops that can be measured, in the order of the rows.
pub const OPS: &[&str] = &[
    weights::LINEAR,
    weights::HEAD_LINEAR,
    weights::GROUPED_SWIGLU,
    weights::EMBEDDING,
    elementwise::RMS_NORM,
    elementwise::ROPE,
    elementwise::ROUTE,
    attention::PAGED_ATTENTION,
    attention::MLA_ATTENTION,
    recurrent::GATED_DELTA,
];

/// Memory below which nothing is measured: what is read over and over must not stay in a cache.
pub const MIN_MEMORY_BYTES: usize = 64 << 20;

/// What to measure.
#[derive(Debug, Clone)]
pub struct BenchOptions {
    /// The ops of these names; all without any.
    pub ops: Vec<String>,
    /// Threads of the compute pool, unless it runs already; as many as the process may use without.
    pub threads: Option<usize>,
    /// Where ops compute.
    pub device: DeviceChoice,
    /// At most so much for the weights, inputs or caches that an op rotates over, and once more for the read test. At least
    /// [`MIN_MEMORY_BYTES`].
    pub memory_bytes: usize,
}

/// What was measured.
#[derive(Debug, Clone)]
pub struct BenchReport {
    /// Instruction set of the vector code.
    pub isa: &'static str,
    /// `cpu`, or a CUDA device with its name.
    pub device: String,
    /// Threads of the pool, the caller's included.
    pub threads: usize,
    /// The best that was seen before, between and after the rows.
    pub limits: Limits,
    pub rows: Vec<OpRow>,
    /// Rows that need more than the memory allowed.
    pub left_out: Vec<String>,
}

/// What limits an op.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    /// Bytes read, at the measured read bandwidth.
    Memory,
    /// Floating-point or integer operations, at the measured peak of the fastest unit that could do them.
    Compute,
}

/// One op at one shape.
#[derive(Debug, Clone)]
pub struct OpRow {
    pub op: &'static str,
    /// Whose layer, and the dimensions.
    pub shape: String,
    /// How weights, or keys and values, are stored.
    pub format: &'static str,
    pub num_tokens: usize,
    /// Median of one call.
    pub seconds: f64,
    /// What comes from memory in each call: weights, keys and values, states, or the rows of an op that has none of these.
    /// What a call writes, or reads again in the next one, is in a cache and not counted.
    pub bytes: f64,
    /// Multiplications and additions.
    pub operations: f64,
    /// The least time that the limits allow.
    pub floor_seconds: f64,
    pub bound: Bound,
}

impl OpRow {
    /// Of the machine's limit; about 1 at most.
    pub fn share(&self) -> f64 {
        self.floor_seconds / self.seconds
    }
}

/// Measures on the compute pool, or on a device. `progress` is told what comes next.
///
/// # Errors
/// An op that does not exist, too little memory, or none from the system.
pub fn run(options: &BenchOptions, progress: &mut dyn FnMut(&str)) -> Result<BenchReport> {
    if let Some(name) = options.ops.iter().find(|name| !OPS.contains(&name.as_str())) {
        let reason = format!("no op `{name}`; there are {}", OPS.join(", "));
        return Err(KernelError::Invalid { op: "bench", reason });
    }
    if options.memory_bytes < MIN_MEMORY_BYTES {
        let reason = format!("{} bytes of memory are too few, expected {MIN_MEMORY_BYTES}", options.memory_bytes);
        return Err(KernelError::Invalid { op: "bench", reason });
    }
    let mut session = Session::new(options, pool::init(options.threads), progress)?;
    weights::measure(&mut session)?;
    elementwise::measure(&mut session)?;
    attention::measure(&mut session)?;
    recurrent::measure(&mut session)?;
    session.finish()
}
