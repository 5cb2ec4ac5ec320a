//! Experts as a resource: what the routers chose, in sum and for every token, and what they are expected to choose.

mod expected;
mod routed_rows;
mod routing_stats;

pub use expected::ExpectedExperts;
pub(crate) use expected::{KNOWN, PRIOR, RoutingAccuracy};
pub use routed_rows::{MoeShape, RoutedLayout, RoutedRows};
pub use routing_stats::RoutingStats;
