//! What operators see: log lines and metrics.

mod expert_loads;
pub mod http;
pub mod logging;
pub mod metrics;
