//! Chooses what every step computes: the life of requests, continuous batching, and who holds which KV block.
//!
//! Pure decisions: no bytes, devices, threads or clocks. Time is an argument, so any run can be replayed.
//!
//! | file | what it decides |
//! |---|---|
//! | `scheduler` | the order of things in one step, and what ends a sequence |
//! | `decode`, `prefill`, `encode`, `preempt` | who gets rows, who is admitted, who gives way |
//! | `sequence` | the lengths of one request and the asserts between them |
//! | `queue`, `budget` | who waits, how many rows are left |
//! | `prefix` | who starts from cached blocks, who waits for those of another |
//! | `computed` | which full blocks a step left for others |
//! | `load` | who waits for blocks from outside the pool |
//! | `snapshot` | where recurrent states are kept, and who starts from them |
//! | `kv` | which block belongs to whom; their bytes live in the engine |
//! | `invariants` | what holds after every call |
#![forbid(unsafe_code)]

mod batch;
mod budget;
mod computed;
mod config;
mod decode;
mod encode;
mod error;
mod invariants;
mod kv;
mod load;
mod preempt;
mod prefill;
mod prefix;
mod queue;
mod request;
mod scheduler;
mod sequence;
mod snapshot;
mod stats;

pub use batch::{Batch, BlockLoad, Chunk, FinishReason, Outcome, Phase, Progress, StateCopy, Update};
pub use computed::{ComputedBlock, block_names};
pub use config::{SchedulerConfig, WindowConfig, WindowLimits};
pub use error::{AdmissionError, ConfigError};
pub use kv::{BlockId, BlockTable, StateSlot};
pub use request::{Request, RequestId, StopCriteria};
pub use scheduler::Scheduler;
pub use sequence::Sequence;
pub use stats::SchedulerStats;
