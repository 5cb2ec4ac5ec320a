//! The one error type of this crate: what was checked before compute and did not hold.

use candle_core::DType;

/// Result of every fallible function of this crate.
pub type Result<T> = std::result::Result<T, KernelError>;

/// Why an op refused its inputs, or could not get memory.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A tensor or weight does not have the dimensions the op needs.
    #[error("{op}: {what} has shape {got:?}, expected {expected}")]
    Shape { op: &'static str, what: &'static str, got: Vec<usize>, expected: String },
    /// Activations are f32, on a CUDA device bf16 too.
    #[error("{op}: {what} is {got:?}, expected {expected:?}")]
    DType { op: &'static str, what: &'static str, got: DType, expected: DType },
    /// The op has no code for the device of a tensor, or its tensors lie on different ones.
    #[error("{op}: {what} is not on the device that the op computes on")]
    Device { op: &'static str, what: &'static str },
    /// Operands that do not lie together.
    #[error("{op}: {what} is on another device")]
    OtherDevice { op: &'static str, what: &'static str },
    /// A tensor has strides or gaps.
    #[error("{op}: {what} is not contiguous")]
    NotContiguous { op: &'static str, what: &'static str },
    /// An id, slot, position or block past its table.
    #[error("{op}: {what} is {got}, it must be below {limit}")]
    OutOfRange { op: &'static str, what: &'static str, got: usize, limit: usize },
    /// A length that must match another.
    #[error("{op}: {what} is {got}, expected {expected}")]
    Length { op: &'static str, what: &'static str, got: usize, expected: usize },
    /// Parameters that contradict each other.
    #[error("{op}: {reason}")]
    Invalid { op: &'static str, reason: String },
    /// The system gave no memory.
    #[error("{op}: no memory for {bytes} bytes: {source}")]
    Memory { op: &'static str, bytes: usize, source: std::io::Error },
    /// candle failed.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}
