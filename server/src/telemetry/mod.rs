//! What operators see: log lines and metrics.

pub mod http;
pub mod logging;
pub mod metrics;
