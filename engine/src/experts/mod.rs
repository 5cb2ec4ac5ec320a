//! Experts as a resource: what the routers chose, in sum and for every token, what they are expected to choose, which
//! experts are worth their room, and where they are.

mod balance;
mod expected;
mod expert_use;
mod loads;
mod options;
mod profile;
mod residency;
mod routed_rows;
mod routing_stats;
mod store;
mod traffic;

pub use balance::NUM_HOT;
pub use expected::ExpectedExperts;
pub(crate) use expected::{ExpertMap, KNOWN_BLOCKS, PRIOR_BLOCKS, RoutingAccuracy};
pub use expert_use::{ExpertCost, ExpertUse, TouchedExperts};
pub use loads::{ExpertLoads, LayerLoads, LoadSums, MAX_LOAD_WINDOW};
pub use options::{Capacity, CutChoices, ExpertOptions, Overflow, RoutingOptions};
pub(crate) use options::{Router, RoutingControl};
pub use profile::{ExpertProfile, ProfileLayer};
pub use residency::{Admission, ExpertId, ExpertPolicy, Residency, ResidencyConfig, Touch};
pub use routed_rows::{MoeShape, NO_EXPERT, RoutedLayout, RoutedRows};
pub use routing_stats::RoutingStats;
pub use store::{ExpertCatalog, ExpertFault, ExpertStore, RouterParts, StoreConfig};
pub use traffic::ExpertTraffic;
