//! Experts as a resource: what the routers chose.

mod routing_stats;

pub use routing_stats::RoutingStats;
