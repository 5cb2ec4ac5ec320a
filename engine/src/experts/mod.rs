//! Experts as a resource: what the routers chose, in sum and for every token.

mod routed_rows;
mod routing_stats;

pub use routed_rows::{MoeShape, RoutedLayout, RoutedRows};
pub use routing_stats::RoutingStats;
