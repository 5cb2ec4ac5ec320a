//! The engine drives: the step loop, models, weights, sampling and the bytes of the KV cache.
//!
//! | room | what is in it |
//! |---|---|
//! | `handle`, `shared` | the door: submit, events, counters |
//! | `step_loop`, `runner`, `forward_input` | one thread: schedule, compute, sample, deliver |
//! | `prefix_tier` | the door through which full blocks leave and come back |
//! | `models`, `layers` | one file per family over shared layers |
//! | `weights` | checkpoints in, GGUF in, upcycling out |
//! | `fingerprint` | what the bits depend on, for caches |
//! | `memory` | the KV cache's size and bytes |
//! | `experts` | what the routers chose and are expected to, and experts under a budget of memory |
//! | `sampling` | a row of logits to a token |

#![forbid(unsafe_code)]

mod config;
mod error;
mod expert_placement;
mod experts;
mod fingerprint;
mod forward_input;
mod handle;
mod layers;
mod load;
mod memory;
mod models;
mod prefix_tier;
mod pulse;
mod runner;
pub mod sampling;
mod shared;
mod step_loop;
pub mod weights;

pub use config::{EngineConfig, ExpertConfig, ExpertMemory, ExpertWarmup, KvDtype, WeightDtype, WeightQuant};
pub use error::{EngineError, GenerationError, SubmitError};
pub use experts::{
    Admission, Capacity, CutChoices, ExpectedExperts, ExpertCost, ExpertFault, ExpertId, ExpertLoads, ExpertOptions,
    ExpertPolicy, ExpertProfile, ExpertTraffic, ExpertUse, LayerLoads, LoadSums, MAX_LOAD_WINDOW, MoeShape, NO_EXPERT,
    NUM_HOT, Overflow, ProfileLayer, Residency, ResidencyConfig, RoutedLayout, RoutingOptions, RoutingStats, Touch,
    TouchedExperts,
};
pub use fingerprint::Fingerprint;
pub use handle::{
    EngineHandle, EngineStats, Event, FinishReason, GenerateRequest, Generation, GenerationDefaults, LearnedBlock,
    ModelSummary, PromptLogprob, SampledToken, StopCriteria,
};
pub use kernels::bench as kernel_bench;
pub use kernels::{DeviceChoice, DeviceMemory, ReadMode};
pub use load::{LoadedModel, load, load_model};
pub use memory::BlockCoding;
pub use prefix_tier::{BlockName, LoadTicket, PrefixHint, PrefixTier};
pub use runner::{ChunkOutput, RowRequest, Runner};
pub use weights::gguf::GgufFile;
pub use weights::inspect::{Inspection, inspect};
pub use weights::loader::{LoadProgress, LoadStage};
pub use weights::model_files::find_gguf;
pub use weights::quantize::{PackFormat, QuantizeReport, quantize};
pub use weights::tally::{ClassSize, TensorClass};
pub use weights::upcycle::{UpcycleDtype, UpcycleOptions, UpcycleReport, upcycle};
